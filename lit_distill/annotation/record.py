"""One sample of a teacher: what it was asked, what it said, and what is known of that, each in a column of its own."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lit_distill.reading import parse_json
from lit_distill.tasks import Row


@dataclass(frozen=True, slots=True)
class Annotation:
    """One sample, as it stands in a line of ``rationales.jsonl``."""

    id: str
    """The row's."""
    split: str | None = None
    """The row's; ``None`` fits any split."""
    sample: int = 0
    """Which of the row's samples by this teacher, prompt and settings."""
    teacher: str | None = None
    """The teacher's name."""
    text: str | None = None
    """What it said; ``None`` where it gave no answer."""
    rationale: str | None = None
    """Its rationale; ``None`` where the text does not parse."""
    label: str | None = None
    """Its label; ``None`` where the text does not parse."""
    error: str | None = None
    """Why there is no answer."""
    parsed: bool | None = None
    """Whether the text parses; ``None`` where there is none."""
    agrees: bool | None = None
    """Whether the label is the gold one (not parsed is wrong); ``None`` without a gold label or an answer."""
    contains_label: bool | None = None
    """Whether the rationale holds the label, as whole words in any case; ``None`` where the text does not parse."""
    length: int | None = None
    """Words of the rationale."""
    logprob: float | None = None
    """Mean log-probability of the text's tokens, where the teacher gives it."""
    votes: int | None = None
    """Answers to this row by this teacher, prompt and settings, parsed or not."""
    majority_label: str | None = None
    """The label of most of them (self-consistency); the earliest such where several are as frequent."""
    vote_share: float | None = None
    """The part of them with that label."""
    in_majority: bool | None = None
    """Whether this sample's label is that label."""
    finish: str | None = None
    """``stop``, or ``length`` where the text was cut."""
    input_tokens: int | None = None
    """Tokens of the prompt."""
    output_tokens: int | None = None
    """Tokens of the text."""
    cost: float | None = None
    """US dollars, where prices are known."""
    structured: bool = False
    """Whether the text is JSON that holds rationale and label."""
    prompt: str | None = None
    """Hash of the prompt's template and demonstrations."""
    settings: str | None = None
    """Hash of the teacher's and the sampling's settings."""
    input: str | None = None
    """`input_hash` of the row: an answer belongs to no other."""
    key: str | None = None
    """Hash of all that was asked; the same question is never asked twice."""


COLUMNS = tuple(field.name for field in fields(Annotation))
"""The columns, in order."""

_KIND_NAMES: dict[type, str] = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}

KINDS: dict[str, type] = {
    name: next(kind for kind in _KIND_NAMES if kind.__name__ in str(annotated))
    for name, annotated in Annotation.__annotations__.items()
}
"""Column -> the type of its values."""

_BOUNDS: dict[str, tuple[float, float]] = {"vote_share": (0, 1), "logprob": (-sys.float_info.max, sys.float_info.max)}
"""Column of numbers -> the least and the greatest; the others count something."""

Agree = Callable[[str, str], bool]
"""``(label, other label) -> the same answer``."""


def digest(*parts: Any, length: int = 12) -> str:
    """A hash of plain values in hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def input_hash(example: Row) -> str:
    """Hash of what a row asks: its input, and its choices where it has any.

    Under one id there may be another input later, or in another dataset: a row is its split, its id and this.
    """
    return digest(example.input, *([list(example.choices)] if example.choices else []))


def to_line(annotation: Annotation, others: Mapping[str, Any] | None = None) -> bytes:
    """A line of JSON, with its end.

    Args:
        annotation: the sample.
        others: columns of a user's own, which are kept.
    """
    row = {**asdict(annotation), **(others or {})}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def from_row(row: Mapping[str, Any]) -> Annotation:
    """The annotation in a row; other keys are left aside, absent ones are not known.

    Raises:
        KeyError: there is no id.
        TypeError: a value is of another type.
    """
    # NaN, which is unlike itself, is how other tools keep a gap
    held = {name: value for name in COLUMNS if (value := row.get(name)) is not None and value == value}
    known = {name: _of_kind(name, value) for name, value in held.items()}
    if "id" not in known:
        raise KeyError("id")
    return Annotation(**known)


def _of_kind(name: str, value: Any) -> Any:  # noqa: ANN401 - whatever a row holds
    kind = KINDS[name]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # how tools that know no gaps keep whole numbers beside one
    taken = int | float if kind is float else kind
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, taken):
        raise TypeError(f"{name} must be {_KIND_NAMES[kind]}, got {value!r}")
    low, high = _BOUNDS.get(name, (0, 2**63 - 1))
    if isinstance(value, int | float) and not low <= value <= high:
        raise TypeError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    if name == "key" and not re.fullmatch("(?:[0-9a-f]{2})+", str(value)):
        raise TypeError(f"key must be a hash in hexadecimal digits, got {value!r}")
    return value


def read_text(
    annotation: Annotation, example: Row, parse: Callable[[str], tuple[str, str] | None], agree: Agree
) -> Annotation:
    """The columns that follow from a sample's text alone.

    Args:
        annotation: a sample, with its text or its error.
        example: its row, with the gold label where there is one.
        parse: the dataset's own reading of a text.
        agree: ``(teacher's label, gold label) -> right``.
    """
    if annotation.text is None:
        return annotation
    read = (parse_structured if annotation.structured else parse)(annotation.text)
    if read is None:
        return replace(
            annotation,
            parsed=False,
            rationale=None,
            label=None,
            contains_label=None,
            length=None,
            agrees=None if example.label is None else False,
        )
    rationale, label = read
    return replace(
        annotation,
        parsed=True,
        rationale=rationale,
        label=label,
        agrees=None if example.label is None else agree(label, example.label),
        contains_label=contains_label(rationale, label),
        length=len(rationale.split()),
    )


def unread(annotation: Annotation) -> Annotation:
    """A sample whose text could not be read for a fault in the reader: what follows from the text is not known."""
    return replace(annotation, parsed=None, rationale=None, label=None, agrees=None, contains_label=None, length=None)


def parse_structured(text: str) -> tuple[str, str] | None:
    """``(rationale, label)`` of an answer that follows `answer_schema`; ``None`` where it does not."""
    try:
        found = parse_json(text, surrogates=True)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    rationale, label = found.get("rationale"), found.get("label")
    if not isinstance(rationale, str) or not isinstance(label, str) or not rationale.strip() or not label.strip():
        return None
    return rationale.strip(), label.strip()


def answer_schema(choices: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer: first the rationale, then the label, one of the choices where they are closed."""
    label: dict[str, Any] = {"type": "string"}
    if choices:
        label["enum"] = list(choices)
    return {
        "type": "object",
        "properties": {"rationale": {"type": "string"}, "label": label},
        "required": ["rationale", "label"],
        "additionalProperties": False,
    }


def contains_label(rationale: str, label: str) -> bool:
    """Whether a rationale holds a label, as whole words, in any case."""
    # in linear time, unlike a pattern: a label may be as long as an answer
    words = (["", *re.findall(r"\w+|\W", text.lower()), ""] for text in (label.strip(), rationale))
    sought, held = map("\0".join, words)
    return sought in held


def same_answer(label: str, other: str, agree: Agree) -> bool:
    """Whether two labels are one answer, whichever of them is taken for the gold one."""
    return label == other or agree(label, other) or agree(other, label)


def vote(labels: Sequence[str | None], agree: Agree) -> tuple[str | None, float]:
    """The majority label of a row's samples and its share of all of them (Wang et al. 2022, 2203.11171).

    Args:
        labels: of the samples in order; ``None`` where a text did not parse, which counts against every label.
        agree: which labels are one answer, as ``(84 / 2)`` and ``(42)`` are.

    Returns:
        The majority label as it was first written, ``None`` where nothing parsed; and its share, in 0..1.
    """
    counts: dict[str, int] = {}
    for label in labels:
        if label is None:
            continue
        like = (known for known in counts if same_answer(label, known, agree))
        answer = label if label in counts else next(like, label)
        counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        return None, 0.0
    winner = max(counts, key=lambda label: counts[label])
    return winner, counts[winner] / len(labels)
