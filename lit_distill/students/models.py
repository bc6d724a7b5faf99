"""Build, load, keep and save a T5 student with its tokenizer.

Since version 5 transformers writes ``tie_word_embeddings: true`` into every ``T5Config``, also that of checkpoints
whose ``lm_head`` is a tensor of its own (T5 v1.1, Flan-T5). Loading such a checkpoint keeps both tensors, but any later
``tie_weights()`` or ``resize_token_embeddings()`` replaces the head by the embedding, and a student built from its
configuration starts tied and unscaled. Everything that makes a student here therefore settles the tying first, from the
configuration *file*, and leaves a model that stays as it is.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from lit_distill.checks import check_int, check_range
from lit_distill.errors import UserError
from lit_distill.shipped import shipped

CHECKPOINT_KEY = "lit_distill_student"
"""Where a Lightning checkpoint keeps the student's configuration and tokenizer."""

STUDENT_PREFIX = "student."
"""What the student's parameters are called in a module's state dict."""

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


_SIZES = {
    "vocab_size": 2**24,
    "d_model": 2**20,
    "d_kv": 2**20,
    "d_ff": 2**20,
    "num_layers": 1000,
    "num_decoder_layers": 1000,
    "num_heads": 2**16,
    "relative_attention_num_buckets": 2**16,
    "relative_attention_max_distance": 2**30,
}
"""Of a configuration: the greatest that is not taken for a mistake."""


class StudentRecord(TypedDict):
    """What rebuilds a student beside its weights; plain types and tensors, so that ``weights_only=True`` reads it."""

    config: dict[str, Any]
    """The configuration, with the true ``tie_word_embeddings``."""
    tokenizer: dict[str, Tensor]
    """The tokenizer's files: name -> content as bytes, ``(size,)``, uint8."""


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the input embedding itself."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def untie(model: T5ForConditionalGeneration) -> None:
    """Give the output head a tensor of its own, and keep transformers from tying it again.

    A head that was tied is copied, so the logits stay as they are.
    """
    if is_tied(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    # `tie_weights` and `resize_token_embeddings` read these two; the configuration alone is saved
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = {
        target: source for target, source in model._tied_weights_keys.items() if target != "lm_head.weight"
    }
    model.all_tied_weights_keys = dict(model._tied_weights_keys)


def build_student(config: Mapping[str, Any], *, dropout: float | None = None) -> T5ForConditionalGeneration:
    """A student with random weights from the content of a ``config.json``.

    An untied head is drawn from N(0, 1/d_model), so that logits of normalised hidden states start with unit variance
    and the first loss is near ln(vocabulary).

    Args:
        config: the file's content; its ``tie_word_embeddings`` is honoured.
        dropout: dropout rate in place of the configuration's.
    """
    model = T5ForConditionalGeneration(_t5_config(config, dropout))
    if not _says_tied(config):
        untie(model)
        with torch.no_grad():
            model.lm_head.weight.normal_(mean=0.0, std=model.config.d_model**-0.5)
    return model


def restore_student(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], *, dropout: float | None = None
) -> T5ForConditionalGeneration:
    """A student with these weights, every one of them; random ones, which take seconds to draw, never are.

    Args:
        config: the content of a ``config.json``; its ``tie_word_embeddings`` is honoured.
        weights: the student's state dict.
        dropout: dropout rate in place of the configuration's.
    """
    with no_init_weights():
        model = T5ForConditionalGeneration(_t5_config(config, dropout))
    # among what was left out above
    model.tie_weights()
    if not _says_tied(config):
        untie(model)
    model.load_state_dict(weights)
    return model


def _t5_config(config: Mapping[str, Any], dropout: float | None) -> T5Config:
    """The configuration of a model that can be built, and that this machine's memory holds."""
    made = T5Config.from_dict(dict(config) | _settings(dropout))
    for name, most in _SIZES.items():
        check_int(name, getattr(made, name), 1, most)
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        check_int(name, getattr(made, name), 0, made.vocab_size - 1)
    check_range("dropout_rate", made.dropout_rate, at_least=0, below=1)
    attention, feed_forward = 4 * made.d_model * made.d_kv * made.num_heads, 2 * made.d_model * made.d_ff
    layers = made.num_layers * (attention + feed_forward) + (made.num_decoder_layers or 0) * (
        2 * attention + feed_forward
    )
    needed = 4 * (made.vocab_size * made.d_model + layers)
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        raise UserError(f"its weights need {needed / 2**30:.0f} GiB, this machine has {held / 2**30:.0f} GiB of memory")
    return made


def _settings(dropout: float | None) -> dict[str, Any]:
    """What a configuration says is replaced: the dropout rate, and what a forward pass returns unless its call says."""
    returned = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
    return returned | ({} if dropout is None else {"dropout_rate": dropout})


def _says_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def true_config(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration as a ``config.json`` should say it: with the tying that the model has."""
    content: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    content["tie_word_embeddings"] = is_tied(model)
    return content


def read_config(student: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a student's ``config.json`` (a hub name or a folder), or the one kept in a checkpoint file.

    Raises:
        UserError: there is none, or it is not a T5's.
    """
    name = shipped(os.fspath(student))
    if _is_checkpoint(name):
        content = dict(_read_record(name)["config"])
    else:
        with _reading("student: cannot read a configuration from", name):
            content, _ = T5Config.get_config_dict(name)
    if not content or not isinstance(content, dict):
        raise UserError(f"student: the config.json of {name!r} is absent, empty or no object{_hint(name)}")
    if content.get("model_type") != "t5":
        raise UserError(
            f"student: {name!r} is a {content.get('model_type')!r} model; allowed is a T5 (model_type 't5')"
        )
    return content


def load_student(
    student: str | os.PathLike[str], *, from_scratch: bool = False, dropout: float | None = None
) -> T5ForConditionalGeneration:
    """A student by name, in float32 and in training mode.

    Args:
        student: a hub name, a folder in the Hugging Face format, a folder with a configuration only (then
            ``from_scratch`` has to be set), or a checkpoint file of this framework.
        from_scratch: random weights from the configuration.
        dropout: dropout rate in place of the configuration's.

    Raises:
        UserError: the student cannot be read, is not a T5, has weights that are not finite, or none and
            ``from_scratch`` is not set.
    """
    name = shipped(os.fspath(student))
    config = read_config(name)
    with _reading("student: the configuration makes no T5 in", name):
        _t5_config(config, dropout)
        if from_scratch:
            return build_student(config, dropout=dropout)
    if _is_checkpoint(name):
        weights = student_weights(_read_checkpoint(name)["state_dict"])
        check_weights(weights, f"student: {name!r}")
        with _reading("student: the weights do not fit the configuration in", name):
            return restore_student(config, weights, dropout=dropout)
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _WEIGHT_FILES):
        raise UserError(
            f"student: no weights in the folder {name!r} (one of {', '.join(_WEIGHT_FILES)});"
            " set from_scratch to true for random weights from its configuration"
        )
    with _reading("student: cannot load", name), _quiet_loading():
        model = T5ForConditionalGeneration.from_pretrained(name, **_settings(dropout))
    # as of a student from a checkpoint: how it generates is said by the arguments alone
    model.generation_config = GenerationConfig.from_model_config(model.config)
    check_weights(dict(model.named_parameters()), f"student: {name!r}")
    if not _says_tied(config) or not is_tied(model):
        untie(model)
    # `from_pretrained` returns it in evaluation mode, in which a trainer leaves it: without dropout
    return cast(T5ForConditionalGeneration, model.float().train())


def load_tokenizer(student: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a student: from the hub, a folder or a checkpoint file.

    Raises:
        UserError: there is none.
    """
    name = shipped(os.fspath(student))
    if _is_checkpoint(name):
        record = _read_record(name)
        with _reading("tokenizer: cannot load the one in", name):
            return _usable(restore_tokenizer(record))
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        # transformers would make an empty one from the configuration's `model_type`
        raise UserError(f"tokenizer: none in the folder {name!r} (one of {', '.join(_TOKENIZER_FILES)})")
    with _reading("tokenizer: cannot load one from", name):
        return _usable(AutoTokenizer.from_pretrained(name, trust_remote_code=False))


def _usable(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that makes ids of a text and knows how a target ends; of a damaged one the first row would tell."""
    tokenizer(["a"], verbose=True)
    if tokenizer.eos_token_id is None:
        raise UserError("it has no end-of-sequence token")
    return tokenizer


def record_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> StudentRecord:
    """What a checkpoint keeps so that it can be loaded without the hub and without the original folder."""
    with tempfile.TemporaryDirectory() as folder:
        _save_tokenizer(tokenizer, Path(folder))
        files = {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.stat().st_size
        }
    return {"config": true_config(model), "tokenizer": files}


def restore_tokenizer(record: StudentRecord) -> PreTrainedTokenizerBase:
    """The tokenizer that a checkpoint keeps."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in record["tokenizer"].items():
            # a checkpoint is a file from elsewhere: a name in it must not lead out of the folder
            (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        _keep_sentencepiece(tokenizer)
        return tokenizer


def student_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's part of a module's state dict, under the student's own names."""
    return {
        name.removeprefix(STUDENT_PREFIX): tensor
        for name, tensor in state_dict.items()
        if name.startswith(STUDENT_PREFIX)
    }


def save_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a student in the Hugging Face format; the configuration states the true tying."""
    model.save_pretrained(folder)
    _save_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(true_config(model), indent=2, sort_keys=True) + "\n")


def check_weights(weights: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are not finite.

    Args:
        weights: tensors by name; those of integers are left out.
        name: whose they are, for the message.

    Raises:
        UserError: names the first of them.
    """
    floating = {key: weight for key, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    # the largest magnitude overflows nowhere, and all tensors are asked at once
    if torch.nn.utils.get_total_norm(list(floating.values()), norm_type=float("inf")).isfinite():
        return
    bad = [key for key, weight in floating.items() if not weight.isfinite().all()]
    raise UserError(f"{name}: {len(bad)} of {len(floating)} weights are not finite, the first is {bad[0]}")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer so that transformers 4 reads it as well as 5.

    Version 5 writes names that 4 does not know, reads those of 4, and leaves out the SentencePiece model that the
    tokenizer came from, which slow tokenizers of 4 and other programs need.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        content.pop(name, None)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    # a tokenizer of no family gives `token_type_ids` as well in version 4, which a T5 refuses
    content["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    _keep_sentencepiece(tokenizer)
    if (sentencepiece := getattr(tokenizer, "_sentencepiece", None)) is not None:
        (folder / "spiece.model").write_bytes(sentencepiece)


def _keep_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> None:
    """Read a tokenizer's SentencePiece model into it, as the folder that it was loaded from may go."""
    path = Path(getattr(tokenizer, "vocab_file", None) or "")
    if path.name == "spiece.model" and path.is_file():
        tokenizer._sentencepiece = path.read_bytes()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers from advising on the tying, which is settled here."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


def _is_checkpoint(name: str) -> bool:
    return name.endswith(".ckpt")


def _read_checkpoint(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"student: no checkpoint file {name!r}")
    with _reading("student: cannot read the checkpoint file", name):
        # memory-mapped: asking for a tokenizer must not read gigabytes of weights
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    record = found.get(CHECKPOINT_KEY)
    parts = record if isinstance(record, dict) else {}
    if not isinstance(parts.get("config"), dict) or not _are_tensors(parts.get("tokenizer")):
        raise UserError(f"student: {name!r} is not a checkpoint of lit_distill (it has no whole {CHECKPOINT_KEY!r})")
    if not _are_tensors(found.get("state_dict")):
        raise UserError(f"student: {name!r} is a checkpoint without weights (it has no whole 'state_dict')")
    return found


def _are_tensors(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(one, Tensor) for name, one in value.items()
    )


def _read_record(name: str) -> StudentRecord:
    return cast(StudentRecord, _read_checkpoint(name)[CHECKPOINT_KEY])


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Turn whatever transformers or torch raise of a file that is damaged, or is none, into one line."""
    try:
        yield
    except BaseException as error:
        # a fault of the tokenizers library is no `Exception`, and is of no type that can be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().split("\n")
        # torch puts what is wrong below a heading
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise UserError(f"{what} {name!r} ({reason or type(error).__name__}){_hint(name)}") from error


def _hint(name: str) -> str:
    """What to look at when a name does not load."""
    if Path(name).exists():
        return ""
    return "; it is no folder here, so it has to be a name on the Hugging Face hub, reachable or in its cache"
