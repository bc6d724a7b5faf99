"""From rows to batches, with tensors written by hand."""

from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, lengths_of
from lit_distill.data.collate import RationaleCollator, Row, TokenRows

TASKS = ("label", "rationale")


def row(index: int, source: list[int], label: list[int] | None, rationale: list[int] | None) -> Row:
    return {
        "index": index,
        "label.input_ids": source,
        "label.labels": label,
        "rationale.input_ids": [9, *source],
        "rationale.labels": rationale,
    }


ROWS = [row(0, [5, 1], [6, 1], None), row(1, [7, 0, 1], [8, 8, 1], [4, 1])]


def test_training_holds_only_rows_with_a_target() -> None:
    batch = RationaleCollator(0, TASKS, evaluation=False)(ROWS)
    label, rationale = batch["label"], batch["rationale"]
    assert label["input_ids"].tolist() == [[5, 1, 0], [7, 0, 1]]
    # the second row's 0 is a token of its own, not padding
    assert label["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert label["labels"].tolist() == [[6, 1, IGNORE_INDEX], [8, 8, 1]]
    assert rationale["input_ids"].tolist() == [[9, 7, 0, 1]]
    assert rationale["labels"].tolist() == [[4, 1]]
    assert (label["index"].tolist(), rationale["index"].tolist()) == ([0, 1], [1])
    assert (label["source_lengths"], label["target_lengths"]) == ((2, 3), (2, 3))
    assert (rationale["source_lengths"], rationale["target_lengths"]) == ((4,), (2,))
    assert {tensor.dtype for task in batch.values() for tensor in (task["input_ids"], task["labels"])} == {torch.int64}


def test_training_without_any_target_has_no_rows() -> None:
    batch = RationaleCollator(0, TASKS, evaluation=False)(ROWS[:1])
    rationale = batch["rationale"]
    for tensor in (rationale["input_ids"], rationale["attention_mask"], rationale["labels"]):
        assert tensor.shape == (0, 1)
        assert tensor.dtype == torch.int64
    assert (rationale["source_lengths"], rationale["target_lengths"]) == ((), ())


def test_evaluation_holds_every_row() -> None:
    batch = RationaleCollator(0, TASKS, evaluation=True)(ROWS)
    rationale = batch["rationale"]
    assert rationale["input_ids"].tolist() == [[9, 5, 1, 0], [9, 7, 0, 1]]
    assert rationale["labels"].tolist() == [[IGNORE_INDEX] * 2, [4, 1]]
    assert [task["index"].tolist() for task in batch.values()] == [[0, 1], [0, 1]]
    assert (rationale["source_lengths"], rationale["target_lengths"]) == ((3, 4), (0, 2))


def test_evaluation_without_any_target_still_has_a_column() -> None:
    batch = RationaleCollator(0, TASKS, evaluation=True)(ROWS[:1])
    assert batch["rationale"]["labels"].tolist() == [[IGNORE_INDEX]]


@pytest.mark.parametrize("evaluation", [True, False])
def test_lengths_are_rounded_up(evaluation: bool) -> None:
    batch = RationaleCollator(0, TASKS, evaluation, pad_to_multiple_of=8)(ROWS)
    assert batch["label"]["input_ids"].shape == (2, 8)
    assert batch["label"]["labels"].shape == (2, 8)
    assert batch["label"]["attention_mask"].sum().item() == 5
    # what is real is not rounded
    assert batch["label"].get("source_lengths") == batch["label"].get("target_lengths") == (2, 3)


@pytest.mark.parametrize("evaluation", [True, False])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
def test_lengths_are_what_the_tensors_say(evaluation: bool, pad_to_multiple_of: int | None) -> None:
    batch = RationaleCollator(0, TASKS, evaluation, pad_to_multiple_of)(ROWS)
    for inputs in batch.values():
        bare: Any = {part: inputs[part] for part in ("input_ids", "attention_mask", "labels")}
        assert lengths_of(inputs) == lengths_of(bare)


def test_lengths_stay_on_the_host() -> None:
    batch: TaskBatch = move_data_to_device(RationaleCollator(0, TASKS, evaluation=True)(ROWS), torch.device("meta"))
    label = batch["label"]
    assert label["input_ids"].is_meta
    assert (label["source_lengths"], label["target_lengths"]) == ((2, 3), (2, 3))
    lengths: Any = {"source_lengths": label["source_lengths"], "target_lengths": label["target_lengths"]}
    # as the loader's thread does it, where there is a device to pin memory for
    assert {name: tuple(value) for name, value in pin_memory(lengths).items()} == lengths


def test_a_row_is_as_long_as_all_that_is_read_of_it() -> None:
    rows = [*ROWS, row(2, [5, 6, 7, 1], None, None), row(3, [1], None, [2, 1])]
    both = TokenRows(Dataset.from_list(rows), TASKS)
    # label 2 + 2, rationale 3 + 2 and so on; a task without a target counts in evaluation alone, by its source
    assert both.lengths(evaluation=False) == [4, 6 + 6, 0, 4]
    assert both.lengths(evaluation=True) == [4 + 3, 6 + 6, 4 + 5, 1 + 4]
    label = TokenRows(Dataset.from_list(rows), ("label",))
    assert label.lengths(evaluation=False) == [4, 6, 0, 0]
    assert label.lengths(evaluation=True) == [4, 6, 4, 1]


def test_padding_row_is_the_first_without_targets() -> None:
    rows = TokenRows(Dataset.from_list([row(0, [5, 1], [6, 1], [3, 1]), row(1, [7, 1], [8, 1], [4, 1])]), TASKS)
    assert len(rows) == 2
    assert rows[1]["label.labels"] == [8, 1]
    assert rows[PADDING_ROW] == row(PADDING_ROW, [5, 1], None, None)
    assert [found["index"] for found in rows.__getitems__([1, PADDING_ROW, 0])] == [1, PADDING_ROW, 0]
    batch = RationaleCollator(0, TASKS, evaluation=True)([rows[1], rows[PADDING_ROW]])
    assert batch["label"]["index"].tolist() == [1, PADDING_ROW]
    assert batch["label"]["labels"].tolist() == [[8, 1], [IGNORE_INDEX] * 2]
    assert batch["label"]["attention_mask"].tolist() == [[1, 1], [1, 1]]
