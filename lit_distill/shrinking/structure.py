"""Which part of a student each of its weights belongs to, along each of its axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_distill.errors import UserError
from lit_distill.students import Student
from lit_distill.students.base import Stack
from lit_distill.students.files import SEQ2SEQ

Axis = Literal["vocabulary", "d_model", "unit", "head", None]
"""``unit`` is one of a feed-forward layer; ``head`` one of keys with all of the queries that share it."""

WIDTHS = (*SEQ2SEQ, "llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the models whose width can change: their norms have no mean, and their projections are apart."""

VALUES = ("v", "v_proj")
OUTPUTS: Mapping[str, Axis] = {"o": "head", "o_proj": "head", "wo": "unit", "down_proj": "unit"}
"""The projections back to d_model, and what they read."""

_VOCABULARY: tuple[Axis, ...] = ("vocabulary", "d_model")
_AXES: Mapping[str, tuple[Axis, ...]] = {
    **dict.fromkeys(("q", "k", "v", "q_proj", "k_proj", "v_proj"), ("head", "d_model")),
    **dict.fromkeys(("wi", "wi_0", "wi_1", "gate_proj", "up_proj"), ("unit", "d_model")),
    **{name: ("d_model", axis) for name, axis in OUTPUTS.items()},
    "relative_attention_bias": (None, "head"),
}
_POSITION_BIAS = ".0.layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class Keep:
    """What stays of the layers that stay, as positions; what is not named stays whole."""

    units: Mapping[str, Tensor] = field(default_factory=dict)  # of each feed-forward layer, by its module
    heads: Mapping[str, Tensor] = field(default_factory=dict)  # of each attention, by its module
    d_model: Tensor | None = None
    vocabulary: Tensor | None = None


def sizes(config: Any) -> dict[str, int]:
    """The sizes of a model that its configuration has."""
    names = {"d_model": "hidden_size", "heads": "num_attention_heads", "heads of keys": "num_key_value_heads"}
    names |= {"d_ff": "d_ff" if hasattr(config, "d_ff") else "intermediate_size", "vocabulary": "vocab_size"}
    found = {name: getattr(config, own, None) for name, own in names.items()}
    return {name: int(size) for name, size in found.items() if size}


class Structure:
    """The weights of a student, in the layers that stay.

    T5's position biases are in the first layer of a stack, and stay whichever layers do.

    Args:
        student: without an adapter.
        layers: those of each stack that stay; by default all.
    """

    def __init__(self, student: Student, layers: Mapping[Stack, Sequence[int]] | None = None) -> None:
        self.student = student
        self.layers = layers or {}
        self.network: Any = student.network
        self.config: Any = self.network.config
        self.is_seq2seq = student.tokens.family == "seq2seq"
        self.stacks: Mapping[Stack, str] = (
            {"encoder": "encoder.block", "decoder": "decoder.block"} if self.is_seq2seq else {"decoder": self._layers()}
        )
        self.weights = {name: value for name, value in self.network.state_dict().items() if self.name(name)}
        embedding, head = self.network.get_input_embeddings(), self.network.get_output_embeddings()
        own = {id(one) for module in (embedding, head) for one in module.parameters()}
        found = self.network.state_dict(keep_vars=True).items()
        self._of_vocabulary = {name for name, value in found if id(value) in own}

    def _layers(self) -> str:
        """The name of a decoder-only model's list of layers."""
        number = self.student.layers("decoder")
        for name, module in self.network.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == number:
                return str(name)
        raise UserError(f"from: found no list of layers in a {type(self.network).__name__}")

    @property
    def groups(self) -> int:
        """Number of heads that can be kept apart: with grouped-query attention those of the keys."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def queries(self) -> int:
        """Number of heads that share their keys and values."""
        return self.student.heads // self.groups

    def check_widths(self, option: str) -> None:
        """Raise a ``UserError`` if the width of this kind of model cannot change."""
        if self.config.model_type not in WIDTHS:
            allowed = ", ".join(WIDTHS)
            raise UserError(f"{option}: the width of a {self.config.model_type!r} cannot change; allowed are {allowed}")

    def name(self, weight: str) -> str | None:
        """The name of a weight in the smaller model; ``None`` if it goes with its layer."""
        for stack, start in self.stacks.items():
            if stack in self.layers and weight.startswith(f"{start}.") and not weight.endswith(_POSITION_BIAS):
                number, _, rest = weight.removeprefix(f"{start}.").partition(".")
                kept = list(self.layers[stack])
                return f"{start}.{kept.index(int(number))}.{rest}" if int(number) in kept else None
        return weight

    def axes(self, weight: str) -> tuple[Axis, ...]:
        """What the axes of a weight count; ``None`` for what never changes."""
        shape = self.weights[weight].shape
        if weight in self._of_vocabulary:
            return _VOCABULARY[: len(shape)]
        module = owner(weight)
        name = module.rpartition(".")[2]
        if name in _AXES:
            return _AXES[name][: len(shape)]
        # of a norm, but not of those inside an attention, which are over a head
        return ("d_model",) if shape == (self.student.width,) and "attn" not in module else (None,) * len(shape)

    def norms(self) -> list[str]:
        """The modules of all norms over d_model."""
        return [owner(name) for name in self.weights if self.is_norm(name)]

    def is_norm(self, weight: str) -> bool:
        """Whether a weight is that of a norm over d_model."""
        return weight.endswith(".weight") and self.axes(weight) == ("d_model",)

    def outputs(self, axis: Axis) -> list[str]:
        """The modules of all feed-forward layers (``unit``) or attentions (``head``), by their output projection."""
        names = (owner(weight) for weight in self.weights if weight.endswith(".weight"))
        return [name for name in names if OUTPUTS.get(name.rpartition(".")[2]) == axis]


def owner(name: str) -> str:
    """The module that a projection or a weight is in."""
    return name.rpartition(".")[0]


def positions(kept: Tensor, parts: int, size: int) -> Tensor:
    """The positions, of ``size`` in all, of those parts of equal size that are kept."""
    each = size // parts
    return (kept[:, None] * each + torch.arange(each, device=kept.device)).flatten()
