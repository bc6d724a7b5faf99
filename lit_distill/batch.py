"""The contract between data and modules: what one batch is.

A batch maps a task's name to that task's tensors. A task is named after what its target holds, in order: ``label``,
``rationale``, ``rationale_label`` (one target: the rationale, then the label) and ``label_rationale``.

In training a task holds only the rows that have a target for it, so a batch can hold fewer rationales than labels, or
none: that task's tensors then have no rows. In evaluation every task holds every row of the batch, in the same order;
a row without a target has only ``IGNORE_INDEX`` labels, and ``index`` says which row of the split it is (``-1`` marks
a row that only pads a distributed sampler: its labels are ignored and its predictions belong to nobody).
"""

from typing import NotRequired, TypedDict

from torch import Tensor

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


TaskBatch = dict[str, TaskInputs]
"""Task name -> that task's tensors."""


def target_tokens(inputs: TaskInputs) -> int:
    """Number of target positions that count, on whichever device they lie."""
    from_labels: Tensor = (inputs["labels"] != IGNORE_INDEX).sum()
    return int(from_labels.item())
