"""One side of the training benchmark: its data, its student, and its trainer, in a process of its own."""

from dataclasses import dataclass
from typing import Any

import torch
from measure import Blocks, MemoryProbe
from operations import NOTHING, Batches, Content, shape_of
from options import Precision, Settings, Side
from ours import Ours
from quiet import quiet
from recipe import Features, Recipe
from report import machine
from rows import content, drawn, open_data, row_lengths, taken, whole_batches
from workers import Turn

from lit_distill.students import load_tokenizer


@dataclass(frozen=True)
class Plan:
    """What one side trains on."""

    warmup: Batches
    shuffled: list[Batches]
    """A block a pair, alike for both sides."""
    grouped: list[Batches]
    """Batches of each side's own making, of the same rows for both."""

    @property
    def blocks(self) -> list[Batches]:
        """In the order in which they are trained on."""
        return [self.warmup, *self.shuffled, *self.grouped]


class Training:
    """The rows, and what either side is trained on.

    Args:
        settings: the benchmark's.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.student)
        self.data = open_data(settings)
        self.data.prepare_data()
        self.data.setup("fit")
        loader = self.data.train_dataloader()
        self.rows = loader.dataset
        self.collate = loader.collate_fn
        everything = self.rows.__getitems__(list(range(len(self.rows))))
        self.features = Features(everything)
        self.lengths = row_lengths(everything)

    def shuffled(self) -> tuple[Batches, list[Batches]]:
        """Warm-up batches, and the blocks of all pairs: lit_distill's own shuffled batches of an epoch."""
        settings = self.settings
        batches = whole_batches(self.data, settings.batch_size)
        blocks = [taken(batches, pair * settings.steps, settings.steps) for pair in range(settings.pairs)]
        return taken(batches, settings.pairs * settings.steps, settings.warmup), blocks

    def grouped(self, recipe: Recipe) -> list[Batches]:
        """The recipe's blocks of rows of like length: batches out of an epoch of its trainer's own sampling."""
        settings, size = self.settings, self.settings.batch_size
        torch.manual_seed(settings.seed)
        order = recipe.grouped_order(self.features)
        whole = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        # the sampler puts the longest batch of all first, which an epoch has once
        usual = whole[1:] or whole
        return [drawn(usual, settings.steps, settings.seed + pair) for pair in range(settings.pairs)]

    def regrouped(self, block: Batches) -> Batches:
        """lit_distill's batches of a block's rows, by its own rule."""
        positions = [row for batch in block for row in batch]
        part = open_data(self.settings, ("train", positions), source=self.data, batching="by_length")
        part.setup("fit")
        return [[positions[row] for row in batch] for batch in whole_batches(part, self.settings.batch_size)]

    def content(self, batches: Batches, recipe: Recipe | None) -> Content:
        """What a side's collator makes of batches."""
        total = NOTHING
        for batch in batches:
            if recipe is not None:
                total += content(recipe.collator([self.features[row] for row in batch]))
            else:
                total += content(self.collate(self.rows.__getitems__(batch)))
        return total


def train_side(turn: Turn, settings: Settings, side: Side, precision: Precision, folder: str) -> None:
    """Prepare one side, say what it is about to do, and train a block each time when told to.

    Args:
        turn: lit_distill is told the recipe's length-grouped blocks first; each then answers with its blocks and what
            they hold, after each block with its seconds, and at the end once more.
        settings: the benchmark's.
        side: which.
        precision: the recipe's.
        folder: where a trainer may write.
    """
    with quiet(settings.threads) as notes:
        training = Training(settings)
        warmup, shuffled = training.shuffled()
        recipe: Recipe | None = None
        if side == "recipe":
            probe = MemoryProbe(settings.device)
            recipe = Recipe(settings, training.tokenizer, precision, folder)
            plan = Plan(warmup, shuffled, training.grouped(recipe))
            student: Any = recipe.student
        else:
            plan = Plan(warmup, shuffled, [training.regrouped(block) for block in turn.wait()])
            probe = MemoryProbe(settings.device)
            ours = Ours(settings, training.data)
            student = ours.module.student.model
        counted = [*plan.shuffled, *plan.grouped]
        turn.answer(
            {
                "machine": machine(settings.device),
                "shape": shape_of(student.config),
                "shuffled": plan.shuffled,
                "grouped": plan.grouped,
                "lengths": [[training.lengths[row] for batch in block for row in batch] for block in counted],
                "content": [training.content(block, recipe) for block in counted],
            }
        )
        batches = [batch for block in plan.blocks for batch in block]
        blocks = Blocks(turn, probe, settings.device, [len(block) for block in plan.blocks], notes)
        blocks.begin()
        if recipe is not None:
            recipe.train(training.features, [row for batch in batches for row in batch], blocks.on_step)
        else:
            ours.train(batches, blocks.on_step)
        blocks.check_end()
        turn.answer("ended")
