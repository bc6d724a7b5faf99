"""Few-shot chain-of-thought prompts: YAML files, and the selection of demonstrations."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, StringConstraints, ValidationError

from lit_distill.checks import check_format
from lit_distill.equations import ProgramError
from lit_distill.errors import UserError, first_fault
from lit_distill.reading import json_lines, parse_yaml, read_small
from lit_distill.tasks import Row, TeacherOutput

_Text = Annotated[str, StringConstraints(pattern=r"\S")]


class Demonstration(BaseModel, frozen=True, extra="forbid"):
    """An input, and the answer to show for it."""

    input: _Text
    rationale: _Text
    label: _Text
    choices: tuple[str, ...] | None = None
    given_rationale: _Text | None = None  # with the next: an earlier answer, which this one judges
    given_label: _Text | None = None

    @property
    def row(self) -> Row:
        """The same as a row of a dataset."""
        return Row("", self.input, self.label, self.choices, (TeacherOutput(self.given_rationale, self.given_label),))


Fields = Callable[[Row], Mapping[str, str]]  # the template fields of a row
Parse = Callable[[str], tuple[str, str] | None]  # a teacher's text as `(rationale, label)`, or `None`
Choose = Callable[[Row], Sequence[Demonstration]]  # the demonstrations for a row, in order
GIVEN = frozenset({"given_rationale", "given_label"})  # the fields of an answer to judge
Reads = Literal["answer", "program", "verdict"]  # how an answer is read, see `data.styles`


class PromptTemplate(BaseModel, frozen=True, extra="forbid"):
    """A prompt without the row: the content of a prompt file."""

    version: Literal[1] = 1
    instruction: str = ""  # first: the system turn of a chat, or the first paragraph of a text
    question: _Text  # template of a question over the dataset's fields (always including `{input}`)
    reads: Reads = "answer"
    answer: _Text  # template of a demonstration's answer over `{rationale}`, `{label}` and the dataset's fields
    question_cue: str = ""  # put before each question in a text for completion (not in a chat)
    answer_cue: str = ""  # put before each answer in a text for completion, and at its end
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()  # for completion: how a next question starts
    demonstrations: tuple[Demonstration, ...] = ()

    @property
    def hash(self) -> str:
        """12 hexadecimal digits."""
        # later keys count where they are given, so that earlier prompts keep their hashes
        shown = [
            (one.input, one.choices, one.rationale, one.label, *filter(None, (one.given_rationale, one.given_label)))
            for one in self.demonstrations
        ]
        content = self.model_dump(exclude={"version", "reads", "demonstrations"}) | {"demonstrations": shown}
        content |= {} if self.reads == "answer" else {"reads": self.reads}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def needs(self) -> frozenset[str]:
        """The fields of its question that not each row has."""
        named = frozenset(check_format("question", self.question))
        return (named & {"wrong"}) | (GIVEN if named & GIVEN else frozenset())


def load_prompt(path: str | Path) -> PromptTemplate:
    """Read a prompt file. Raises a ``UserError`` if it is invalid; names the file and the key."""
    try:
        return PromptTemplate.model_validate(parse_yaml(read_small(path)))
    except ValidationError as error:
        raise UserError(f"prompt: {path}: {first_fault(error)}") from error
    except ValueError as error:
        raise UserError(f"prompt: {path}: {error}") from error


def load_demonstrations(path: str | Path) -> tuple[Demonstration, ...]:
    """Read demonstrations from JSON lines, which may have more keys. Raises a ``UserError`` if a line is invalid."""
    found = []
    for place, row in json_lines(Path(path)):
        try:
            found.append(Demonstration.model_validate({name: row.get(name) for name in Demonstration.model_fields}))
        except ValidationError as error:
            raise UserError(f"demonstrations: {place}: {first_fault(error)}") from error
    if not found:
        raise UserError(f"demonstrations: {path} is empty")
    return tuple(found)


def fixed(demonstrations: Sequence[Demonstration]) -> Choose:
    """Select all in their order, never the row itself."""
    return lambda row: [one for one in demonstrations if one.input != row.input]


def nearest(demonstrations: Sequence[Demonstration], count: int) -> Choose:
    """Select those with the most similar inputs, the most similar last (Liu et al. 2022, 2101.06804).

    Similarity is the cosine of TF-IDF vectors over words and bigrams. Raises a ``UserError`` if the inputs have no
    words.
    """
    # it takes a second to import
    from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

    # also words of one letter
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106
    try:
        # rows are normalised, so that a product is a cosine
        known = vectorizer.fit_transform([one.input for one in demonstrations])
    except ValueError as error:
        raise UserError(f"nearest_demonstrations: the demonstrations' inputs have no words ({error})") from error

    def choose(row: Row) -> list[Demonstration]:
        similarity = (known @ vectorizer.transform([row.input]).T).toarray()[:, 0]
        order = (-similarity).argsort(kind="stable")
        return [demonstrations[i] for i in order if demonstrations[i].input != row.input][:count][::-1]

    return choose


def check_template(template: PromptTemplate, fields: Fields, parse: Parse, where: str) -> None:
    """Check that the templates use existing fields, and that the dataset parses the demonstrations.

    Raises a ``UserError`` that names the prompt's file, ``where``, otherwise.
    """
    own = fields(Row("", "input", "label"))
    for name, known in (("question", own), ("answer", {**own, "rationale": "", "label": ""})):
        place = f"prompt: {where}: {name}"
        for field in check_format(place, getattr(template, name)):
            if field not in known:
                offered = ", ".join(f"{{{key}}}" for key in known)
                raise UserError(f"{place} asks for {{{field}}}, and there are {offered}")
    if template.reads == "verdict" and not template.needs & GIVEN:
        raise UserError(f"prompt: {where}: question: a verdict needs {{given_rationale}} or {{given_label}} to judge")
    for position, one in enumerate(template.demonstrations, start=1):
        text = written_answer(template, fields, one)
        found: tuple[str, str] | str | None
        try:
            found = parse(text)
        except ProgramError as error:
            found = str(error)
        if not isinstance(found, tuple) or _one_line(*found) != _one_line(one.rationale, one.label):
            answer = f"the answer of demonstration {position}, {text!r}"
            raise UserError(f"prompt: {where}: {answer}, is read by the dataset as {found!r}")


def _one_line(*texts: str) -> list[str]:
    """Texts without line breaks, which semicolons replace where a program is read."""
    return [" ".join(re.split(r"[;\s]+", text.strip())) for text in texts]


def written_answer(template: PromptTemplate, fields: Fields, shown: Demonstration) -> str:
    """The answer of a demonstration, as the dataset parses it."""
    own = {"rationale": shown.rationale.strip(), "label": shown.label.strip()}
    return template.answer.format_map({**fields(shown.row), **own}).strip()
