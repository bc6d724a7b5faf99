"""Weights of training rows, in proportion to which they occur."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lit_distill import checks
from lit_distill.data.selection import UsedRows
from lit_distill.data.store import Lazy, read
from lit_distill.errors import UserError
from lit_distill.reading import json_lines


def read_weights(path: Path) -> dict[str, float]:
    """The weights of rows by id. Raises a ``UserError`` if the file is absent, or a line holds no weight."""
    if not path.is_file():
        raise UserError(f"row_weights: no file {str(path)!r}")
    found = {}
    for place, row in json_lines(path):
        weight = row.get("weight")
        if not isinstance(row.get("id"), str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"row_weights: {place}: must have an id and a weight")
        checks.check_range(f"row_weights: {place}: weight", weight, at_least=0, at_most=1e9)
        found[row["id"]] = float(weight)
    return found


def weigh_rows(used: UsedRows, weights: Mapping[str, float], seed: int) -> UsedRows:
    """As many rows, in which each occurs about in proportion to its weight: boosting by resampling.

    A row of n whose weight is w times the mean occurs w times, rounded up or down by chance (by ``seed``). Raises a
    ``UserError`` if a row has no weight, or all weights are 0.

    Args:
        used: the rows.
        weights: of rows by id, at least 0.
        seed: of the rounding.
    """
    known = [(row.id, row.label) for row in used.rows]
    if lacking := [row_id for row_id, _ in known if row_id not in weights]:
        raise UserError(f"row_weights: {len(lacking)} of {len(known)} rows have no weight, such as {lacking[0]!r}")
    found = np.array([weights[row_id] for row_id, _ in known])
    if not found.any():
        raise UserError("row_weights: all weights are 0")
    # the places of n evenly spaced points in the cumulative weights, shifted by chance
    points = (np.random.RandomState(seed).random_sample() + np.arange(len(found))) / len(found)
    at = np.minimum(np.searchsorted(found.cumsum() / found.sum(), points, side="right"), len(found) - 1)
    majority = (number for number, place in enumerate(at) if known[place][1] == used.majority_label)
    return replace(
        used,
        rows=Lazy(len(at), lambda places: read(used.rows, at[places])),
        gold=Lazy(len(at), lambda places: read(used.gold, at[places])),
        with_rationale=np.flatnonzero(np.isin(at, used.with_rationale)),
        counts=used.counts | {"left_out_by_weight": len(at) - len(np.unique(at))},
        majority=next(majority, None),
    )
