"""A generated toy dataset with rationales: which of four words is the odd one out?"""

import random
from collections.abc import Mapping, Sequence
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


def toy_example(seed: int, split: str, position: int, *, variety: bool = False) -> Row:
    """The example at a position: a function of seed, split and position.

    The rationale gives the kind of each word, from which the label follows. The kind comes first, so that it must be
    known from the input, not copied from the word just written. The toy's teacher is always right.

    With ``variety`` there are more outputs: two more samples with the words in other orders, of which the last is wrong
    in a quarter of the rows; one of another teacher, ``brief``, that names the kinds alone; and one of kind
    ``counterfactual``, which argues for another word.
    """
    draw = random.Random(f"{seed}-{split}-{position}")  # noqa: S311 - a dataset, not a secret
    common, odd = draw.sample(sorted(KINDS), 2)
    label = draw.choice(KINDS[odd])
    words = [*draw.sample(KINDS[common], ITEMS - 1), label]
    draw.shuffle(words)

    def because(words: Sequence[str], answer: str) -> str:
        return " ".join(f"{odd if word == answer else common} : {word} ." for word in words)

    outputs = [TeacherOutput(because(words, label), label, RELEASED)]
    if variety:
        wrong = draw.choice([word for word in words if word != label])
        last = wrong if draw.random() < 0.25 else label
        outputs += [TeacherOutput(because(draw.sample(words, ITEMS), said), said, RELEASED) for said in (label, last)]
        kinds = " , ".join(odd if word == label else common for word in words)
        outputs.append(TeacherOutput(f"{kinds} .", label, "brief"))
        outputs.append(TeacherOutput(because(words, wrong), wrong, RELEASED, "counterfactual"))
    return Row(
        id=f"toy-{split}-{position}",
        input=f"which one does not belong : {' , '.join(words)} ?",
        label=label,
        choices=tuple(words),
        outputs=tuple(outputs),
    )


class ToyDataModule(RationaleDataModule):
    """Odd one out: generated questions with rationales, without files.

    Args:
        train_size: rows of train.
        val_size: rows of val.
        test_size: rows of test.
        toy_seed: seed of the rows; ``seed`` only orders them.
        variety: several outputs of each row: samples, teachers, kinds; see `toy_example`.
        **kwargs: as in `RationaleDataModule`; ``data_dir`` is unused.
    """

    name = "toy"
    prompt: ClassVar[str] = "toy"

    def __init__(
        self,
        train_size: int = 2000,
        val_size: int = 200,
        test_size: int = 500,
        toy_seed: int = 0,
        variety: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        for name, size in sizes.items():
            checks.check_int(name, size, 1, 10_000_000)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.toy_seed = checks.check_int("toy_seed", toy_seed, 0)
        self.variety = checks.check_bool("variety", variety)
        self.save_hyperparameters(sizes | {"toy_seed": toy_seed, "variety": variety})

    def split_file(self, split: Split) -> Path | None:
        """None: rows are generated."""
        return None

    def load_rows(self, split: Split) -> list[Row] | None:
        """Generate a split."""
        if split not in self.sizes:
            return None
        sizes = range(self.sizes[split])
        return [toy_example(self.toy_seed, split, i, variety=self.variety) for i in sizes]
