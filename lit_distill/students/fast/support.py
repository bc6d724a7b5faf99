"""Whether the fast path supports a model and a batch; all else uses the model's own forward."""

import ctypes
import sys
from collections.abc import Iterable, Sized
from functools import cache
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import MT5ForConditionalGeneration, PreTrainedModel, T5ForConditionalGeneration
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5

from lit_distill.batch import TaskInputs, sources_of

_LAYERS = (modeling_t5.__name__, modeling_mt5.__name__)
"""Where the classes are whose forward is replaced; a subclass of them is defined elsewhere."""

DTYPES = {torch.float32, torch.bfloat16}
"""Dtypes of weights: losses and softmaxes are computed in float32, so a float64 would be one in name only."""

_CALLED = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "act", "relative_attention_bias"}
"""Modules that are called, of any class: LoRA and quantised ones work."""

_EMBEDDINGS = {"shared", "embed_tokens"}


class Known:
    """A model as it was looked at: its modules, parameters and hooks, and why it cannot use the fast path."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.reason = _reason_against(model)
        modules = list(model.modules())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks: list[Sized] = [getattr(module, name) for module in modules for name in hooks]
        self._names = [vars(module) for module in modules]
        self._children = [names[kind] for names in self._names for kind in ("_modules", "_parameters")]
        # kept, so that no other object can have the identity of one of them
        self._parts = list(chain.from_iterable(map(dict.values, self._children)))
        self._parameters = list(model.parameters())
        self._seen = self._look()

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        return self._look() == self._seen

    def _look(self) -> tuple[list[int], ...]:
        parts = list(map(id, chain.from_iterable(map(dict.values, self._children))))
        # moved and converted parameters stay the same objects, with other data
        places = list(map(torch.Tensor.data_ptr, self._parameters))
        replaced = [number for number, names in enumerate(self._names) if "forward" in names]
        return parts, places, list(map(len, self._hooks)), replaced


_KNOWN: WeakKeyDictionary[PreTrainedModel, Known] = WeakKeyDictionary()


def known(model: PreTrainedModel) -> Known:
    """What is known of a model, looked at again where it has changed: a walk through it takes milliseconds."""
    found = _KNOWN.get(model)
    if found is None or not found.holds():
        found = _KNOWN[model] = Known(model)
    return found


def reason_against(model: PreTrainedModel) -> str | None:
    """Why a model cannot use the fast path; ``None`` if it can."""
    if torch.nn.modules.module._has_any_global_hook():
        return "every module has hooks"
    return known(model).reason


def _reason_against(model: PreTrainedModel) -> str | None:
    if type(model) not in (T5ForConditionalGeneration, MT5ForConditionalGeneration):
        return f"the student is a {type(model).__name__}"
    if model.dtype not in DTYPES:
        return f"the student's weights are {model.dtype}"
    for path, module in model.named_modules():
        *above, name = path.split(".")
        # transformers' activation checkpointing has hooks on the embeddings
        if name not in _EMBEDDINGS and has_hooks(module):
            return f"{path or 'the student'} has hooks"
        if path and name not in _CALLED and _CALLED.isdisjoint(above) and not _is_plain(name, module):
            return f"{path} is not what T5 has there"
    return None


def _is_plain(name: str, module: nn.Module) -> bool:
    if name == "lm_head":
        return type(module) is nn.Linear and module.bias is None
    if name in _EMBEDDINGS:
        extras = getattr(module, "padding_idx", None), getattr(module, "max_norm", None)
        return (
            type(module) is nn.Embedding and extras == (None, None) and not (module.scale_grad_by_freq or module.sparse)
        )
    return type(module) in (nn.Dropout, nn.ModuleList) or type(module).__module__ in _LAYERS


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's forward has hooks or is replaced."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    # transformers leaves its own where hidden states were asked for once
    modules = [getattr(hook, "__module__", "") for some in hooks for hook in some.values()]
    return "forward" in vars(module) or any(name != "transformers.utils.output_capturing" for name in modules)


def fits(tasks: Iterable[TaskInputs]) -> bool:
    """Whether all padding is on the right, and no source is empty."""
    for inputs in tasks:
        shape = inputs["input_ids"].shape
        if shape != inputs["attention_mask"].shape or len(inputs["labels"]) != shape[0]:
            return False
        sources = sources_of(inputs)
        if not all(sources.ends) or not sources.whole:
            return False
    return True


@cache
def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step; of the whole process, so once.

    By default it returns large blocks to the system, which must clear their pages at the next step: a tenth of a step,
    and more on a virtual machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
        for option in (-1, -3):
            mallopt(option, 2**30)
