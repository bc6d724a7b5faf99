"""Few-shot chain-of-thought prompts: their YAML files, how they are checked, and how a question is written."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from lit_distill.checks import check_format
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Message, Prompt
from lit_distill.reading import parse_yaml, read_small
from lit_distill.tasks import Row, TeacherOutput, read_rows

VERSION = 1
"""Of the files' form."""

AS_JSON = "Give the answer as one JSON object with the keys rationale and label."
"""What the instruction ends with where answers are structured."""

Fields = Callable[[Row], Mapping[str, str]]
"""What a dataset offers to the templates of a prompt, of one example."""

Parse = Callable[[str], tuple[str, str] | None]
"""A dataset's own reading of a teacher's text: ``(rationale, label)``, or ``None``."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """What is asked, but for the row that it is asked about."""

    instruction: str
    """What stands before everything: the system's turn of a chat, the first paragraph of a text."""
    question: str
    """Template of how an input is asked, over the dataset's fields (``{input}`` is in all of them)."""
    answer: str
    """Template of how a demonstration is answered, over ``{rationale}``, ``{label}`` and the dataset's fields."""
    question_cue: str = ""
    """Stands before each question in a text for completion (a chat has its turns)."""
    answer_cue: str = ""
    """Stands before each answer in a text for completion, and at its end."""
    stop: tuple[str, ...] = ()
    """Where an answer to a text for completion has run on into a next, invented question."""
    demonstrations: tuple[Row, ...] = ()
    """Examples with rationale and label, shown in this order."""

    @property
    def hash(self) -> str:
        """Tells this prompt from any other: 12 hexadecimal digits."""
        shown = [(one.input, one.choices, one.rationale, one.label) for one in self.demonstrations]
        text = json.dumps(asdict(replace(self, demonstrations=())) | {"demonstrations": shown}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_prompt(path: str | Path) -> PromptTemplate:
    """Read a prompt file.

    Raises:
        UserError: there is none, or it is not one; the message names the file and the key.
    """
    path = Path(path)
    try:
        found = parse_yaml(read_small(path))
    except OSError as error:
        raise UserError(f"prompt: {str(path)!r} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"prompt: {path} is not YAML ({error})") from error
    allowed = ("version", *PromptTemplate.__dataclass_fields__)
    if not isinstance(found, dict):
        raise UserError(f"prompt: {path} must hold keys ({', '.join(allowed)}), got {type(found).__name__}")
    if unknown := [key for key in found if key not in allowed]:
        raise UserError(f"prompt: {path}: unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}")
    if found.pop("version", None) != VERSION:
        raise UserError(f"prompt: {path}: version must be {VERSION}")
    demonstrations, stop = found.pop("demonstrations", None) or [], found.pop("stop", None) or []
    for key in ("instruction", "question", "answer", "question_cue", "answer_cue"):
        if not isinstance(found.setdefault(key, ""), str):
            raise UserError(f"prompt: {path}: {key} must be a text, got {found[key]!r}")
    for key in ("question", "answer"):
        if not found[key].strip():
            raise UserError(f"prompt: {path}: {key} must be given")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"prompt: {path}: stop must be a list of texts, got {stop!r}")
    if not isinstance(demonstrations, list):
        raise UserError(f"prompt: {path}: demonstrations must be a list, got {demonstrations!r}")
    read = [_demonstration(row, f"{path}: demonstration {n}") for n, row in enumerate(demonstrations, start=1)]
    return PromptTemplate(**found, stop=tuple(stop), demonstrations=tuple(read))


def _demonstration(row: Any, where: str) -> Row:  # noqa: ANN401 - whatever YAML holds
    if not isinstance(row, dict) or not {"input", "rationale", "label"} <= row.keys() <= {
        "input",
        "rationale",
        "label",
        "choices",
    }:
        raise UserError(f"prompt: {where}: must have input, rationale and label, may have choices, got {row!r}")
    for key in ("input", "rationale", "label"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"prompt: {where}: {key} must be a text, got {row[key]!r}")
    choices = row.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise UserError(f"prompt: {where}: choices must be a list of texts, got {choices!r}")
    return Row(
        id="",
        input=row["input"],
        label=row["label"],
        choices=None if choices is None else tuple(choices),
        outputs=(TeacherOutput(row["rationale"]),),
    )


def load_demonstrations(path: str | Path) -> tuple[Row, ...]:
    """Demonstrations from a file of examples as `lit_distill.tasks.write_rows` writes it.

    Raises:
        UserError: it cannot be read, is empty, or an example lacks its rationale or its label.
    """
    try:
        found = read_rows(path)
    except OSError as error:
        raise UserError(f"demonstrations: {str(path)!r} cannot be read ({error.strerror})") from error
    if not found:
        raise UserError(f"demonstrations: {path} is empty")
    for position, example in enumerate(found, start=1):
        if not example.rationale or not example.label:
            raise UserError(f"demonstrations: {path}: example {position} ({example.id}) needs a rationale and a label")
    return tuple(replace(one, id="", outputs=(TeacherOutput(one.rationale),)) for one in found)


def check_template(template: PromptTemplate, fields: Fields, parse: Parse, where: str) -> None:
    """See that the templates ask for what the dataset offers, and that it can read its own demonstrations.

    Args:
        template: the prompt.
        fields: of the dataset.
        parse: of the dataset.
        where: the prompt's file, for messages.

    Raises:
        UserError: it is not so.
    """
    # what is asked for is seen without demonstrations as well
    some = Row(id="", input="input", label="label", outputs=(TeacherOutput("rationale"),))
    _filled("question", template.question, fields(some), where)
    written_answer(template, fields, some, where)
    for position, example in enumerate(template.demonstrations, start=1):
        if not example.rationale or not example.label:
            raise UserError(f"prompt: {where}: demonstration {position} needs a rationale and a label")
        text = written_answer(template, fields, example, where)
        if (read := parse(text)) != (example.rationale.strip(), example.label.strip()):
            raise UserError(
                f"prompt: {where}: the answer of demonstration {position}, {text!r}, is read by the dataset as {read!r}"
            )


def write_prompt(
    template: PromptTemplate,
    layout: Layout,
    fields: Fields,
    demonstrations: Sequence[Row],
    example: Row,
    *,
    structured: bool = False,
) -> Prompt:
    """What a teacher is asked about one row.

    Args:
        template: the prompt.
        layout: a chat, whose turns stand for the cues, or one text.
        fields: of the dataset.
        demonstrations: those to show with this row.
        example: the row.
        structured: answers are JSON objects, those of the demonstrations too.

    Raises:
        UserError: a template asks for a field that the dataset does not offer.
    """
    instruction = " ".join(filter(None, (template.instruction.strip(), AS_JSON if structured else "")))
    answered = _as_json if structured else partial(written_answer, template, fields)
    # a gold label is not given away, whatever the template names
    asked = _filled("question", template.question, fields(replace(example, label=None)))
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


def written_answer(template: PromptTemplate, fields: Fields, example: Row, where: str = "") -> str:
    """How a demonstration is answered, as the dataset reads it.

    Raises:
        UserError: the template asks for a field that the dataset does not offer.
    """
    own = {"rationale": (example.rationale or "").strip(), "label": (example.label or "").strip()}
    return _filled("answer", template.answer, {**fields(example), **own}, where)


def _as_json(example: Row) -> str:
    return json.dumps({"rationale": example.rationale, "label": example.label}, ensure_ascii=False)


def _filled(name: str, template: str, values: Mapping[str, str], where: str = "") -> str:
    place = f"prompt: {where}: {name}" if where else f"prompt: {name}"
    for field in check_format(place, template):
        if field not in values:
            raise UserError(f"{place} asks for {{{field}}}, and there are {', '.join(f'{{{key}}}' for key in values)}")
    # spelt out in place of `format`, which would also follow attributes
    text = "".join(
        literal + (values[field] if field is not None else "") for literal, field, _, _ in Formatter().parse(template)
    )
    return text.strip()
