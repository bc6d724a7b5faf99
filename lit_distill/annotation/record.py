"""One sample of a teacher: its columns, its line in a file, and what follows from its text."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from lit_distill.equations import ProgramError
from lit_distill.errors import UserError, first_fault
from lit_distill.tasks import Row

_HALF = re.compile("[\ud800-\udfff]")
_TERM = re.compile(r"[\d.,()+*/\s-]*")
_NUMBER = re.compile(r"\s*[$€£]?\s*(-?\d(?:[\d,.]*\d)?)")
_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, slots=True)
class Annotation:
    """One sample: a line of ``rationales.jsonl``. The dataset card says what its columns mean."""

    id: str
    split: str | None = None  # of the row; without one, it matches any
    sample: _Count = 0
    teacher: str | None = None
    kind: str = "rationale"
    given_rationale: str | None = None  # with the next: the answer that was to be judged, if any
    given_label: str | None = None
    text: str | None = None  # absent after an error
    rationale: str | None = None
    label: str | None = None
    error: str | None = None
    parsed: bool | None = None
    agrees: bool | None = None  # absent without a gold label or an answer
    contains_label: bool | None = None
    length: _Count | None = None  # words of the rationale
    logprob: FiniteFloat | None = None  # mean over the text's tokens
    votes: _Count | None = None  # answers to this row by this teacher, prompt and settings, parsed or not
    majority_label: str | None = None  # the most frequent one; the first of equals
    vote_share: Annotated[float, Field(ge=0, le=1)] | None = None  # fraction of the votes with that label
    in_majority: bool | None = None
    distinct: bool | None = None  # no earlier sample of the row by this teacher and of this kind says the same
    finish: str | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cost: Annotated[FiniteFloat, Field(ge=0)] | None = None  # US dollars
    structured: bool = False  # the text is JSON with rationale and label
    prompt: str | None = None  # hash of the prompt's template and demonstrations
    settings: str | None = None  # hash of the teacher's and the sampling's settings
    input: str | None = None  # `input_hash` of the row
    key: str | None = None  # hash of the whole question


COLUMNS: dict[str, type] = {name: (get_args(kind) or (kind,))[0] for name, kind in get_type_hints(Annotation).items()}
"""Column -> type."""

_ADAPTER = TypeAdapter(Annotation)

Agree = Callable[[str, str], bool]  # whether two labels are the same answer


def digest(*parts: Any, length: int = 12) -> str:
    """First digits of a SHA-256 over plain values."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def input_hash(row: Row) -> str:
    """Hash of a row's input and choices, since the input of an id may change."""
    return digest(row.input, *([list(row.choices)] if row.choices else []))


def to_line(annotation: Annotation, others: Mapping[str, Any] | None = None) -> bytes:
    """A JSON line; ``others`` are a user's own columns."""
    row = {name: getattr(annotation, name) for name in COLUMNS} | dict(others or {})
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def from_row(row: Mapping[str, Any], place: str) -> Annotation:
    """An annotation from a row; ignores other keys. Raises a ``UserError`` if a value is missing or of a wrong type."""
    # other tools write NaN for missing values
    known = {name: value for name in COLUMNS if (value := row.get(name)) is not None and value == value}
    # a cut answer may end in a lone surrogate
    known |= {name: _HALF.sub("\ufffd", value) for name, value in known.items() if isinstance(value, str)}
    try:
        return _ADAPTER.validate_python(known)
    except ValidationError as error:
        raise UserError(f"{place}: not a sample: {first_fault(error)}") from error


def read_text(
    annotation: Annotation, row: Row, parse: Callable[[str], tuple[str, str] | None], agree: Agree
) -> Annotation:
    """Fill in the columns that follow from a sample's text and its row's gold label, if any.

    If ``parse`` raises a `ProgramError`, that is the sample's error.
    """
    if annotation.text is None:
        return annotation
    error = None
    try:
        found = (parse_structured if annotation.structured else parse)(annotation.text)
    except ProgramError as raised:
        found, error = None, f"the program does not run: {raised}"
    if found is None:
        return replace(unread(annotation, error), parsed=False, agrees=None if row.label is None else False)
    rationale, label = found
    return replace(
        annotation,
        error=None,
        parsed=True,
        rationale=rationale,
        label=label,
        agrees=None if row.label is None else agree(label, row.label),
        contains_label=contains_label(rationale, label),
        length=len(rationale.split()),
    )


def unread(annotation: Annotation, error: str | None) -> Annotation:
    """A sample without the columns that follow from its text; ``error`` is why it could not be read."""
    unknown = dict.fromkeys(("parsed", "rationale", "label", "agrees", "contains_label", "length"))
    return replace(annotation, error=error, **unknown)  # type: ignore[arg-type]


class _Answer(BaseModel, str_strip_whitespace=True):
    rationale: Annotated[str, Field(min_length=1)]
    label: Annotated[str, Field(min_length=1)]


def parse_structured(text: str) -> tuple[str, str] | None:
    """``(rationale, label)`` of an answer in `answer_schema`; ``None`` otherwise."""
    try:
        found = _Answer.model_validate_json(text)
    except ValueError:
        return None
    return found.rationale, found.label


def answer_schema(choices: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an answer: the rationale, then the label, restricted to the choices if any."""
    allowed = {"enum": list(choices)} if choices else {}
    return {
        "type": "object",
        "properties": {"rationale": {"type": "string"}, "label": {"type": "string", **allowed}},
        "required": ["rationale", "label"],
        "additionalProperties": False,
    }


def contains_label(rationale: str, label: str) -> bool:
    """Whether a rationale contains a label as whole words, ignoring case."""
    # linear time, unlike a regular expression, as labels may be long
    words = (["", *re.findall(r"\w+|\W", text.lower()), ""] for text in (label.strip(), rationale))
    sought, whole = map("\0".join, words)
    return sought in whole


def same_answer(label: str, other: str, agree: Agree) -> bool:
    """Whether two labels are the same answer, with either as the gold one."""
    return label == other or agree(label, other) or agree(other, label)


def vote(
    labels: Sequence[str | None], agree: Agree, weights: Sequence[float] | None = None
) -> tuple[str | None, float]:
    """The majority label of a row's samples, as first written, and its share in 0..1 (Wang et al. 2022, 2203.11171).

    A label is ``None`` if its text does not parse; so is the majority if none does. ``weights`` are of the samples, by
    default equal.
    """
    counts: dict[str, float] = {}
    weights = weights or [1] * len(labels)
    for label, weight in zip(labels, weights, strict=True):
        if label is not None:
            like = (known for known in counts if same_answer(label, known, agree))
            answer = label if label in counts else next(like, label)
            counts[answer] = counts.get(answer, 0) + weight
    if not counts:
        return None, 0.0
    winner = max(counts, key=lambda label: counts[label])
    return winner, counts[winner] / sum(weights)


def with_votes(samples: Sequence[Annotation], agree: Agree) -> list[Annotation]:
    """The samples of a row with the columns of votes; each teacher's, prompt's, settings' and kind's are together."""
    groups = groupby(samples, lambda one: (one.teacher, one.prompt, one.settings, one.kind))
    return [one for _, group in groups for one in _voted(list(group), agree)]


def _voted(samples: list[Annotation], agree: Agree) -> list[Annotation]:
    labels = [one.label for one in samples if (one.text, one.rationale, one.label) != (None, None, None)]
    if not labels:
        return samples
    winner, share = vote(labels, agree)

    def has_it(label: str | None) -> bool | None:
        return None if label is None or winner is None else same_answer(label, winner, agree)

    columns: dict[str, Any] = {"votes": len(labels), "majority_label": winner, "vote_share": share}
    return [replace(one, **columns, in_majority=has_it(one.label)) for one in samples]


def with_distinct(samples: Sequence[Annotation], agree: Agree) -> list[Annotation]:
    """The samples of a row with the column ``distinct``: does no earlier one of its teacher and kind say the same?

    Two say the same if their labels are the same answer and their rationales have the same equations in the same order,
    as in rejection sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825), or, without any, the same words. Its code
    reads equations between ``<<`` and ``>>``, drops a rationale with a wrong one, and keeps of equals the one furthest
    in edits from the others; here equations are found in plain text and are not checked, and the first one counts.
    """
    labels: dict[Any, list[str | None]] = {}

    def distinct(one: Annotation) -> bool | None:
        if one.rationale is None:
            return None
        earlier = labels.setdefault((one.teacher, one.kind, said(one.rationale)), [])
        own = one.label
        found = any(
            label == own or (None not in (label, own) and same_answer(str(label), str(own), agree)) for label in earlier
        )
        earlier.append(own)
        return not found

    return [replace(one, distinct=distinct(one)) for one in samples]


def said(rationale: str) -> str:
    """What a rationale says: its equations, such as ``7*30=210``, else its words and signs of arithmetic."""
    found = []
    for left, right in pairwise(rationale.split("=")):
        # reversed: a search for the last of these characters would take the square of the length
        ending, result = _TERM.match(left[::-1]), _NUMBER.match(right)
        term = re.sub(r"[\s,]", "", ending[0][::-1]) if ending else ""
        if result and re.search(r"\d[^\d]*[-+*/]", term):
            found.append(f"{term.lstrip('.')}={result[1].replace(',', '')}")
    return "|".join(found) or " ".join(re.findall(r"[^\W_]+|[-+*/%=]", rationale.lower()))
