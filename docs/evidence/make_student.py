"""Make a small student of the evidence: a T5's shape at a size that two cores train.

python docs/evidence/make_student.py --like T5_FOLDER --out students/mine

T5_FOLDER holds a T5's config.json and tokenizer files; its weights are not needed. The student has random weights, T5's
tokenizer and its sentinels. Others are wider, deeper, or made of texts, in local files of lines, JSON or Parquet:

python docs/evidence/make_student.py --like T5_FOLDER --words my_texts.jsonl --embeddings --heads --out students/mine

--words makes a vocabulary of them, and --embeddings what a T5 from random weights learns last, that words alike are
alike: the singular vectors of the positive pointwise mutual information of words near each other (Levy and Goldberg
2014, Neural Word Embedding as Implicit Matrix Factorization). --heads is model.from_scratch: mimetic, for
a student that has embeddings.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_distill.data.corpus.documents import parse, rows_of
from lit_distill.errors import UserError
from lit_distill.files import atomic_folder
from lit_distill.reading import json_object
from lit_distill.students.files import SEQ2SEQ
from lit_distill.students.mimetic import set_heads
from lit_distill.students.models import build_model, save_model

HEADS = 4
SENTINELS = 100
NEAR = 5
"""Words so far apart occur together, with a weight of 1 / distance."""
RARE = 5
"""Entries with fewer neighbours have random embeddings."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main() -> None:
    """Write the student's folder."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=96, help="d_model")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--decoder_layers", type=int, help="by default as many as of the encoder")
    parser.add_argument("--words", type=Path, nargs="+", help="texts that the vocabulary is made of")
    parser.add_argument("--embeddings", action="store_true", help="of the texts' co-occurrences")
    parser.add_argument("--heads", action="store_true", help="that look for like words; with --words")
    arguments = parser.parse_args()
    try:
        make_student(parser, arguments)
    except (UserError, OSError) as error:
        parser.error(str(error))
    print(arguments.out)


def make_student(parser: Parser, arguments: argparse.Namespace) -> None:
    """Check the arguments, and write the student's folder. Raises a ``UserError`` for texts that cannot be read."""
    if (arguments.embeddings or arguments.heads) and not arguments.words:
        parser.error("--embeddings and --heads need --words")
    width, layers, decoder_layers = arguments.width, arguments.layers, arguments.decoder_layers
    if width < HEADS or width % HEADS or layers < 1 or (decoder_layers is not None and decoder_layers < 1):
        parser.error(f"--width has to be a multiple of {HEADS}, and there is at least one layer")
    if missing := [path for path in (arguments.like / "config.json", *(arguments.words or ())) if not path.is_file()]:
        parser.error(f"{missing[0]}: there is no such file")
    if arguments.out.exists():
        parser.error(f"--out: {arguments.out} is there already")
    config = json_object((arguments.like / "config.json").read_bytes(), f"--like: {arguments.like / 'config.json'}")
    if config.get("model_type") not in SEQ2SEQ:
        parser.error(f"--like: a {config.get('model_type')!r} model is no T5; allowed are {', '.join(SEQ2SEQ)}")
    names = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    copied = [path for name in names if (path := arguments.like / name).is_file()]
    if arguments.words is None and not {"spiece.model", "tokenizer.json"} & {path.name for path in copied}:
        parser.error(f"--like: {arguments.like} has neither spiece.model nor tokenizer.json; give --words")
    if arguments.words and not any(read_texts(arguments.words)):
        parser.error("--words: there is no text")
    size = {"d_model": width, "d_kv": width // HEADS, "d_ff": 2 * width, "num_heads": HEADS}
    size |= {"num_layers": layers, "num_decoder_layers": decoder_layers or layers}
    config |= size
    with atomic_folder(arguments.out) as folder:
        if arguments.words is None:
            for path in copied:
                shutil.copy(path, folder / path.name)
        else:
            tokenizer = make_tokenizer(read_texts(arguments.words))
            tokenizer.save_pretrained(folder)
            config["vocab_size"] = len(tokenizer)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if arguments.embeddings or arguments.heads:
            torch.manual_seed(0)
            student = build_model(config)
            if arguments.embeddings:
                set_embeddings(student, tokenizer, read_texts(arguments.words))
            if arguments.heads:
                set_heads(student)
            save_model(student, tokenizer, folder)


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Strings, or all strings in an object joined, one a line or in one list."""
    for _, value in (parse(*row) for row in rows_of(files, "words")):
        for one in value if isinstance(value, list) else [value]:
            yield " ".join(strings(one)).strip()


def strings(value: Any) -> Iterator[str]:
    """Those of a JSON value, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte pair encoding of texts, and sentinels."""
    pad, end, unknown = special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    # as T5's, whose entries have no line breaks
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    # else a word has another entry at the end of a sentence
    splits = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(splits), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    # as T5's: <extra_id_0> is the last
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(SENTINELS))])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)


def set_embeddings(student: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Embed entries by the entries near them, as long as random ones are."""
    weight = student.get_input_embeddings().weight
    entries, width = weight.shape
    if width > entries:
        raise UserError(f"--width: the texts have {entries} entries, and so no {width} singular vectors")
    encoded = tokenizer(list(texts), return_attention_mask=False)["input_ids"]
    # none is near that of another text
    row = np.array([i for ids in encoded for i in [*ids, *[-1] * NEAR]])
    counts = np.zeros(entries * entries)
    for distance in range(1, NEAR + 1):
        left, right = row[:-distance], row[distance:]
        both = (left >= 0) & (right >= 0)
        counts += np.bincount(left[both] * entries + right[both], minlength=len(counts)) / distance
    pairs = counts.reshape(entries, entries)
    pairs += pairs.T.copy()
    total = pairs.sum(1)
    # the power makes rare neighbours less telling (Levy, Goldberg and Dagan 2015)
    share = total**0.75 / (total**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nan_to_num(np.log(pairs / (total[:, None] * share)), nan=0, neginf=0)
    left, values, _ = randomized_svd(np.maximum(information, 0), width, random_state=0)
    found = left * np.sqrt(values)
    # turned at random, for every head sees a part of the dimensions
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))
    often = total > RARE
    found = found[often] @ turn
    found *= np.sqrt(width) / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-9)
    with torch.no_grad():
        weight[torch.from_numpy(often)] = torch.from_numpy(found).to(weight.dtype)


if __name__ == "__main__":
    main()
