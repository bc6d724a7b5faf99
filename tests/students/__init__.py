"""Tiny students that tests make for themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import Metaspace, Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lit_distill.students.models import build_model, save_model

WORDS = [
    "<pad>", "</s>", "<unk>", "predict:", "explain:", "Answer", "Choices:", "Rationale:", "So", "the", "answer", "is",
    "a", "b", "c", "d", "e", "cat", "dog", "red", "blue", "yes", "no", "because", "?", ".",
    "+", "-", "*", "/", "(", ")",
    *[str(number) for number in range(32)],
]  # fmt: skip

CONFIG: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": len(WORDS),
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_tokenizer(sentinels: int = 0) -> PreTrainedTokenizerFast:
    """One id a word, so that a test can write ids by hand: the position in ``WORDS``, after which sentinels come."""
    words = [*WORDS, *(f"<extra_id_{number}>" for number in reversed(range(sentinels)))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def make_unigram_tokenizer() -> PreTrainedTokenizerFast:
    """T5's kind of tokenizer, of the same words."""
    words = [(word, 0.0) for word in WORDS[:3]] + [(f"▁{word}", -4.0) for word in WORDS[3:]]
    tokenizer = Tokenizer(Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_student_folder(folder: Path, sentinels: int = 0, **changes: Any) -> Path:
    """A folder with a configuration and a tokenizer, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    size = {"vocab_size": len(WORDS) + sentinels}
    (folder / "config.json").write_text(json.dumps(CONFIG | size | changes))
    make_tokenizer(sentinels).save_pretrained(folder)
    return folder


def add_weights(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Give a folder with a configuration alone weights, as a pretrained student has them."""
    torch.manual_seed(11)
    save_model(build_model(json.loads((folder / "config.json").read_text())), tokenizer or make_tokenizer(), folder)
    return folder


CAUSAL_WORDS = ["<s>", "</s>", "<unk>", "\n", *WORDS[3:]]
"""The words of the decoder-only students' tokenizer, which has no padding token of its own."""

CAUSAL_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}
CAUSAL_CONFIGS["qwen2"] = CAUSAL_CONFIGS["llama"] | {
    "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def make_causal_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, the position in ``CAUSAL_WORDS``, and a beginning-of-sequence token before each text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(CAUSAL_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"\n|\S+"), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def causal_config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """The content of a tiny decoder-only student's ``config.json``."""
    tokens = {"vocab_size": len(CAUSAL_WORDS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return CAUSAL_CONFIGS[kind] | tokens | changes


def make_causal_folder(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A folder with a decoder-only student's configuration and tokenizer, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(causal_config(kind, **changes)))
    make_causal_tokenizer().save_pretrained(folder)
    return folder
