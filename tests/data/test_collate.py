"""From rows to batches, with tensors written by hand."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch
from lit_distill.data.batches import collate
from lit_distill.data.cache import Prepared
from lit_distill.data.store import written
from lit_distill.data.tokenize import TokenRow, TokenRows, TokenSettings, row_lengths
from lit_distill.tasks import tasks_from

TASKS = ("label", "rationale")


def row(index: int, source: list[int], label: list[int] | None, rationale: list[int] | None) -> TokenRow:
    return {
        "index": index,
        "label.input_ids": [source],
        "label.labels": [] if label is None else [label],
        "rationale.input_ids": [[9, *source]],
        "rationale.labels": [] if rationale is None else [rationale],
    }


def token_rows(rows: list[TokenRow], tasks: Any = None, seed: int = 0) -> TokenRows:
    """As they are read from the cache."""
    settings = TokenSettings(tasks_from(tasks or {"label": {"prefix": "p"}, "rationale": {}}), 99, 99)
    found = []
    for one in rows:
        known: TokenRow = {}
        for task in settings.tasks:
            known |= {f"{task}.{part}": one[f"{task}.{part}"] for part in ("input_ids", "labels")}
        found.append(known)
    columns = {name: [one[name] for one in found] for name in found[0]}
    ids = pa.list_(pa.int32())
    types = dict.fromkeys(columns, pa.list_(ids))
    # a mapped file outlives its name
    with TemporaryDirectory() as folder:
        arrays = [pa.array(values, types[name]) for name, values in columns.items()]
        list(written(Path(folder) / "tokens.arrow", types, [(arrays, None)], "rows"))
        np.save(Path(folder) / "lengths.npy", row_lengths(columns, settings))
        return TokenRows(Prepared(Path(folder), "", {"tasks": {}}), settings, seed)


ROWS = [row(0, [5, 1], [6, 1], None), row(1, [7, 0, 1], [8, 8, 1], [4, 1])]


def batch_of(rows: list[TokenRow], *, evaluation: bool = False) -> TaskBatch:
    return collate(rows, tasks=TASKS, pad_token_id=0, evaluation=evaluation)


def test_training_holds_only_rows_with_a_target() -> None:
    batch = batch_of(ROWS)
    label, rationale = batch["label"], batch["rationale"]
    assert label["input_ids"].tolist() == [[5, 1, 0], [7, 0, 1]]
    # the second row's 0 is a token of its own, not padding
    assert label["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert label["labels"].tolist() == [[6, 1, IGNORE_INDEX], [8, 8, 1]]
    assert rationale["input_ids"].tolist() == [[9, 7, 0, 1]]
    assert rationale["labels"].tolist() == [[4, 1]]
    assert (label["index"].tolist(), rationale["index"].tolist()) == ([0, 1], [1])
    assert {tensor.dtype for task in batch.values() for tensor in (task["input_ids"], task["labels"])} == {torch.int64}


def test_training_without_any_target_has_no_rows() -> None:
    batch = batch_of(ROWS[:1])
    rationale = batch["rationale"]
    for tensor in (rationale["input_ids"], rationale["attention_mask"], rationale["labels"]):
        assert tensor.shape == (0, 1)
        assert tensor.dtype == torch.int64


def test_evaluation_holds_every_row() -> None:
    batch = batch_of(ROWS, evaluation=True)
    rationale = batch["rationale"]
    assert rationale["input_ids"].tolist() == [[9, 5, 1, 0], [9, 7, 0, 1]]
    assert rationale["labels"].tolist() == [[IGNORE_INDEX] * 2, [4, 1]]
    assert [task["index"].tolist() for task in batch.values()] == [[0, 1], [0, 1]]


def test_evaluation_without_any_target_still_has_a_column() -> None:
    batch = batch_of(ROWS[:1], evaluation=True)
    assert batch["rationale"]["labels"].tolist() == [[IGNORE_INDEX]]


def test_a_row_is_as_long_as_all_that_is_read_of_it() -> None:
    rows = [*ROWS, row(2, [5, 6, 7, 1], None, None), row(3, [1], None, [2, 1])]
    both = token_rows(rows)
    # label 2 + 2, rationale 3 + 2 and so on; a task without a target counts in evaluation alone, by its source
    assert both.lengths(evaluation=False).tolist() == [4, 6 + 6, 0, 4]
    assert both.lengths(evaluation=True).tolist() == [4 + 3, 6 + 6, 4 + 5, 1 + 4]
    label = token_rows(rows, {"label": {}})
    assert label.lengths(evaluation=False).tolist() == [4, 6, 0, 0]
    assert label.lengths(evaluation=True).tolist() == [4, 6, 4, 1]


def test_padding_row_is_the_first_without_targets() -> None:
    rows = token_rows([row(0, [5, 1], [6, 1], [3, 1]), row(1, [7, 1], [8, 1], [4, 1])])
    assert len(rows) == 2
    assert rows[1]["label.labels"] == [[8, 1]]
    assert rows[PADDING_ROW] == row(PADDING_ROW, [5, 1], None, None)
    assert [found["index"] for found in rows.__getitems__([1, PADDING_ROW, 0])] == [1, PADDING_ROW, 0]
    batch = batch_of([rows[1], rows[PADDING_ROW]], evaluation=True)
    assert batch["label"]["index"].tolist() == [1, PADDING_ROW]
    assert batch["label"]["labels"].tolist() == [[8, 1], [IGNORE_INDEX] * 2]
    assert batch["label"]["attention_mask"].tolist() == [[1, 1], [1, 1]]


SEVERAL = [row(i, [5, 1], [6, 1], None) | {"rationale.labels": [[i, k] for k in range(5)]} for i in range(40)]


def test_all_outputs_are_rows_of_their_own() -> None:
    rows = token_rows([*SEVERAL[:2], ROWS[0]], {"label": {"prefix": "p"}, "rationale": {"select": "all"}})
    batch = batch_of(rows.__getitems__([0, 1, 2]))
    assert batch["label"]["index"].tolist() == [0, 1, 2]
    assert batch["rationale"]["index"].tolist() == [0] * 5 + [1] * 5
    assert batch["rationale"]["labels"].tolist() == [[i, k] for i in range(2) for k in range(5)]
    evaluated = batch_of(rows.__getitems__([0, 1, 2]), evaluation=True)
    assert evaluated["rationale"]["labels"].tolist() == [[0, 0], [1, 0], [IGNORE_INDEX] * 2]
    # a source is read once for each target
    assert rows.lengths(evaluation=False).tolist() == [4 + 5 * 5, 4 + 5 * 5, 4]


def test_several_outputs_are_drawn_without_repetition() -> None:
    tasks = {"label": {"prefix": "p"}, "rationale": {"select": "sample", "draws": 2}}
    # with a source for each target
    several = [one | {"rationale.input_ids": [[9, k] for k in range(5)]} for one in SEVERAL]
    rows = token_rows([*several, SEVERAL[0] | {"rationale.labels": [[0, 7]]}], tasks)
    seen = set()
    for position in range(len(several)):
        found = rows[position]
        assert len(found["rationale.labels"]) == 2
        # each with its own source
        assert [k for _, k in found["rationale.labels"]] == [k for _, k in found["rationale.input_ids"]]
        seen.add(tuple(k for _, k in found["rationale.labels"]))
    assert all(first != second for first, second in seen)
    assert len(seen) > 10
    assert rows[40]["rationale.labels"] == [[0, 7]]
    batch = batch_of(rows.__getitems__([0, 40]))
    assert batch["rationale"]["index"].tolist() == [0, 0, 40]
    assert rows.lengths(evaluation=False).tolist() == [4 + 2 * 4] * 40 + [4 + 5]


def drawn(epoch: int, seed: int = 0) -> list[int]:
    tasks = {"label": {"prefix": "p"}, "rationale": {"select": "sample"}}
    rows = token_rows(SEVERAL, tasks, seed)
    found = rows.__getitems__([epoch * len(rows) + position for position in range(len(rows))])
    assert [one["index"] for one in found] == list(range(40))
    assert all(len(one["rationale.labels"]) == 1 for one in found)
    return [one["rationale.labels"][0][1] for one in found]


def test_an_output_is_drawn_anew_each_epoch() -> None:
    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=1)
    # over the epochs each output of a row is drawn about as often
    counts = [0] * 5
    for epoch in range(50):
        for choice in drawn(epoch):
            counts[choice] += 1
    assert all(340 < count < 460 for count in counts), counts
