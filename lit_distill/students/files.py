"""A student's files: configuration, tokenizer, and their record in checkpoints."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lit_distill.errors import UserError
from lit_distill.shipped import shipped
from lit_distill.students.tokens import Family

CHECKPOINT_KEY = "lit_distill_student"
"""Key of the student's record in a Lightning checkpoint."""

SEQ2SEQ = ("t5", "mt5")
"""``model_type`` of the encoder-decoder models; ``t5`` includes ByT5, Flan-T5 and T5 v1.1."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


class StudentRecord(TypedDict):
    """What rebuilds a student, besides weights; plain types and tensors, for ``weights_only=True``."""

    config: dict[str, Any]  # the content of `config.json`
    tokenizer: dict[str, Tensor]  # the tokenizer's files: name -> content as bytes, `(size,)`, uint8
    adapter: NotRequired[dict[str, Any]]  # the settings of the adapter that the weights include


def family(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``. Raises a ``UserError`` if the model cannot be a student."""
    kind = config.get("model_type")
    if kind in SEQ2SEQ:
        return "seq2seq"
    # transformers also lists BERT-like models there, and decoders of encoder-decoders
    others = {**MODEL_FOR_MASKED_LM_MAPPING_NAMES, **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    # these read padding as if it were text
    others |= dict.fromkeys(("rwkv", "recurrent_gemma"), "")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in others:
        return "causal"
    raise UserError(
        f"student: a {kind!r} model cannot be a student; allowed are {', '.join(SEQ2SEQ)} and the decoder-only models"
        " of transformers (llama, qwen2, gpt2, ...)"
    )


def read_config(student: str | os.PathLike[str]) -> dict[str, Any]:
    """A student's ``config.json``, from the hub, a folder or a checkpoint file.

    Raises:
        UserError: there is none, or the model cannot be a student.
    """
    name = shipped(os.fspath(student))
    if is_checkpoint(name):
        content = dict(read_checkpoint(name)[CHECKPOINT_KEY]["config"])
    else:
        with reading("student: cannot read a configuration from", name):
            content, _ = PreTrainedConfig.get_config_dict(name)
    if not content or not isinstance(content, dict):
        raise UserError(f"student: the config.json of {name!r} is absent, empty or no object{_hint(name)}")
    family(content)
    return content


def is_checkpoint(name: str) -> bool:
    """Whether a name is that of a checkpoint file."""
    return name.endswith(".ckpt")


def read_checkpoint(name: str) -> dict[str, Any]:
    """A memory-mapped checkpoint file of this framework. Raises a ``UserError`` for other files."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"student: no checkpoint file {name!r}")
    with reading("student: cannot read the checkpoint file", name):
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


def student_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's part of a module's state dict, under the model's own names."""
    prefix = "student.model."
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def check_weights(weights: Mapping[str, Tensor], name: str) -> None:
    """Check that floating-point tensors are finite. Raises a ``UserError`` that names the first that is not."""
    floating = {key: weight for key, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    # the maximum cannot overflow, and needs one synchronisation for all tensors
    if torch.nn.utils.get_total_norm(list(floating.values()), norm_type=float("inf")).isfinite():
        return
    bad = [key for key, weight in floating.items() if not weight.isfinite().all()]
    raise UserError(f"{name}: {len(bad)} of {len(floating)} weights are not finite, the first is {bad[0]}")


def load_tokenizer(student: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A student's tokenizer, from the hub, a folder or a checkpoint file. Raises a ``UserError`` without one."""
    name = shipped(os.fspath(student))
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        # transformers would create an empty one from `model_type`
        raise UserError(f"tokenizer: none in the folder {name!r} (one of {', '.join(_TOKENIZER_FILES)})")
    kept = read_checkpoint(name)[CHECKPOINT_KEY]["tokenizer"] if is_checkpoint(name) else None
    with reading("tokenizer: cannot load one from", name):
        tokenizer: Any = AutoTokenizer.from_pretrained(name) if kept is None else restore_tokenizer(kept)
        # a damaged one would fail at the first row
        tokenizer(["a"], verbose=True)
        if tokenizer.eos_token_id is None:
            raise UserError("it has no end-of-sequence token")
    return cast(PreTrainedTokenizerBase, tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer for transformers 4 and 5.

    Version 5 writes names that 4 does not know, but reads those of 4; it also drops the SentencePiece model, which slow
    tokenizers of 4 and other programs need.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        content.pop(name, None)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    # in version 4 a generic tokenizer would also give `token_type_ids`, which these models refuse
    content["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    _keep_sentencepiece(tokenizer)
    if (sentencepiece := getattr(tokenizer, "_sentencepiece", None)) is not None:
        (folder / "spiece.model").write_bytes(sentencepiece)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The tokenizer's files, for a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.stat().st_size
        }


def restore_tokenizer(files: Mapping[str, Tensor]) -> PreTrainedTokenizerBase:
    """The tokenizer from its files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            # checkpoints are untrusted: a name must not leave the folder
            (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        _keep_sentencepiece(tokenizer)
        return tokenizer


def _keep_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> None:
    """Load a tokenizer's SentencePiece model into memory, as its folder may disappear."""
    path = Path(getattr(tokenizer, "vocab_file", None) or "")
    if path.name == "spiece.model" and path.is_file():
        tokenizer._sentencepiece = path.read_bytes()


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Turn errors of transformers and torch about damaged files into one line."""
    try:
        yield
    except BaseException as error:
        # errors of the tokenizers library are no `Exception`, and their type cannot be imported
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().split("\n")
        # torch's first line is a heading
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise UserError(f"{what} {name!r} ({reason or type(error).__name__}){_hint(name)}") from error


def _hint(name: str) -> str:
    if Path(name).exists():
        return ""
    return "; it is no folder here, so it has to be a name on the Hugging Face hub, reachable or in its cache"
