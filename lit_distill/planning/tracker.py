"""The memory of a computation whose floating-point tensors have shapes and no storage."""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Part = Literal["weights", "gradients", "optimizer", "activations", "logits", "teacher", "temporary"]
"""What a tensor is for; ``temporary`` are those made in the backward pass or the optimizer's step that do not stay."""

Phase = Literal["pass", "update"]
"""Forward and backward passes; and the optimizer's step, clipping included."""

_aten: Any = torch.ops.aten

_UNWRITTEN = ("empty", "empty_strided", "rand", "randn", "randint")
"""Tensors whose values nobody settles the shape of another one by."""

_SMALL = 4096
"""Elements up to which floating-point tensors that are computed from data are computed."""

_ATTENTION: Any = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
"""Operations of the attention that PyTorch's registry lacks."""


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors that live at a time, by part.

    In the context, floating-point tensors are PyTorch's fake tensors on the CPU: they take the ways of real ones
    (autocast, custom functions, attention's kernels) and hold nothing. Integers and booleans are real, since lengths
    and masks settle the shapes of others. A value that is read of a fake tensor is 0.

    Args:
        vocabulary: size of the vocabulary, which the last dimension of logits has.
    """

    # one for all, so that a module may be traced again
    _fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's
        self.phase: Phase = "pass"
        self.peaks: dict[Phase, Counter[Part]] = {"pass": Counter(), "update": Counter()}
        self._vocabulary = vocabulary
        self.flops = 0  # operations of matrix products and attention
        self.events: list[tuple[int, int]] = []  # number of an allocation and its bytes, 0 where it ends
        self._sizes: dict[int, tuple[int, Part]] = {}  # by storage
        self._numbers: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._bytes: Counter[Part] = Counter()

    def hold(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Count tensors as a part of their own, from now on."""
        for tensor in tensors:
            key = _key(tensor)
            if key not in self._sizes:
                self._add(tensor, part)
                continue
            size, before = self._sizes[key]
            self._sizes[key] = size, part
            self._bytes[before] -= size
            self._bytes[part] += size

    def living(self, part: Part) -> int:
        """Bytes of a part that live now."""
        return self._bytes[part]

    def numbers(self, *parts: Part) -> set[int]:
        """The numbers, as in `events`, of the tensors of these parts that live now."""
        return {self._numbers[key] for key, (_, part) in self._sizes.items() if part in parts}

    def give(self, module: nn.Module, part: Part) -> None:
        """Give a module fake tensors in place of its own; they count as this part."""
        made: dict[int, tuple[Tensor, Tensor]] = {}
        groups: list[dict[str, Any]] = [own for each in module.modules() for own in (each._parameters, each._buffers)]
        for tensors in groups:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    with self._fakes:
                        fake = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    # kept with the empty one, whose id would go to another
                    made[id(tensor)] = tensor, fake
                # a tied one stays tied
                tensors[name] = tensor if tensor is None else made[id(tensor)][1]
        self.hold((fake for _, fake in made.values()), part)
        # there is no other device, and fake tensors cannot be swapped
        module._apply = lambda *_, **__: module  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            # asked of fake tensors, a third of all calls
            return torch.device("cpu")
        given = dict(kwargs or {})
        tensors = _tensors((*args, *given.values()))
        found = self._run(func, args, given, tensors)
        if (attention := _ATTENTION.get(func.overloadpacket)) is not None:
            self.flops += attention(*args, **given)
        elif (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **given, out_val=found)
        for tensor in _tensors((found,)):
            if _key(tensor) not in self._sizes:
                self._add(tensor, self._part(func, tensor, tensors))
        return found

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not tensors:
            # a new tensor: real if its values may settle shapes
            with self._fakes:
                found = func(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
            settles = not found.is_floating_point() and func.overloadpacket.__name__ not in _UNWRITTEN
            return func(*args, **kwargs) if settles or found.numel() <= 1 else found
        if not fake:
            found = func(*args, **kwargs)
            if func._schema.is_mutable or not isinstance(found, Tensor) or not found.is_floating_point():
                return found
            shared = any(_key(found) == _key(tensor) for tensor in tensors)
            return found if shared or found.numel() <= _SMALL else self._fakes.from_tensor(found)
        if func is _aten._local_scalar_dense.default:
            return 0.0 if fake[0].is_floating_point() else 0
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            # a mask becomes positions, as many as are true
            args = (args[0], list(chain.from_iterable(map(_positions, args[1]))), *args[2:])
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor) and isinstance(args[0], Tensor):
            # what a fake tensor is written into has values that are unknown, and its shape
            return args[0]
        return func(*args, **kwargs)

    def _part(self, func: Any, made: Tensor, tensors: list[Tensor]) -> Part:
        if self.phase == "update":
            return "temporary"
        known = (self._sizes.get(_key(tensor)) for tensor in tensors if tensor.is_floating_point())
        parts = {each[1] for each in known if each is not None}
        if parts == {"teacher"}:
            return "teacher"
        if made.dim() > 1 and made.shape[-1] == self._vocabulary:
            return "logits"
        if parts == {"weights"} and func is _aten._to_copy.default:
            # the copies that autocast keeps
            return "weights"
        return "activations" if torch._C._current_graph_task_id() == -1 else "temporary"

    def _add(self, tensor: Tensor, part: Part) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if not storage.nbytes():
            return
        self._sizes[key] = storage.nbytes(), part
        self._numbers[key] = len(self.events)
        self.events.append((self._numbers[key], storage.nbytes()))
        self._references[key] = weakref.ref(storage, lambda _: self._free(key))
        self._bytes[part] += storage.nbytes()
        peak = self.peaks[self.phase]
        if self._bytes.total() > peak.total():
            self.peaks[self.phase] = self._bytes.copy()

    def _free(self, key: int) -> None:
        if key in self._sizes:
            size, part = self._sizes.pop(key)
            del self._references[key]
            self.events.append((self._numbers.pop(key), 0))
            self._bytes[part] -= size


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's values, which are lists at most."""
    lists = (value if isinstance(value, list | tuple) else (value,) for value in values)
    return [each for each in chain.from_iterable(lists) if isinstance(each, Tensor)]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _positions(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero().unbind(1))
