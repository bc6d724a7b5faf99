"""Tiny students that tests make for themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lit_distill.students import build_student, save_student

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


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, so that a test can write ids by hand: the position in ``WORDS``."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
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


def make_student_folder(folder: Path, **changes: Any) -> Path:
    """A folder with a configuration and a tokenizer, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    make_tokenizer().save_pretrained(folder)
    return folder


def add_weights(folder: Path) -> Path:
    """Give a folder with a configuration alone weights, as a pretrained student has them."""
    torch.manual_seed(11)
    save_student(build_student(CONFIG), make_tokenizer(), folder)
    return folder
