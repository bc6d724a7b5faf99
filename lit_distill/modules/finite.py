"""What is not finite: found before it reaches weights and files, and told with its term and rows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lit_distill.batch import TaskBatch

_SHOWN_ROWS = 8


class Part(NamedTuple):
    """What is kept of a micro-batch until its optimizer step, or its evaluation, is known to be finite."""

    terms: dict[str, Tensor]
    """Its detached terms."""
    rows: list[Tensor]
    """Its rows' positions in their split, for each task; none where the batch does not say."""


def part_of(terms: Mapping[str, Tensor], batch: TaskBatch) -> Part:
    """One micro-batch's terms and rows."""
    rows = [inputs["index"] for inputs in batch.values() if "index" in inputs]
    return Part({name: term.detach() for name, term in terms.items()}, rows)


def first_not_finite(parts: Sequence[Part]) -> tuple[int, str, float] | None:
    """The first micro-batch with a term that is not finite, the term's name and its value."""
    for number, part in enumerate(parts):
        for name, term in part.terms.items():
            if not term.isfinite():
                return number, name, float(term)
    return None


def rows_of(part: Part, ids: Sequence[str]) -> str:
    """A micro-batch's rows for a message, by their ids; empty where the batch does not say which they are."""
    rows = sorted({row for one in part.rows for row in one.tolist() if row >= 0})
    names = [ids[row] if row < len(ids) else str(row) for row in rows]
    more = f" and {len(names) - _SHOWN_ROWS} more" if len(names) > _SHOWN_ROWS else ""
    return f" (rows {', '.join(names[:_SHOWN_ROWS])}{more})" if names else ""
