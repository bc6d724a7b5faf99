"""The contract between data and modules: what a batch is.

A batch maps the name of each task to its tensors. In training a task holds only rows that have a target for it, so a
batch may have fewer rationales than labels, or none. In evaluation every task holds every row of the batch, in the same
order; a row without a target has only ``IGNORE_INDEX`` labels. ``index`` is the row's position in its split, or ``-1``
for a row that pads a distributed sampler and is to be ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

IGNORE_INDEX = -100
"""Label of padding and of rows without a target; ignored in losses (PyTorch's default)."""

PADDING_ROW = -1
"""The ``index`` of a row that pads a distributed sampler."""


class TaskInputs(TypedDict):
    """One task's rows, padded to the longest."""

    input_ids: Tensor  # source token ids, `(batch, source_len)`
    attention_mask: Tensor  # 1 on source tokens, 0 on padding, `(batch, source_len)`
    labels: Tensor  # target token ids with `IGNORE_INDEX` on padding, `(batch, target_len)`
    index: NotRequired[Tensor]  # the rows' positions in their split, `(batch,)`


TaskBatch = dict[str, TaskInputs]
"""Task name -> that task's tensors."""


def target_tokens(inputs: TaskInputs) -> int:
    """Number of target positions that are not ``IGNORE_INDEX``."""
    return int((inputs["labels"] != IGNORE_INDEX).sum())


def with_target(inputs: TaskInputs) -> Tensor:
    """Which rows have a target, ``(batch,)``."""
    return (inputs["labels"] != IGNORE_INDEX).any(1)


def take(inputs: TaskInputs, rows: Sequence[int]) -> TaskInputs:
    """Select rows of a task, in this order; the padding stays."""
    chosen = torch.tensor(list(rows), dtype=torch.long, device=inputs["input_ids"].device)
    return cast(TaskInputs, {name: tensor[chosen] for name, tensor in cast(dict[str, Tensor], inputs).items()})


def join(parts: Sequence[TaskInputs]) -> TaskInputs:
    """Concatenate the rows of several batches, padded to the longest."""

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


def filler(device: torch.device) -> TaskInputs:
    """A dummy row of one source and one target token, for ranks that must run a forward without rows."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """``(sequences, length)``; at least one column, so that empty batches have a valid shape."""
    width = max([1, *map(len, sequences)])
    padded = torch.full((len(sequences), width), value, dtype=torch.long)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return padded


def pad_rows(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_token_id: int = 0) -> TaskInputs:
    """Token ids of sources and targets as a task's rows, without ``index``."""
    ids, lengths = pad(sources, pad_token_id), torch.tensor([len(source) for source in sources], dtype=torch.long)
    return {
        "input_ids": ids,
        # by length, as the padding id can be that of an ordinary token
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": pad(targets, IGNORE_INDEX),
    }


def pad_targets(targets: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Labels ``(targets, target_len)`` of token ids; of a dummy target of one token if there is none."""
    return pad(targets or [[0]], IGNORE_INDEX).to(device)


def sum_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """The sum of each row's values ``(count, ...)``, from values ``(tokens, ...)`` and the row of each."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, rows, values)


def mean_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """As `sum_rows`, the mean of each row's values; 0 for a row without any."""
    numbers = rows.bincount(minlength=count).clamp(min=1)
    return sum_rows(values, rows, count) / numbers.view(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class Rows:
    """The real positions of each row."""

    ends: tuple[int, ...]  # end of the last real position of each row; 0 if there is none
    whole: bool  # whether all padding is on the right


_HOST_COPIES = WeakTensorKeyDictionary()
"""Tensors on an accelerator -> their version when they were sent there, and the same on the host."""


def remember_rows(host: TaskBatch, moved: TaskBatch) -> None:
    """Keep a batch on the host beside its copy on an accelerator, so that `on_host` need not wait for the latter.

    Valid for these very tensors until they are written to.
    """
    for task, inputs in moved.items():
        for name, tensor in cast(dict[str, Tensor], inputs).items():
            # inference tensors do not count how often they are written to
            if tensor.device.type != "cpu" and not tensor.is_inference():
                _HOST_COPIES[tensor] = tensor._version, cast(dict[str, Tensor], host[task])[name]


def on_host(tensor: Tensor) -> Tensor:
    """A batch's tensor on the host, without waiting for an accelerator if it is remembered."""
    version, host = _HOST_COPIES.get(tensor, (None, None))
    return tensor.cpu() if host is None or version != tensor._version else host


def sources_of(inputs: TaskInputs) -> Rows:
    """The real positions of each source: up to the last 1 of its mask."""
    return _rows(inputs["attention_mask"], 0)


def targets_of(inputs: TaskInputs) -> Rows:
    """The real positions of each target: up to its last label that is not ``IGNORE_INDEX``."""
    return _rows(inputs["labels"], IGNORE_INDEX)


def _rows(tensor: Tensor, padding: int) -> Rows:
    real = on_host(tensor) != padding
    columns = torch.arange(1, real.shape[1] + 1, device=real.device)
    # a leading column of zeros, as the maximum of no columns is undefined
    ends = functional.pad(real * columns, (1, 0)).amax(dim=1)
    last, number = torch.stack([ends, real.sum(dim=1)]).tolist()
    return Rows(tuple(last), last == number)
