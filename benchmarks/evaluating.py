"""One side of the evaluation benchmark: its data, its student, and its trainer, in a process of its own."""

from collections.abc import Callable
from typing import Any

from measure import MemoryProbe, seconds_of
from operations import NOTHING, Content, Texts, shape_of
from options import Asked, Precision, Settings, Side
from ours import Ours
from quiet import quiet
from recipe import Features, Recipe
from report import machine
from rows import choose, content, open_data, row_lengths
from workers import Turn

from lit_distill.students import load_tokenizer

LONGEST = {"label": 64, "rationale": 256}
"""Tokens that a text has at most, unless a gold one is longer."""


class Evaluating:
    """The rows, and either side's evaluation of them.

    Args:
        settings: the benchmark's.
        asked: what is evaluated.
    """

    def __init__(self, settings: Settings, asked: Asked) -> None:
        self.settings = settings
        self.asked = asked
        self.tokenizer = load_tokenizer(settings.student)
        whole = open_data(settings)
        whole.prepare_data()
        found = whole.split_rows("val")
        positions = choose(0 if found is None else len(found), settings.steps * settings.batch_size, settings.seed)
        self.data = open_data(settings, ("val", positions), source=whole)
        self.data.setup("validate")
        self.loader = self.data.val_dataloader()
        rows = self.loader.dataset.__getitems__(list(range(len(positions))))
        self.features = Features(rows)
        self.lengths = row_lengths(rows)
        # a row without a rationale has no length to end at, and ends at once
        self.gold = {
            "label": [own[1] for own in self.lengths],
            "rationale": [own[3] or 1 for own in self.lengths],
        }
        if not asked.every_loss:
            # what the rationale task holds is read by nobody
            self.lengths = [(source, target, None, None) for source, target, _, _ in self.lengths]
        self.longest = {task: max(limit, *self.gold[task]) for task, limit in LONGEST.items()}

    def ours(self) -> Ours:
        """lit_distill."""
        return Ours(
            self.settings,
            self.data,
            every_loss=self.asked.every_loss,
            evaluate_rationales=self.asked.rationales,
            max_label_length=self.longest["label"],
            max_rationale_length=self.longest["rationale"],
        )

    def evaluator(self, side: Ours | Recipe) -> Callable[[], Texts]:
        """A ready trainer's evaluation."""
        if isinstance(side, Ours):
            return side.evaluator(self.gold if self.asked.stop_at_gold else None)
        return side.evaluator(self.features, self.asked, self.longest)

    def content(self, side: Ours | Recipe) -> Content:
        """What a side's batches of all rows hold."""
        if isinstance(side, Ours):
            return sum((content(self._used(batch)) for batch in self.loader), NOTHING)
        size, features = self.settings.batch_size, self.features.features
        batches = [features[start : start + size] for start in range(0, len(features), size)]
        return sum((content(self._used(side.collator(batch))) for batch in batches), NOTHING)

    def _used(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if self.asked.every_loss else {"label": batch["label"]}


def evaluate_side(turn: Turn, settings: Settings, side: Side, precision: Precision, folder: str, asked: Asked) -> None:
    """Prepare one side, say what there is to evaluate, and evaluate it each time when told to.

    Args:
        turn: answers with what there is, and after each evaluation with its seconds and texts.
        settings: the benchmark's.
        side: which.
        precision: the recipe's.
        folder: where a trainer may write.
        asked: what is evaluated.
    """
    with quiet(settings.threads) as notes:
        evaluating = Evaluating(settings, asked)
        probe = MemoryProbe(settings.device)
        built = Recipe(settings, evaluating.tokenizer, precision, folder) if side == "recipe" else evaluating.ours()
        student = built.student if isinstance(built, Recipe) else built.module.student.model
        turn.answer(
            {
                "machine": machine(settings.device),
                "shape": shape_of(student.config),
                "lengths": evaluating.lengths,
                "content": evaluating.content(built),
            }
        )
        evaluate, texts = evaluating.evaluator(built), Texts()
        while True:
            turn.wait()
            seconds = seconds_of(lambda: texts.extend(evaluate()), settings.device)
            turn.answer({"seconds": seconds, "texts": texts, "memory": probe.read(), "notes": list(notes)})
            texts.clear()
