"""Make a small student of the evidence: a T5's shape at a size that two cores train, with its own tokenizer.

python docs/evidence/make_student.py --like T5_FOLDER --out students/t5-v1_1-mini

T5_FOLDER holds a T5's config.json and tokenizer files; its weights are not needed: the student starts from random ones.
Others are wider, deeper, or have a vocabulary of their own, made of all texts of a JSON file, and T5's 100 sentinels:

python docs/evidence/make_student.py --like T5_FOLDER --words data/esnli/llm/train_CoT_0.json --out students/esnli-t5
"""

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HEADS = 4
SENTINELS = 100


def main() -> None:
    """Write the student's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=96, help="d_model")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--decoder_layers", type=int, help="by default as many as of the encoder")
    parser.add_argument("--words", type=Path, help="list of texts that the vocabulary is made of")
    arguments = parser.parse_args()
    width, layers = arguments.width, arguments.layers
    size = {"d_model": width, "d_kv": width // HEADS, "d_ff": 2 * width, "num_heads": HEADS}
    size |= {"num_layers": layers, "num_decoder_layers": arguments.decoder_layers or layers}
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = json.loads((arguments.like / "config.json").read_text()) | size
    if arguments.words is not None:
        config["vocab_size"] = make_tokenizer(arguments.words, arguments.out)
        (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (arguments.like / name).exists():
            shutil.copy(arguments.like / name, arguments.out / name)
    print(arguments.out)


def make_tokenizer(texts: Path, out: Path) -> int:
    """Write a byte pair encoding of a list of texts, and sentinels; returns the number of its entries."""
    pad, end, unknown = special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    # as T5's, whose entries have no line breaks
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    # else a word has another entry at the end of a sentence
    splits = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(splits), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=special)
    tokenizer.train_from_iterator(json.loads(texts.read_text()), trainer)
    # as T5's: <extra_id_0> is the last
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(SENTINELS))])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)
    made.save_pretrained(out)
    return len(made)


if __name__ == "__main__":
    main()
