"""The contract between data and modules: what one batch is.

A batch maps a task's name to that task's tensors. A task is named after what its target holds, in order: ``label``,
``rationale``, ``rationale_label`` (one target: the rationale, then the label) and ``label_rationale``.

In training a task holds only the rows that have a target for it, so a batch can hold fewer rationales than labels, or
none: that task's tensors then have no rows. In evaluation every task holds every row of the batch, in the same order;
a row without a target has only ``IGNORE_INDEX`` labels, and ``index`` says which row of the split it is (``-1`` marks
a row that only pads a distributed sampler: its labels are ignored and its predictions belong to nobody).
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
"""Target positions with this id do not count: padding, and rows without a target (PyTorch's own default)."""

PADDING_ROW = -1
"""The ``index`` of a row that is there only so that all ranks have as many rows."""


class TaskInputs(TypedDict):
    """One task's rows, padded to the longest of them."""

    input_ids: Tensor
    """Source token ids, ``(batch, source_len)``."""
    attention_mask: Tensor
    """1 on source tokens, 0 on padding, ``(batch, source_len)``."""
    labels: Tensor
    """Target token ids with ``IGNORE_INDEX`` on padding, ``(batch, target_len)``."""
    index: NotRequired[Tensor]
    """Evaluation only: the rows' positions in their split, ``(batch,)``."""
    source_lengths: NotRequired[tuple[int, ...]]
    """Tokens of each row's source, which padding follows on the right; on the host, so that nothing has to ask the
    device for them. Absent where somebody else made the batch: see `lengths_of`."""
    target_lengths: NotRequired[tuple[int, ...]]
    """Likewise of each row's target; 0 for a row without one."""


TaskBatch = dict[str, TaskInputs]
"""Task name -> that task's tensors."""


def target_tokens(inputs: TaskInputs) -> int:
    """Number of target positions that count, on whichever device they lie."""
    from_labels: Tensor = (inputs["labels"] != IGNORE_INDEX).sum()
    return int(from_labels.item())


def take(inputs: TaskInputs, rows: Sequence[int]) -> TaskInputs:
    """These rows of a task, in this order, padded as they were."""
    chosen = torch.tensor(list(rows), device=inputs["input_ids"].device)
    taken: TaskInputs = {
        "input_ids": inputs["input_ids"][chosen],
        "attention_mask": inputs["attention_mask"][chosen],
        "labels": inputs["labels"][chosen],
    }
    if "index" in inputs:
        taken["index"] = inputs["index"][chosen]
    if "source_lengths" in inputs:
        taken["source_lengths"] = tuple(inputs["source_lengths"][row] for row in rows)
    if "target_lengths" in inputs:
        taken["target_lengths"] = tuple(inputs["target_lengths"][row] for row in rows)
    return taken


def lengths_of(inputs: TaskInputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of each row's source and of each row's target, padding on the right left out.

    What the collator wrote down is taken as it is. Where that is absent, the tensors are read, which waits for their
    device: a source ends with the last 1 of its mask, a target with its last label that is not ``IGNORE_INDEX``.
    """
    if "source_lengths" in inputs and "target_lengths" in inputs:
        # older releases of PyTorch pin a tuple as a list
        return tuple(inputs["source_lengths"]), tuple(inputs["target_lengths"])
    return _ends(inputs["attention_mask"] != 0), _ends(inputs["labels"] != IGNORE_INDEX)


def _ends(real: Tensor) -> tuple[int, ...]:
    """How many columns there are up to the last real one of each row; 0 in a row of none."""
    columns = torch.arange(1, real.shape[1] + 1, device=real.device)
    # a column of zeros in front: the greatest of no columns is not defined
    return tuple(functional.pad(real * columns, (1, 0)).amax(dim=1).tolist())
