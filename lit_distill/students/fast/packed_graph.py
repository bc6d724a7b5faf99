"""What a T5 computes over packed tokens as one graph, and the numbers that it is given of a batch.

Linear layers, norms and feed-forward networks see packed tokens, attention sees rows padded to the longest. All sizes
are rounded up, so that one graph with symbolic sizes serves every batch and few sizes are ever recorded as CUDA graphs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from transformers.models.t5.modeling_t5 import T5Attention

from lit_distill.batch import IGNORE_INDEX, TaskInputs, on_host, sources_of, targets_of
from lit_distill.students.fast.functions import apply
from lit_distill.students.fast.t5 import activate

TOKENS, ROWS, POSITIONS = 64, 8, 16
"""Packed tokens, rows and padded lengths are multiples of these, at least twice (PyTorch compiles for 1 apart)."""

MOST_SCORES = 2**30
"""Attention scores of one layer at most, padding included: rows of very different lengths are better packed."""

MOST_LOGITS = 2**31
"""Logits at most, which the graph holds whole; the packed path holds one chunk of them at a time."""


class Sizes(NamedTuple):
    """What a graph is run with, in units of `ROWS`, `POSITIONS` and `TOKENS`."""

    rows: int
    source_len: int
    target_len: int
    source_tokens: int
    target_tokens: int


def round_up(number: int, unit: int, steps: int) -> int:
    """In units, at least 2: exact up to ``steps`` a doubling beyond which sizes grow by 1 / ``steps`` of a doubling."""
    units = max(2, -(-number // unit))
    step = 1 << max(0, units.bit_length() - steps.bit_length())
    return -(-units // step) * step


class Layout:
    """The lengths of all rows, sources and targets, and the sizes that they are padded to."""

    def __init__(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.sources, self.targets = tuple(sources), tuple(targets)
        self.sizes = Sizes(
            round_up(len(self.sources), ROWS, 8),
            round_up(max(self.sources), POSITIONS, 2),
            round_up(max(self.targets), POSITIONS, 2),
            round_up(sum(self.sources), TOKENS, 8),
            round_up(sum(self.targets), TOKENS, 8),
        )

    def fits(self, heads: int, vocabulary: int) -> bool:
        """Whether its attention scores and logits are of a size that one graph may hold."""
        rows, longest = self.sizes.rows * ROWS, max(self.sizes[1:3]) * POSITIONS
        return (
            rows * heads * longest**2 <= MOST_SCORES and self.sizes.target_tokens * TOKENS * vocabulary <= MOST_LOGITS
        )


@torch.no_grad()
def numbers_of(model: Any, tasks: Sequence[TaskInputs], layout: Layout) -> Tensor:
    """All that the graph reads of a batch, in one tensor, which goes to the device in one copy without waiting."""
    config, sizes = model.config, layout.sizes
    ids, inputs, labels = [], [], []
    for task in tasks:
        source, target = on_host(task["input_ids"]), on_host(task["labels"])
        ids.append(source[_real(sources_of(task).ends, source.shape[1])])
        shifted = target.roll(1, dims=1)
        shifted[:, 0] = config.decoder_start_token_id
        real = _real(targets_of(task).ends, target.shape[1])
        inputs.append(shifted[real].masked_fill_(shifted[real] == IGNORE_INDEX, config.pad_token_id))
        labels.append(target[real])
    rows, source_tokens, target_tokens = sizes.rows * ROWS, sizes.source_tokens * TOKENS, sizes.target_tokens * TOKENS
    numbers = torch.cat([
        _filled(torch.cat(ids), source_tokens, 0),
        _filled(torch.cat(inputs), target_tokens, 0),
        _filled(torch.cat(labels), target_tokens, IGNORE_INDEX),
        *_places(layout.sources, rows, sizes.source_len * POSITIONS, source_tokens),
        *_places(layout.targets, rows, sizes.target_len * POSITIONS, target_tokens),
        # a row without tokens attends to one empty position: a softmax of nothing is undefined
        _filled(torch.tensor(layout.sources), rows, 1),
    ])  # fmt: skip
    if model.device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(model.device, non_blocking=True)


def _real(ends: Sequence[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(ends)[:, None]


def _filled(tensor: Tensor, size: int, value: int) -> Tensor:
    return F.pad(tensor, (0, size - len(tensor)), value=value)


def _places(lengths: Sequence[int], rows: int, width: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The padded position of each packed token, and the packed token at each padded position; -1 for none."""
    real = _real(lengths, width)
    place = real.flatten().nonzero().squeeze(1)
    back = torch.full((rows * width,), -1)
    back[place] = torch.arange(len(place))
    return _filled(place, tokens, -1), back


@dataclass(frozen=True)
class Design:
    """What is fixed in the graph."""

    heads: int
    layers: tuple[int, int]
    """Of encoder and decoder."""
    eps: float
    gated: bool
    act: nn.Module
    buckets: tuple[int, int]
    """Of relative positions: their number, and the largest distance."""
    scale: float
    """Of the decoder's states before the output head."""
    one_embedding: bool
    dtype: torch.dtype
    """Of the attention's scores."""


class Outputs(NamedTuple):
    """What the graph computes; without inner states these lists are empty."""

    losses: Tensor  # `(target tokens,)`, in float32; 0 where there is no label
    encoder: list[Tensor]
    decoder: list[Tensor]


class _Spread(Function):
    """Packed ``(tokens, parts * heads * d_kv)`` to ``parts`` tensors ``(rows, heads, length, d_kv)``; see `_Places`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: "_Places", parts: int, heads: int) -> tuple[Tensor, ...]:
        ctx.places = places
        return _by_head(_taken(x, places.tokens), places.shape, parts, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # each gathered by itself, so that one kernel writes all of them
        return torch.cat([_taken(_by_token(grad), ctx.places.slots) for grad in grads], dim=1), None, None, None


class _Gather(Function):
    """``(rows, heads, length, d_kv)`` back to ``(tokens, heads * d_kv)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: "_Places") -> Tensor:
        ctx.places, ctx.heads = places, x.shape[1]
        return _taken(_by_token(x), places.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _by_head(_taken(grad, ctx.places.tokens), ctx.places.shape, 1, ctx.heads)[0], None


def _by_head(padded: Tensor, shape: tuple[int, int], parts: int, heads: int) -> tuple[Tensor, ...]:
    return padded.view(*shape, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _by_token(x: Tensor) -> Tensor:
    rows, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(rows * length, heads * size)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Rows of ``x`` ``(n, size)`` at these places, zeros for -1."""
    return torch.where(places[:, None] >= 0, x.index_select(0, places.clamp(min=0)), 0.0)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(weight.dtype)


def _dropout(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate else x


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)


class _Places(NamedTuple):
    """Packed tokens and their padded places; see `_places`."""

    slots: Tensor
    tokens: Tensor
    shape: tuple[int, int]


def compute(
    design: Design, weights: Sequence[Tensor], numbers: Tensor, sizes: Tensor, rate: float, states: bool
) -> Outputs:
    """The whole T5 and its cross-entropy.

    Args:
        design: what is fixed.
        weights: of `Weights.current`.
        numbers: of `numbers_of`.
        sizes: any tensor whose shape is the `Sizes`.
        rate: of dropout.
        states: whether all layers' states are returned.
    """
    rows = sizes.shape[0] * ROWS
    source_len, target_len = sizes.shape[1] * POSITIONS, sizes.shape[2] * POSITIONS
    source_tokens, target_tokens = sizes.shape[3] * TOKENS, sizes.shape[4] * TOKENS
    source_ids, target_ids, labels, source_slots, source_at, target_slots, target_at, lengths = numbers.split([
        source_tokens, target_tokens, target_tokens, source_tokens, rows * source_len, target_tokens, rows * target_len,
        rows,
    ])  # fmt: skip
    sources = _Places(source_slots, source_at, (rows, source_len))
    targets = _Places(target_slots, target_at, (rows, target_len))
    weight = iter(weights)
    embedding, other = next(weight), next(weight)
    if design.one_embedding:
        # one look-up: its gradient is as large as the vocabulary
        both = F.embedding(torch.cat([source_ids, target_ids]), embedding)
        source, target = both.split([source_tokens, target_tokens])
    else:
        source, target = F.embedding(source_ids, embedding), F.embedding(target_ids, other)
    hidden = torch.arange(source_len, device=numbers.device) >= lengths[:, None]
    mask = torch.zeros_like(hidden, dtype=design.dtype).masked_fill(hidden, -torch.inf)[:, None, None]

    bias = _position_bias(design, next(weight), source_len, bidirectional=True) + mask
    encoded = _stack(design, weight, source, rate, design.layers[0], (sources, bias), None)
    own = torch.ones(target_len, target_len, dtype=torch.bool, device=numbers.device).triu(1)
    bias = _position_bias(design, next(weight), target_len, bidirectional=False).masked_fill(own, -torch.inf)
    cross = sources, mask.expand(-1, design.heads, target_len, -1), encoded[-1]
    decoded = _stack(design, weight, target, rate, design.layers[1], (targets, bias), cross)
    logits = _linear(decoded[-1] * design.scale if design.scale != 1 else decoded[-1], next(weight))
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return Outputs(losses, encoded, decoded) if states else Outputs(losses, [], [])


def _position_bias(design: Design, weight: Tensor, length: int, *, bidirectional: bool) -> Tensor:
    """``(1, heads, length, length)``, as `T5Attention.compute_bias`."""
    position = torch.arange(length, device=weight.device)
    number, distance = design.buckets
    bucket = T5Attention._relative_position_bucket(position - position[:, None], bidirectional, number, distance)
    return F.embedding(bucket, weight).permute(2, 0, 1).unsqueeze(0).to(design.dtype)


def _stack(
    design: Design,
    weight: Iterator[Tensor],
    x: Tensor,
    rate: float,
    layers: int,
    own: tuple[_Places, Tensor],
    cross: tuple[_Places, Tensor, Tensor] | None,
) -> list[Tensor]:
    """See `lit_distill.students.fast.t5`; ``cross`` are the sources, their mask and their states."""
    places, bias = own
    heads, eps = design.heads, design.eps
    x = _dropout(x, rate)
    hidden = []
    for _ in range(layers):
        hidden.append(x)
        q, k, v = apply(_Spread, _linear(_norm(x, next(weight), eps), next(weight)), places, 3, heads)
        x = x + _dropout(_linear(apply(_Gather, _attention(q, k, v, bias, rate), places), next(weight)), rate)
        if cross is not None:
            sources, mask, states = cross
            (q,) = apply(_Spread, _linear(_norm(x, next(weight), eps), next(weight)), places, 1, heads)
            k, v = apply(_Spread, _linear(states, next(weight)), sources, 2, heads)
            x = x + _dropout(_linear(apply(_Gather, _attention(q, k, v, mask, rate), places), next(weight)), rate)
        inner = _linear(_norm(x, next(weight), eps), next(weight))
        if design.gated:
            rising, gate = inner.chunk(2, dim=-1)
            inner = activate(design.act, rising) * gate
        else:
            inner = activate(design.act, inner)
        x = x + _dropout(_linear(_dropout(inner, rate), next(weight)), rate)
    return [*hidden, _dropout(_norm(x, next(weight), eps), rate)]


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rate: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, scale=1.0)
