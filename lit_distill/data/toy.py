"""A generated toy dataset with rationales: which of four words is the odd one out?"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from lit_distill import checks
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.outputs import RELEASED
from lit_distill.evaluation.answers import Split
from lit_distill.tasks import Row, TeacherOutput

KINDS: Mapping[str, tuple[str, ...]] = {
    "bird": ("sparrow", "eagle", "robin", "owl", "crow", "swan", "heron", "finch", "raven", "stork"),
    "fish": ("trout", "salmon", "carp", "perch", "tuna", "cod", "eel", "pike", "herring", "shark"),
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "lemon", "mango", "peach", "fig", "banana"),
    "tool": ("hammer", "saw", "drill", "wrench", "chisel", "pliers", "shovel", "rake", "axe", "file"),
    "vehicle": ("car", "bus", "train", "truck", "tram", "bicycle", "boat", "plane", "van", "ferry"),
    "metal": ("iron", "copper", "gold", "silver", "zinc", "tin", "lead", "nickel", "brass", "steel"),
    "tree": ("oak", "pine", "birch", "maple", "elm", "willow", "cedar", "beech", "ash", "spruce"),
    "garment": ("shirt", "coat", "scarf", "hat", "glove", "sock", "skirt", "jacket", "belt", "dress"),
}
"""Kind -> its words; each word has one kind."""

ITEMS = 4

TEXT_WORDS = (
    *("which", "one", "does", "not", "belong", ":", ",", "?", "."),
    *("predict", "explain", "Rationale", "So", "the", "answer", "is"),
)
"""Other words in inputs, targets and prefixes, for a word-level tokenizer."""


def toy_example(seed: int, split: str, position: int) -> Row:
    """The example at a position: a function of seed, split and position.

    The rationale gives the kind of each word, from which the label follows. The kind comes first, so that it must be
    known from the input, not copied from the word just written. The toy's teacher is always right.
    """
    draw = random.Random(f"{seed}-{split}-{position}")  # noqa: S311 - a dataset, not a secret
    common, odd = draw.sample(sorted(KINDS), 2)
    label = draw.choice(KINDS[odd])
    words = [*draw.sample(KINDS[common], ITEMS - 1), label]
    draw.shuffle(words)
    kind_of = {word: odd if word == label else common for word in words}
    return Row(
        id=f"toy-{split}-{position}",
        input=f"which one does not belong : {' , '.join(words)} ?",
        label=label,
        choices=tuple(words),
        outputs=(TeacherOutput(" ".join(f"{kind_of[word]} : {word} ." for word in words), label, RELEASED),),
    )


class ToyDataModule(RationaleDataModule):
    """Odd one out: generated questions with rationales, without files.

    Args:
        train_size: rows of train.
        val_size: rows of val.
        test_size: rows of test.
        toy_seed: seed of the rows; ``seed`` only orders them.
        **kwargs: as in `RationaleDataModule`; ``data_dir`` is unused.
    """

    name = "toy"
    prompt: ClassVar[str] = "toy"

    def __init__(
        self, train_size: int = 2000, val_size: int = 200, test_size: int = 500, toy_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        for name, size in sizes.items():
            checks.check_int(name, size, 1, 10_000_000)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.toy_seed = checks.check_int("toy_seed", toy_seed, 0)
        self.save_hyperparameters(sizes | {"toy_seed": toy_seed})

    def split_file(self, split: Split) -> Path | None:
        """None: rows are generated."""
        return None

    def load_rows(self, split: Split) -> list[Row] | None:
        """Generate a split."""
        if split not in self.sizes:
            return None
        return [toy_example(self.toy_seed, split, i) for i in range(self.sizes[split])]
