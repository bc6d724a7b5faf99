"""Few-shot chain-of-thought prompts: YAML files, selection of demonstrations, rendering."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, StringConstraints, ValidationError

from lit_distill.checks import check_format
from lit_distill.errors import UserError, first_fault
from lit_distill.questions import Layout, Message, Prompt
from lit_distill.reading import json_lines, parse_yaml, read_small
from lit_distill.tasks import Row, TeacherOutput

AS_JSON = "Give the answer as one JSON object with the keys rationale and label."
"""Added to the instruction for structured answers."""

Fields = Callable[[Row], Mapping[str, str]]
"""The template fields of a row."""

Parse = Callable[[str], tuple[str, str] | None]
"""Parses a teacher's text: ``(rationale, label)``, or ``None``."""

Choose = Callable[[Row], Sequence[Row]]
"""Selects the demonstrations for a row, in order."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt without the row."""

    instruction: str  # first: the system turn of a chat, or the first paragraph of a text
    question: str  # template of a question over the dataset's fields (always including `{input}`)
    answer: str  # template of a demonstration's answer over `{rationale}`, `{label}` and the dataset's fields
    question_cue: str = ""  # put before each question in a text for completion (not in a chat)
    answer_cue: str = ""  # put before each answer in a text for completion, and at its end
    stop: tuple[str, ...] = ()  # stop texts for completion: the start of an invented next question
    demonstrations: tuple[Row, ...] = ()  # rows with rationale and label

    @property
    def hash(self) -> str:
        """12 hexadecimal digits."""
        shown = [(one.input, one.choices, one.rationale, one.label) for one in self.demonstrations]
        text = json.dumps(asdict(replace(self, demonstrations=())) | {"demonstrations": shown}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def plain(self) -> dict[str, Any]:
        """The content of its file, for `load_prompt`."""
        shown = [
            {"input": one.input, "rationale": one.rationale, "label": one.label}
            | ({} if one.choices is None else {"choices": list(one.choices)})
            for one in self.demonstrations
        ]
        content = {"version": 1, **asdict(replace(self, demonstrations=()))}
        return content | {"stop": list(self.stop), "demonstrations": shown}


_Text = Annotated[str, StringConstraints(pattern=r"\S")]


class _Demonstration(BaseModel, extra="forbid"):
    input: _Text
    rationale: _Text
    label: _Text
    choices: tuple[str, ...] | None = None

    def row(self) -> Row:
        return Row("", self.input, self.label, self.choices, (TeacherOutput(self.rationale),))


class _PromptFile(BaseModel, extra="forbid"):
    version: Literal[1]
    instruction: str = ""
    question: _Text
    answer: _Text
    question_cue: str = ""
    answer_cue: str = ""
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()
    demonstrations: tuple[_Demonstration, ...] = ()


def load_prompt(path: str | Path) -> PromptTemplate:
    """Read a prompt file. Raises a ``UserError`` if it cannot be read or is invalid; names the file and the key."""
    try:
        found = parse_yaml(read_small(path))
        if not isinstance(found, dict):
            raise UserError(f"prompt: {path} must have the keys {', '.join(_PromptFile.model_fields)}")
        prompt = _PromptFile.model_validate({key: value for key, value in found.items() if value is not None})
    except OSError as error:
        raise UserError(f"prompt: {str(path)!r} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(f"prompt: {path}: {first_fault(error)}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"prompt: {path} is not YAML ({error})") from error
    settings = {name: getattr(prompt, name) for name in PromptTemplate.__dataclass_fields__}
    return PromptTemplate(**settings | {"demonstrations": tuple(one.row() for one in prompt.demonstrations)})


def load_demonstrations(path: str | Path) -> tuple[Row, ...]:
    """Read demonstrations from JSON lines. Raises a ``UserError`` if one lacks input, rationale or label."""
    shown = []
    try:
        for place, values in json_lines(Path(path)):
            # as the rows of a dataset, they may have other columns
            own = {name: values.get(name) for name in _Demonstration.model_fields}
            try:
                shown.append(_Demonstration.model_validate(own).row())
            except ValidationError as error:
                raise UserError(f"demonstrations: {place}: {first_fault(error)}") from error
    except OSError as error:
        raise UserError(f"demonstrations: {str(path)!r} cannot be read ({error.strerror})") from error
    if not shown:
        raise UserError(f"demonstrations: {path} is empty")
    return tuple(shown)


def fixed(demonstrations: Sequence[Row], count: int | None) -> Choose:
    """Select the first ``count`` (by default all), never the row itself."""
    return lambda row: [one for one in demonstrations if one.input != row.input][:count]


def nearest(demonstrations: Sequence[Row], count: int) -> Choose:
    """Select those with the most similar inputs, the most similar last (Liu et al. 2022, 2101.06804).

    Similarity is the cosine of TF-IDF vectors over words and bigrams.

    Raises:
        UserError: scikit-learn is not installed, or the inputs have no words.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError('nearest_demonstrations needs scikit-learn: pip install "lit_distill[nearest]"') from error
    # also words of one letter
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106
    try:
        # rows are normalised, so that a product is a cosine
        known = vectorizer.fit_transform([one.input for one in demonstrations])
    except ValueError as error:
        raise UserError(f"nearest_demonstrations: the demonstrations' inputs have no words ({error})") from error

    def choose(row: Row) -> list[Row]:
        similarity = (known @ vectorizer.transform([row.input]).T).toarray()[:, 0]
        order = (-similarity).argsort(kind="stable")
        return [demonstrations[i] for i in order if demonstrations[i].input != row.input][:count][::-1]

    return choose


def check_template(template: PromptTemplate, fields: Fields, parse: Parse, where: str) -> None:
    """Check that the templates use existing fields, and that the dataset parses its own demonstrations.

    Args:
        template: the prompt.
        fields: of the dataset.
        parse: of the dataset.
        where: the prompt's file, for messages.

    Raises:
        UserError: otherwise.
    """
    # also without demonstrations
    some = Row("", "input", "label", outputs=(TeacherOutput("rationale"),))
    _filled("question", template.question, fields(some), where)
    written_answer(template, fields, some, where)
    for position, row in enumerate(template.demonstrations, start=1):
        if not row.rationale or not row.label:
            raise UserError(f"prompt: {where}: demonstration {position} needs a rationale and a label")
        text = written_answer(template, fields, row, where)
        if (found := parse(text)) != (row.rationale.strip(), row.label.strip()):
            answer = f"the answer of demonstration {position}, {text!r}"
            raise UserError(f"prompt: {where}: {answer}, is read by the dataset as {found!r}")


def write_prompt(
    template: PromptTemplate,
    layout: Layout,
    fields: Fields,
    demonstrations: Sequence[Row],
    row: Row,
    *,
    structured: bool = False,
) -> Prompt:
    """The prompt for one row.

    Args:
        template: the prompt.
        layout: a chat, whose turns replace the cues, or one text.
        fields: of the dataset.
        demonstrations: for this row.
        row: the row.
        structured: answers, and those of demonstrations, are JSON objects.

    Raises:
        UserError: a template names a field that the dataset does not have.
    """
    instruction = " ".join(filter(None, (template.instruction.strip(), AS_JSON if structured else "")))
    answered = _as_json if structured else partial(written_answer, template, fields)
    # never reveal the gold label
    asked = _filled("question", template.question, fields(replace(row, label=None)))
    shown = [(_filled("question", template.question, fields(one)), answered(one)) for one in demonstrations]
    if layout == "chat":
        turns = [Message("system", instruction)] if instruction else []
        for question, answer in shown:
            turns += [Message("user", question), Message("assistant", answer)]
        return (*turns, Message("user", asked))
    parts = [instruction] if instruction else []
    parts += [f"{template.question_cue}{question}\n{template.answer_cue}{answer}" for question, answer in shown]
    parts.append(f"{template.question_cue}{asked}\n{template.answer_cue}".rstrip(" "))
    return "\n\n".join(parts)


def written_answer(template: PromptTemplate, fields: Fields, row: Row, where: str = "") -> str:
    """The answer of a demonstration, as the dataset parses it."""
    own = {"rationale": (row.rationale or "").strip(), "label": (row.label or "").strip()}
    return _filled("answer", template.answer, {**fields(row), **own}, where)


def _as_json(row: Row) -> str:
    return json.dumps({"rationale": row.rationale, "label": row.label}, ensure_ascii=False)


def _filled(name: str, template: str, values: Mapping[str, str], where: str = "") -> str:
    place = f"prompt: {where}: {name}" if where else f"prompt: {name}"
    for field in check_format(place, template):
        if field not in values:
            raise UserError(f"{place} asks for {{{field}}}, and there are {', '.join(f'{{{key}}}' for key in values)}")
    return template.format_map(values).strip()
