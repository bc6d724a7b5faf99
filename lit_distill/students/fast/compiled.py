"""A T5 as one compiled graph over packed tokens: few kernels, and nothing on the host but the lengths.

The model keeps its modules, weights and names; the graph reads copies of its weights in the dtype of the products, in
which projections of the same input lie side by side.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx.experimental import _config
from transformers.models.t5.modeling_t5 import T5Attention

from lit_distill.batch import TaskInputs, sources_of, targets_of
from lit_distill.students.fast.functions import apply
from lit_distill.students.fast.packed_graph import TOKENS, Design, Layout, Outputs, Sizes, compute, numbers_of
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.support import Known, has_hooks, known
from lit_distill.students.fast.t5 import Encoded, into_head

PROJECTIONS = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"}
"""Modules whose weights the graph reads in their place."""

MODES = {"cuda": "reduce-overhead"}
"""Device -> the mode of ``torch.compile`` where it is not the default."""


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
