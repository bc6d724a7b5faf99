import torch
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskInputs, lengths_of, take, target_tokens


def test_target_tokens_are_those_that_count() -> None:
    labels = torch.tensor([[5, 0, 1], [7, IGNORE_INDEX, IGNORE_INDEX]])
    ids = torch.zeros(2, 4, dtype=torch.long)
    # a target's own id 0 counts; only the ignored positions do not
    assert target_tokens({"input_ids": ids, "attention_mask": ids, "labels": labels}) == 4


def test_no_rows_have_no_target_tokens() -> None:
    empty = torch.zeros(0, 1, dtype=torch.long)
    assert target_tokens({"input_ids": empty, "attention_mask": empty, "labels": empty}) == 0


def test_ignored_positions_are_those_that_pytorch_ignores() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX


def bare(mask: Tensor, labels: Tensor) -> TaskInputs:
    return {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "labels": labels}


def test_lengths_are_read_where_nobody_wrote_them_down() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    ignored = IGNORE_INDEX
    labels = torch.tensor([[5, 0, 1], [ignored, 7, ignored], [ignored] * 3, [1, ignored, ignored]])
    # a hole, as left padding or a masked token makes it, is no end
    assert lengths_of(bare(mask, labels)) == ((3, 3, 4, 0), (3, 2, 0, 1))


def test_lengths_of_no_rows_and_of_no_columns() -> None:
    assert lengths_of(bare(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long))) == ((), ())
    assert lengths_of(bare(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))) == (
        (0, 0),
        (3, 3),
    )


def test_lengths_that_were_written_down_are_taken() -> None:
    inputs = bare(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    inputs["source_lengths"] = (2, 1)
    # one of the two alone is not enough
    assert lengths_of(inputs) == ((3, 3), (3, 3))
    inputs["target_lengths"] = (1, 0)
    assert lengths_of(inputs) == ((2, 1), (1, 0))


def test_rows_are_taken_with_all_that_belongs_to_them() -> None:
    inputs: TaskInputs = {
        "input_ids": torch.tensor([[5, 6], [7, 0], [8, 9]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
        "labels": torch.tensor([[3], [4], [-100]]),
    }
    assert {name: value.tolist() for name, value in take(inputs, [2, 0]).items()} == {  # type: ignore[attr-defined]
        "input_ids": [[8, 9], [5, 6]],
        "attention_mask": [[1, 1], [1, 1]],
        "labels": [[-100], [3]],
    }
    inputs |= {"index": torch.tensor([0, 1, -1]), "source_lengths": (2, 1, 2), "target_lengths": (1, 1, 0)}
    taken = take(inputs, [1, 2])
    assert taken["index"].tolist() == [1, -1]
    assert lengths_of(taken) == ((1, 2), (1, 0))
