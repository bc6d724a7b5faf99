"""The contract between data and modules: what one batch is.

A batch maps a task's name to that task's tensors. A task is named after what its target holds, in order: ``label``,
``rationale``, ``rationale_label`` (one target: the rationale, then the label) and ``label_rationale``.

In training a task holds only the rows that have a target for it, so a batch can hold fewer rationales than labels, or
none: that task's tensors then have no rows. In evaluation every task holds every row of the batch, in the same order;
a row without a target has only ``IGNORE_INDEX`` labels, and ``index`` says which row of the split it is (``-1`` marks
a row that only pads a distributed sampler: its labels are ignored and its predictions belong to nobody).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

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
    """The rows' positions in their split, ``(batch,)``."""


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
    return taken


def join(parts: Sequence[TaskInputs]) -> TaskInputs:
    """Rows of several batches as one, padded to the longest."""

    def joined(name: Literal["input_ids", "attention_mask", "labels"], value: int) -> Tensor:
        width = max(part[name].shape[1] for part in parts)
        return torch.cat([functional.pad(part[name], (0, width - part[name].shape[1]), value=value) for part in parts])

    whole: TaskInputs = {
        # any value: the mask excludes it
        "input_ids": joined("input_ids", 0),
        "attention_mask": joined("attention_mask", 0),
        "labels": joined("labels", IGNORE_INDEX),
    }
    if all("index" in part for part in parts):
        whole["index"] = torch.cat([part["index"] for part in parts])
    return whole


def filler(token: int, device: torch.device) -> TaskInputs:
    """One row of one source and one target token, for a forward that every rank has to make, though it has no rows."""
    ids = torch.full((1, 1), token, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@dataclass(frozen=True)
class Rows:
    """Where the real positions of each row are."""

    ends: tuple[int, ...]
    """Columns up to the last real one; 0 in a row of none."""
    whole: bool
    """Whether all before a row's end are real, so that padding is on the right alone."""


_HOST_COPIES = WeakTensorKeyDictionary()
"""Tensors on an accelerator -> their version when they were sent there, and the same on the host."""


def sources_of(inputs: TaskInputs) -> Rows:
    """Where each source ends: with the last 1 of its mask."""
    return _rows(inputs["attention_mask"], 0)


def targets_of(inputs: TaskInputs) -> Rows:
    """Where each target ends: with its last label that is not ``IGNORE_INDEX``."""
    return _rows(inputs["labels"], IGNORE_INDEX)


def remember_rows(host: TaskBatch, moved: TaskBatch) -> None:
    """Let `sources_of` and `targets_of` read a batch on the host instead of waiting for an accelerator.

    It is remembered for those very tensors, as long as they are not written to.
    """
    for task, inputs in moved.items():
        for name in ("attention_mask", "labels"):
            tensor = inputs[name]
            # inference tensors do not count how often they are written to
            if tensor.device.type != "cpu" and not tensor.is_inference():
                _HOST_COPIES[tensor] = tensor._version, host[task][name]


def _rows(tensor: Tensor, padding: int) -> Rows:
    version, host = _HOST_COPIES.get(tensor, (None, None))
    if host is not None and version == tensor._version:
        tensor = host
    real = tensor != padding
    columns = torch.arange(1, real.shape[1] + 1, device=real.device)
    # a column of zeros in front: the greatest of no columns is not defined
    ends = functional.pad(real * columns, (1, 0)).amax(dim=1)
    last, number = torch.stack([ends, real.sum(dim=1)]).tolist()
    return Rows(tuple(last), last == number)
