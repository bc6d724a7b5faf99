import torch

from lit_distill.batch import IGNORE_INDEX, target_tokens


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
