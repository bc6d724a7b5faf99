"""Adapters such as LoRA, through PEFT."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from typing import Any, Literal, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_distill.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """LoRA (Hu et al., 2022), or another adapter of PEFT inside the layers of a model."""

    r: int = 16
    """Rank."""
    alpha: float = 32
    """Updates are scaled by ``alpha / r``."""
    dropout: float = 0.0
    """Dropout rate of the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of layers or their endings; ``all-linear`` is every linear layer but the output head."""
    class_path: str | None = None
    """Import path of another PEFT configuration, such as ``peft.IA3Config``, which gets ``init_args`` alone."""
    init_args: Mapping[str, Any] | None = None
    """Further arguments of the configuration, such as ``{use_dora: true}``."""
    export: Literal["merged", "adapter"] = "merged"
    """Whether the exported student has the adapter ``merged``, or is the ``adapter`` alone."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Adapter":
        """An adapter from plain settings. Raises a ``UserError`` if a setting does not exist or is not allowed."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise UserError(f"adapter: unexpected {', '.join(unknown)}; allowed are {', '.join(known)}")
        adapter = cls(**settings)
        if adapter.export not in ("merged", "adapter"):
            raise UserError(f"adapter: export must be one of merged, adapter, got {adapter.export!r}")
        return adapter

    def same(self, other: "Adapter | None") -> bool:
        """Whether both have the same weights; ``export`` does not matter."""
        return other is not None and replace(self, export=other.export) == other

    def plain(self) -> dict[str, Any]:
        """The settings as plain types."""
        return asdict(self)

    def config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's configuration for a model. Raises a ``UserError`` if PEFT refuses the arguments."""
        kind: Any = LoraConfig
        settings: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.target_modules,
            # GPT-2's transposed matrices
            "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
        }
        if self.class_path is not None:
            module, _, name = self.class_path.rpartition(".")
            try:
                kind, settings = getattr(import_module(module), name), {}
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(f"adapter: cannot import {self.class_path!r} ({error})") from error
        settings["task_type"] = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        try:
            config = kind(**settings, **self.init_args or {})
        except (TypeError, ValueError) as error:
            raise UserError(f"adapter: {error}") from error
        if not isinstance(config, PeftConfig) or config.is_prompt_learning:
            raise UserError(
                f"adapter: {self.class_path!r} makes no adapter in a model's layers, as peft.LoraConfig does"
            )
        return config


def add_adapter(model: PreTrainedModel, adapter: Adapter, *, own_dtype: bool = True) -> PeftModel:
    """Freeze a model and add an adapter to its layers.

    Args:
        model: the model.
        adapter: the adapter's settings.
        own_dtype: keep the adapter in float32 whatever the model's dtype.

    Raises:
        UserError: a layer does not exist, or PEFT does not support it.
    """
    config = adapter.config(model)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)}
    # T5 holds its embedding's weights there, and reads them in the `embed_tokens` of encoder and decoder
    layers -= {"shared"}
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, list | set):
        missing = [one for one in sorted(targets) if not any(f".{name}".endswith(f".{one}") for name in layers)]
        if missing:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"adapter: the student has no layers named {', '.join(missing)}; it has {there}")
    try:
        with _quiet():
            return cast(PeftModel, get_peft_model(model, config, autocast_adapter_dtype=own_dtype))
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter: {' '.join(str(error).split())}") from error


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy of the model with the adapter merged into its layers."""
    with _quiet():
        return cast(PreTrainedModel, copy.deepcopy(model).merge_and_unload()).requires_grad_()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence deprecation warnings of transformers names that PEFT uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
