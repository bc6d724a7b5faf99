"""Build, load and save Hugging Face models.

Since version 5 transformers writes ``tie_word_embeddings: true`` into every ``T5Config``, even for checkpoints with a
separate ``lm_head`` (T5 v1.1, Flan-T5). Loading such a checkpoint keeps both tensors, but a later ``tie_weights()`` or
``resize_token_embeddings()`` replaces the head by the embedding, and a model built from the configuration starts tied
and unscaled. So every T5 here is first tied or untied as its configuration *file* says, and stays so.
"""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from lit_distill.checks import check_int, check_range
from lit_distill.errors import UserError
from lit_distill.students.adapters import Adapter, add_adapter
from lit_distill.students.files import StudentRecord, check_weights, family, reading
from lit_distill.students.tokens import save_tokenizer, tokenizer_files

Dtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes of weights."""

_WEIGHT_FILES = [name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]

GGUF = "model.gguf"
"""The weights in the format of llama.cpp, which transformers reads for a T5, too."""

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_decoder_layers", "num_attention_heads",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the input embedding."""
    head: Any = model.get_output_embeddings()
    return head.weight is model.get_input_embeddings().weight


def untie(model: Any) -> None:
    """Give a T5's output head its own tensor, and keep transformers from tying it again.

    A tied head is copied, so the logits do not change.
    """
    if is_tied(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    # `tie_weights` and `resize_token_embeddings` read these two; the configuration alone is saved
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = {
        target: source for target, source in model._tied_weights_keys.items() if target != "lm_head.weight"
    }
    model.all_tied_weights_keys = dict(model._tied_weights_keys)


def build_model(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    dropout: float | None = None,
    dtype: Dtype = "float32",
    adapter: Adapter | None = None,
    meta: bool = False,
) -> PreTrainedModel:
    """A model from the content of a ``config.json``, in training mode.

    ``weights`` is the complete state dict, the adapter's included. Without it weights are random, or not allocated at
    all (``meta``); an untied T5's head is drawn from N(0, 1/d_model), so that initial logits have unit variance and the
    first loss is near ln(vocabulary).
    """
    made = _configuration(config, dropout)
    # random weights take seconds to draw
    empty = meta or weights is not None
    with torch.device("meta") if meta else nullcontext(), no_init_weights() if empty else nullcontext():
        model = _auto_class(made).from_config(made, dtype=getattr(torch, dtype))
    # left out with them
    model.tie_weights()
    if family(config) == "seq2seq" and not _says_tied(config):
        untie(model)
        if not empty:
            nn.init.normal_(model.lm_head.weight, std=made.hidden_size**-0.5)
    if adapter is not None:
        model = add_adapter(model, adapter)
    if weights is not None:
        model.load_state_dict(weights)
    return cast(PreTrainedModel, model.train())


def pretrained(
    name: str, config: Mapping[str, Any], *, dropout: float | None = None, dtype: Dtype = "float32"
) -> PreTrainedModel:
    """A model with the weights of a folder or of the hub, which must be finite, in training mode."""
    folder = Path(name)
    present = [file for file in [GGUF, *_WEIGHT_FILES] if (folder / file).is_file()]
    if folder.is_dir() and not present:
        raise UserError(
            f"student: no weights in the folder {name!r} (one of {', '.join([GGUF, *_WEIGHT_FILES])});"
            " set from_scratch to true for random weights from its configuration"
        )
    made, more = _configuration(config, dropout), {}
    if present == [GGUF]:
        import_gguf()
        more = {"gguf_file": GGUF}
    level = hf_logging.get_verbosity()
    # advice of transformers on tying, which is settled here
    hf_logging.set_verbosity_error()
    try:
        with reading("student: cannot load", name):
            settings: Any = {"config": made, "dtype": getattr(torch, dtype), "output_loading_info": True} | more
            model, found = _auto_class(made).from_pretrained(name, **settings)
            if more and (missing := found["missing_keys"]):
                raise ValueError(f"{GGUF} lacks {min(missing)}")
    finally:
        hf_logging.set_verbosity(level)
    check_weights(dict(model.named_parameters()), f"student: {name!r}")
    if family(config) == "seq2seq" and not (_says_tied(config) and is_tied(model)):
        untie(model)
    for parameter in model.parameters():
        # transformers keeps some in float32; buffers, which may be in float32 for their precision, stay as they are.
        # Copied, as a tensor inside a file's memory is not aligned, and multiplies with other rounding errors than the
        # same one in a run that is resumed from a checkpoint
        parameter.data = parameter.data.to(getattr(torch, dtype), copy=True)
    # `from_pretrained` returns evaluation mode, and a trainer would leave it so
    return cast(PreTrainedModel, model.train())


def import_gguf() -> Any:
    """The package. Raises a ``UserError`` if it, or what transformers reads its files with, is not installed."""
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise UserError(f'{missing[0]} is not installed: pip install "lit_distill[gguf]"')
    return import_module("gguf")


def check_memory(model: nn.Module) -> None:
    """Check that the weights fit into this machine's memory. Raises a ``UserError`` otherwise."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"its weights need {needed / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f} GiB of memory"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer in the Hugging Face format, with the true tying in the configuration."""
    model.save_pretrained(folder)
    save_description(true_config(model), tokenizer, folder)


def save_description(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a ``config.json`` and the tokenizer."""
    save_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def record_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> StudentRecord:
    """What a checkpoint needs for loading without the hub and the original folder."""
    return {"config": true_config(model), "tokenizer": tokenizer_files(tokenizer)}


def true_config(model: PreTrainedModel) -> dict[str, Any]:
    """The ``config.json`` with the model's actual tying."""
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    content["tie_word_embeddings"] = is_tied(model)
    return content


def _configuration(config: Mapping[str, Any], dropout: float | None) -> PreTrainedConfig:
    """A configuration of plausible sizes, which the memory bounds further, of special tokens and dropout rates."""
    # outputs are chosen at each call
    returned = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
    made: Any = AutoConfig.for_model(**dict(config) | returned)
    for size in _SIZES:
        name = made.attribute_map.get(size, size)
        if getattr(made, name, None) is not None:
            check_int(name, getattr(made, name), 1, 1000 if "layers" in size else 2**30)
    for name, value in made.to_dict().items():
        if name.endswith(("dropout", "dropout_rate", "pdrop")) and "classifier" not in name:
            setattr(made, name, value if dropout is None else dropout)
            check_range(name, getattr(made, name), at_least=0, below=1)
    if family(config) == "seq2seq":
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            check_int(name, getattr(made, name), 0, made.vocab_size - 1)
    return cast(PreTrainedConfig, made)


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _says_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))
