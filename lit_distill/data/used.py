"""Which rows of a split are used, decided once: train without val, the rows to train on, inputs that repeat."""

from pathlib import Path
from typing import Any

import numpy as np

from lit_distill.data.cache import key_of, prepare
from lit_distill.data.selection import Selection, Selector, UsedRows, hold_out, select_rows, tally_of, train_rows
from lit_distill.data.store import Rows, chunks


def held_out(name: str, rows: Rows) -> dict[str, Rows]:
    """Train and val of a dataset without val, see `hold_out`."""

    def write(folder: Path) -> dict[str, Any]:
        tallies = {}
        for split, positions in zip(("train", "val"), hold_out(rows.inputs()), strict=True):
            np.save(folder / f"{split}.npy", positions)
            tallies[split] = list(tally_of(rows.flags()[positions]).items())
        return {"tallies": tallies}

    found = prepare(f"{name}-held_out", key_of("held out", rows.key), write)
    return {
        split: rows.part(found.array(split), key_of(split, found.key, rows.key), dict(tally))
        for split, tally in found.meta["tallies"].items()
    }


def select_once(name: str, rows: Rows, key: str | None, select: Selector, fraction: float, seed: int) -> UsedRows:
    """The rows of train that are used, see `select_rows`, under a key of all that decides them."""

    def write(folder: Path) -> dict[str, Any]:
        found = select_rows(rows, select, fraction, seed)
        np.save(folder / "positions.npy", found.positions)
        np.save(folder / "drawn.npy", found.drawn)
        np.save(folder / "with_rationale.npy", found.with_rationale)
        return {"counts": found.counts, "majority": found.majority}

    found = prepare(name, key, write)
    positions, drawn, with_rationale = map(found.array, ("positions", "drawn", "with_rationale"))
    selection = Selection(positions, found.meta["counts"], drawn, with_rationale, found.meta["majority"])
    return train_rows(rows, selection, select, key)


def count_repeated(name: str, train: Rows, rows: Rows) -> int:
    """The number of rows whose input also occurs in train."""
    key = key_of("repeated", train.key, rows.key)

    def count(folder: Path | None = None) -> dict[str, Any]:
        inputs = rows.inputs()
        found, places = np.unique(inputs, return_inverse=True)
        seen = np.zeros(len(found) + 1, bool)
        of_train = train.inputs()
        for positions in chunks(len(train)):
            some = of_train[positions]
            at = found.searchsorted(some)
            seen[at[found[np.minimum(at, len(found) - 1)] == some] if len(found) else []] = True
        return {"repeated": int(seen[places].sum())}

    known = count() if key is None else prepare(name, key, count).meta
    return int(known["repeated"])
