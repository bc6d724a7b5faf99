"""Adapters such as LoRA, through PEFT."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pkgutil import resolve_name
from typing import Any, Literal, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_distill.checks import check_choice
from lit_distill.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """LoRA (Hu et al., 2022), or another adapter of PEFT inside the layers of a model."""

    r: int = 16  # rank
    alpha: float = 32  # updates are scaled by `alpha / r`
    dropout: float = 0.0  # dropout rate of the adapter's input
    target_modules: str | list[str] = "all-linear"  # names of layers or their endings; all but the output head
    class_path: str | None = None  # another configuration, such as `peft.IA3Config`, which gets `init_args` alone
    init_args: Mapping[str, Any] | None = None  # further arguments of the configuration, such as `{use_dora: true}`
    export: Literal["merged", "adapter"] = "merged"  # save the student with the adapter merged, or the adapter alone

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Adapter":
        """An adapter from plain settings. Raises a ``UserError`` if a setting does not exist or is not allowed."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise UserError(f"adapter: unexpected {', '.join(unknown)}; allowed are {', '.join(known)}")
        adapter = cls(**settings)
        check_choice("adapter: export", adapter.export, ("merged", "adapter"))
        return adapter

    def trained(self) -> dict[str, Any]:
        """The settings on which its weights depend, as plain types."""
        return {name: value for name, value in asdict(self).items() if name != "export"}

    def config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's configuration for a model."""
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
            try:
                kind, settings = resolve_name(self.class_path), {}
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"cannot import {self.class_path!r} ({error})") from error
        settings["task_type"] = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        config = kind(**settings, **self.init_args or {})
        if not isinstance(config, PeftConfig) or config.is_prompt_learning:
            raise ValueError(f"{self.class_path!r} makes no adapter in a model's layers, as peft.LoraConfig does")
        return config


def add_adapter(model: PreTrainedModel, adapter: Adapter, *, own_dtype: bool = True) -> PeftModel:
    """Freeze a model and add an adapter to its layers, in float32 whatever the model's dtype if ``own_dtype``.

    Raises a ``UserError`` if a layer does not exist, or PEFT refuses the layers or the adapter's arguments.
    """
    try:
        config = adapter.config(model)
        _check_layers(model, getattr(config, "target_modules", None))
        # of transformers' names that PEFT uses
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return cast(PeftModel, get_peft_model(model, config, autocast_adapter_dtype=own_dtype))
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter: {' '.join(str(error).split())}") from error


def _check_layers(model: PreTrainedModel, targets: object) -> None:
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)}
    # T5 holds its embedding's weights there, and reads them in the `embed_tokens` of encoder and decoder
    layers -= {"shared"}
    if isinstance(targets, list | set):
        missing = [one for one in sorted(targets) if not any(f".{name}".endswith(f".{one}") for name in layers)]
        if missing:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(f"the student has no layers named {', '.join(missing)}; it has {there}")


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy of the model with the adapter merged into its layers."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return cast(PreTrainedModel, copy.deepcopy(model).merge_and_unload()).requires_grad_()
