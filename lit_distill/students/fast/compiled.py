"""A T5 as one compiled graph over packed tokens: few kernels, and nothing on the host but the lengths.

Linear layers, norms and feed-forward networks see packed tokens, attention sees rows padded to the longest. All sizes
are rounded up, so that one graph with symbolic sizes serves every batch and few sizes are ever recorded as CUDA graphs.
The model keeps its modules, weights and names; the graph reads copies of its weights in the dtype of the products, in
which projections of the same input lie side by side.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx.experimental import _config
from transformers.models.t5.modeling_t5 import T5Attention

from lit_distill.batch import IGNORE_INDEX, TaskInputs, on_host, sources_of, targets_of
from lit_distill.students.fast.functions import apply
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.support import Known, has_hooks, known
from lit_distill.students.fast.t5 import Encoded, activate, into_head

TOKENS, ROWS, POSITIONS = 64, 8, 16
"""Packed tokens, rows and padded lengths are multiples of these, at least twice (PyTorch compiles for 1 apart)."""

PROJECTIONS = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"}
"""Modules whose weights the graph reads in their place."""

MODES = {"cuda": "reduce-overhead"}
"""Device -> the mode of ``torch.compile`` where it is not the default."""

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


# ------------------------------------------------------------------------------------------------ the weights


class Weights:
    """A model's weights as the graph reads them.

    Matrices are in the dtype of the products, and those of the same input side by side.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self.groups: list[list[nn.Parameter]] = []
        self.tensors: list[Tensor] = []
        for linear, parameters in _weights(model):
            wanted = dtype if linear and dtype is not None else parameters[0].dtype
            self.groups.append(parameters)
            own = parameters[0].data
            if len(parameters) > 1 or own.dtype != wanted:
                own = own.new_empty(sum(map(len, parameters)), *own.shape[1:], dtype=wanted)
            # at the same place in every step, so that a CUDA graph need not copy it
            torch._dynamo.mark_static_address(own, guard=False)
            self.tensors.append(own)
        self._copies = [
            (part, parameter)
            for own, parameters in zip(self.tensors, self.groups, strict=True)
            if own.data_ptr() != parameters[0].data_ptr()
            for part, parameter in zip(own.split([len(p) for p in parameters]), parameters, strict=True)
        ]
        self.parameters = [parameter for parameters in self.groups for parameter in parameters]

    def current(self) -> list[Tensor]:
        """The weights as they are now, connected to the model's parameters."""
        return list(apply(_Copied, self, *self.parameters))

    def refresh(self) -> None:
        """Copy the parameters in a few kernels; always, as whoever changes one need not tell."""
        if self._copies:
            torch._foreach_copy_([part for part, _ in self._copies], [parameter for _, parameter in self._copies])


def _weights(model: Any) -> Iterator[tuple[bool, list[nn.Parameter]]]:
    """Groups of parameters in the order in which the graph reads them, and whether they are of linear layers."""
    yield False, [model.encoder.embed_tokens.weight]
    yield False, [model.decoder.embed_tokens.weight]
    for stack in (model.encoder, model.decoder):
        yield False, [stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight]
        for block in stack.block:
            own, *cross, feed = block.layer
            yield False, [own.layer_norm.weight]
            attention = own.SelfAttention
            yield True, [attention.q.weight, attention.k.weight, attention.v.weight]
            yield True, [attention.o.weight]
            for layer in cross:
                yield False, [layer.layer_norm.weight]
                attention = layer.EncDecAttention
                yield True, [attention.q.weight]
                yield True, [attention.k.weight, attention.v.weight]
                yield True, [attention.o.weight]
            yield False, [feed.layer_norm.weight]
            network = feed.DenseReluDense
            rising = (network.wi_0, network.wi_1) if hasattr(network, "wi_1") else (network.wi,)
            yield True, [linear.weight for linear in rising]
            yield True, [network.wo.weight]
        yield False, [stack.final_layer_norm.weight]
    yield True, [model.lm_head.weight]


class _Copied(Function):
    @staticmethod
    def forward(ctx: Any, weights: Weights, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        weights.refresh()
        ctx.weights = weights
        # not the same objects: several passes of a step read them, and each has its own graph
        given = tuple(tensor.data for tensor in weights.tensors)
        frozen = [
            tensor
            for tensor, own in zip(given, weights.groups, strict=True)
            if not any(parameter.requires_grad for parameter in own)
        ]
        ctx.mark_non_differentiable(*frozen)
        # what no loss reads has no gradient, rather than one of zeros
        ctx.set_materialize_grads(False)
        return given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None]
        source, into = [], []
        for grad, own in zip(grads, ctx.weights.groups, strict=True):
            parts = [None] * len(own) if grad is None else grad.split([len(parameter) for parameter in own])
            for part, parameter in zip(parts, own, strict=True):
                if part is None or not parameter.requires_grad:
                    found.append(None)
                elif part.is_cuda or part.dtype != parameter.dtype:
                    # the next replay of a CUDA graph overwrites its results
                    found.append(torch.empty_like(parameter))
                    source.append(part)
                    into.append(found[-1])
                else:
                    found.append(part)
        if into:
            torch._foreach_copy_(cast(list[Tensor], into), source)
        return tuple(found)


# ------------------------------------------------------------------------------------------------ the graph


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


# ------------------------------------------------------------------------------------------------ running it


class Program:
    """A model's graph, as long as the model stays as it is."""

    def __init__(self, model: Any) -> None:
        self._weights: dict[torch.dtype | None, Weights] = {}
        first = model.encoder.block[0].layer
        network, attention, config = first[-1].DenseReluDense, first[0].SelfAttention, model.config
        self._dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout | T5Attention)]
        self._design = Design(
            heads=config.num_heads,
            layers=(len(model.encoder.block), len(model.decoder.block)),
            eps=first[0].layer_norm.variance_epsilon,
            gated=hasattr(network, "wi_1"),
            act=network.act,
            buckets=(attention.relative_attention_num_buckets, attention.relative_attention_max_distance),
            scale=into_head(model, torch.ones(())).item(),
            one_embedding=model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight,
            dtype=model.dtype,
        )
        self.reason = self._reason_against(model)

    def _reason_against(self, model: Any) -> str | None:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            return "activation checkpointing is on"
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in PROJECTIONS and (type(module) is not nn.Linear or module.bias is not None):
                return f"{path} is a {type(module).__name__}, not torch's own without a bias"
            if isinstance(module, nn.Embedding) and has_hooks(module):
                return f"{path} has hooks"
        return None

    @property
    def rates(self) -> set[float]:
        """The rates of dropout in all places."""
        return {
            float(module.p if isinstance(module, nn.Dropout) else module.dropout) if module.training else 0.0
            for module in self._dropouts
        }

    def __call__(self, model: Any, numbers: Tensor, sizes: Sizes, *, states: bool) -> Outputs:
        """The graph's outputs for a batch of these numbers and sizes."""
        device, (rate,) = numbers.device.type, self.rates
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype not in self._weights:
            # a validation comes first, whose tensors no gradient may know
            with torch.inference_mode(False):
                self._weights[dtype] = Weights(model, dtype)
        design = replace(self._design, dtype=dtype or self._design.dtype)
        # a shape alone reaches the graph as symbols
        shape = numbers[:1].view(1, 1, 1, 1, 1).expand(sizes)
        for dimension in range(len(sizes)):
            torch._dynamo.maybe_mark_dynamic(shape, dimension)
        torch._dynamo.maybe_mark_dynamic(numbers, 0)
        # sizes that are equal by chance are not equal for ever
        with torch.autocast(device, enabled=False), _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return graph(device)(design, self._weights[dtype].current(), numbers, shape, rate, states)


_PROGRAMS: weakref.WeakKeyDictionary[Known, Program] = weakref.WeakKeyDictionary()


def _program(model: Any) -> Program:
    found = known(model)
    if found not in _PROGRAMS:
        _PROGRAMS[found] = Program(model)
    return _PROGRAMS[found]


def reason_against(model: Any, tasks: Sequence[TaskInputs]) -> str | None:
    """Why a model and a batch, which the packed path supports, have no graph; ``None`` if they have one."""
    program = _program(model)
    if program.reason is not None:
        return program.reason
    if len(program.rates) > 1:
        return "its layers have several rates of dropout"
    if not _layout(tasks).fits(model.config.num_heads, model.config.vocab_size):
        return "for a batch, its rows are too long or too many for one graph"
    return why_not_compiled(model.device.type)


def _layout(tasks: Sequence[TaskInputs]) -> Layout:
    return Layout(
        [length for task in tasks for length in sources_of(task).ends],
        [length for task in tasks for length in targets_of(task).ends],
    )


def run(model: Any, tasks: Sequence[TaskInputs], *, states: bool) -> tuple[Encoded, list[Tensor], Tensor, Tensor]:
    """As `encode_and_decode`, and the loss of each target token, ``(target tokens,)``.

    Args:
        model: a T5.
        tasks: their rows.
        states: whether any states are returned.
    """
    layout = _layout(tasks)
    numbers = numbers_of(model, tasks, layout)
    losses, encoder, decoder = _program(model)(model, numbers, layout.sizes, states=states)
    sources, targets = sum(layout.sources), sum(layout.targets)
    first = layout.sizes.source_tokens * TOKENS + layout.sizes.target_tokens * TOKENS
    encoder, decoder = [one[:sources] for one in encoder], [one[:targets] for one in decoder]
    if not torch.is_grad_enabled() and numbers.is_cuda:
        # the next replay of any CUDA graph overwrites them; with gradients PyTorch knows that they are needed
        encoder, decoder, losses = [x.clone() for x in encoder], [x.clone() for x in decoder], losses.clone()
    packing = Packing(layout.sources, numbers.device)
    return Encoded(encoder, packing), decoder, numbers[first : first + targets], losses[:targets]


@cache
def graph(device: str) -> Callable[..., Outputs]:
    """`compute`, compiled for a kind of device at its first call; on a GPU with a CUDA graph for each of the sizes."""
    # training and evaluation, with states and without, for each of a process's students
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # a recording for each of the sizes is meant
    torch._inductor.config.triton.cudagraph_dynamic_shape_warn_limit = None
    return cast(Callable[..., Outputs], torch.compile(compute, fullgraph=True, mode=MODES.get(device)))


def free() -> None:
    """Free all graphs and what they hold: for a run that takes another path after trying them."""
    _PROGRAMS.clear()
    graph.cache_clear()
    torch._dynamo.reset()


@cache
def why_not_compiled(device: str) -> str | None:
    """Why nothing can be compiled for a kind of device here, by trying; ``None`` if it can."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.ones(16, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return f"nothing can be compiled here: {' '.join(str(error).split())[:200]}"
    return None
