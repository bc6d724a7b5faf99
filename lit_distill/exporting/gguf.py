"""Write a T5 as a GGUF file, the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from lit_distill.checks import check_choice
from lit_distill.errors import UserError
from lit_distill.students import StudentFiles, Tokens
from lit_distill.students.models import GGUF, import_gguf, save_description, true_config

TYPES = {"float32": "F32", "bf16": "BF16", "int8": "Q8_0"}
"""Quantization -> GGML's type of the matrices; norms and position biases are always float32, as llama.cpp has them."""

_CONVERTER = "llama.cpp's convert_hf_to_gguf.py may take the folder of --to safetensors"


def check_gguf(files: StudentFiles) -> None:
    """Raise a ``UserError`` if a student cannot be written so that llama.cpp runs it, or a package is absent."""
    import_gguf()
    config, kind = files.config, files.config["model_type"]
    if kind not in ("t5", "mt5"):
        raise UserError(f"to: gguf is for t5 and mt5 students, this one is {kind!r}; {_CONVERTER}")
    made = AutoConfig.for_model(**config)
    for name, allowed in (("feed_forward_proj", ("relu", "gated-gelu")), ("relative_attention_max_distance", (128,))):
        # llama.cpp knows no other, whatever a file says
        check_choice(f"to: gguf: {name} of the student", getattr(made, name), allowed)
    if made.num_decoder_layers > made.num_layers:
        raise UserError(
            "to: gguf: transformers, which has to read the file, takes no more layers of a decoder than of its encoder,"
            f" {made.num_layers}; the student has {made.num_decoder_layers}"
        )
    _rules(files.tokenizer())


def write_gguf(network: Any, tokenizer: PreTrainedTokenizerBase, quantization: str, folder: Path) -> None:
    """Write ``model.gguf``, and beside it what `lit_distill.students.load` needs: tokenizer and configuration.

    Where the output head is tied, T5 divides what it reads by the root of d_model. llama.cpp does not, so such a head
    is written as a matrix of its own that is divided.
    """
    gguf = import_gguf()
    config = true_config(network)
    # the same architecture by another name, which neither llama.cpp nor transformers' reader of GGUF has
    config |= {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    config |= {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    kind = gguf.GGMLQuantizationType[TYPES[quantization]]
    writer = gguf.GGUFWriter(folder / GGUF, "t5")
    _add_sizes(writer, config)
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if kind.name == "F32" else "MOSTLY_") + kind.name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, gguf, tokenizer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, max(config["num_layers"], config["num_decoder_layers"]))
    for name, weight in _weights(network):
        array = weight.detach().float().cpu().numpy()
        own, block = str(names.get_name(name, (".weight",))), gguf.GGML_QUANT_SIZES[kind][0]
        plain = array.ndim == 1 or "attn_rel_b" in own or array.shape[-1] % block
        raw = gguf.GGMLQuantizationType.F32 if plain else kind
        writer.add_tensor(own, gguf.quants.quantize(np.ascontiguousarray(array), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_description(config, tokenizer, folder)


def _weights(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight once, and the output head."""
    embedding = network.get_input_embeddings().weight
    yield "shared.weight", embedding
    for name, weight in network.named_parameters():
        if weight is not embedding and name != "lm_head.weight":
            yield name, weight
    scale = network.config.d_model**-0.5 if getattr(network.config, "scale_decoder_outputs", False) else 1.0
    yield "lm_head.weight", network.lm_head.weight * scale


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config.get("n_positions") or 512)
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["d_ff"])
    writer.add_block_count(config["num_layers"])
    writer.add_decoder_block_count(config["num_decoder_layers"])
    writer.add_head_count(config["num_heads"])
    writer.add_key_length(config["d_kv"])
    writer.add_value_length(config["d_kv"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    writer.add_decoder_start_token_id(config["decoder_start_token_id"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    """The pieces of a SentencePiece unigram tokenizer, their scores and types; ids without a piece are unused."""
    rules, size, types = _rules(tokenizer), config["vocab_size"], gguf.TokenType
    added = {one["id"]: one for one in rules["added_tokens"]}
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    pieces = [(f"[PAD{number}]", -10_000.0, types.UNUSED) for number in range(size)]
    for number, (piece, score) in enumerate(rules["model"]["vocab"]):
        if number in special:
            pieces[number] = piece, score, types.CONTROL
        elif number == rules["model"]["unk_id"]:
            pieces[number] = piece, score, types.UNKNOWN
        elif number not in added:
            pieces[number] = piece, score, types.NORMAL
    for number, one in added.items():
        # sentinels stay unused, as in llama.cpp's own files
        if pieces[number][2] == types.UNUSED and not one["content"].startswith("<extra_id_"):
            pieces[number] = one["content"], -1000.0, types.USER_DEFINED
    names, scores, kinds = zip(*pieces, strict=True)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    steps, splits = _steps(rules)
    writer.add_add_space_prefix(splits["Metaspace"]["prepend_scheme"] != "never")
    writer.add_remove_extra_whitespaces("WhitespaceSplit" in splits or "Replace" in steps)
    if "Precompiled" in steps:
        writer.add_precompiled_charsmap(base64.b64decode(steps["Precompiled"]["precompiled_charsmap"]))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(rules["model"]["unk_id"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of ``tokenizer.json``. Raises a ``UserError`` if llama.cpp's T5 has no such tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = rules.get("model", {})
    steps, splits = map(set, _steps(rules))
    known = steps <= {"Precompiled", "Strip", "Replace"} and {"Metaspace"} <= splits <= {"Metaspace", "WhitespaceSplit"}
    if model.get("type") != "Unigram" or model.get("unk_id") is None or model.get("byte_fallback") or not known:
        raise UserError(f"to: gguf needs a tokenizer of SentencePiece's unigram pieces, as T5's; {_CONVERTER}")
    return rules


def _steps(rules: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of normalisation and of splitting, by type."""
    for name, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        rule = rules.get(name) or {parts: []}
        yield {one["type"]: one for one in rule.get(parts, [rule])}


def same_pieces(tokens: Tokens, folder: Path, texts: Sequence[str]) -> float:
    """The share of texts that transformers' reader of the file splits into the student's pieces.

    It does not read SentencePiece's normalisation, nor, in transformers 5.17, that extra whitespace is removed, so that
    texts are given to it without them.
    """
    with TemporaryDirectory() as alone:
        # it would rather read the tokenizer's own files beside it
        (Path(alone) / GGUF).symlink_to((folder / GGUF).resolve())
        read: Any = AutoTokenizer.from_pretrained(alone, gguf_file=GGUF)
    tokenizer: Any = tokens.tokenizer
    normalizer = tokenizer.backend_tokenizer.normalizer
    normal = str if normalizer is None else normalizer.normalize_str
    found = [read(" ".join(normal(text).split())).input_ids for text in texts]
    return float(np.mean([own == other for own, other in zip(tokens.sources(texts, 10**9).ids, found, strict=True)]))
