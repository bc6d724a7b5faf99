"""Writes `toy-t5` and `tickets-t5` beside this file: a tiny T5's configuration and a word-level tokenizer of the data.

python configs/students/make_students.py
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lit_distill.data.toy import KINDS, TEXT_WORDS

FOLDER = Path(__file__).parent

TICKETS = FOLDER.parent / "tickets" / "train.csv"

SPECIAL = ["<pad>", "</s>", "<unk>"]


def main() -> None:
    """Write both folders' files."""
    write("toy-t5", [*TEXT_WORDS, *KINDS, *(word for kind in KINDS.values() for word in kind)])
    with TICKETS.open(encoding="utf-8", newline="") as file:
        texts = [
            "predict: explain: Rationale: So the answer is",
            *(cell for row in csv.reader(file) for cell in row[1:]),
        ]
    found = (word for text in texts for word, _ in Whitespace().pre_tokenize_str(text))
    write("tickets-t5", sorted(set(found)))


def write(name: str, vocabulary: Iterable[str]) -> None:
    """Write the configuration and the tokenizer of a student of these words."""
    words = [*SPECIAL, *vocabulary]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], unk_token=SPECIAL[2]
    ).save_pretrained(folder)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": len(words),
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
