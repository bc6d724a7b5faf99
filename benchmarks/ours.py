"""lit_distill's side: its modules under the real `Trainer`, as `python -m lit_distill fit` and `validate` run them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from ceiling import as_run
from lightning.pytorch.callbacks import LambdaCallback
from operations import Batches, Texts
from options import Settings
from torch import Tensor

from lit_distill.batch import TaskBatch, take
from lit_distill.evaluation.answers import Answer, AnswerKey
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import Step


class BenchmarkModule(StepByStepModule):
    """The method as it is, with its answers kept, and made to end where the gold targets do if asked for."""

    gold_lengths: Mapping[str, Tensor] | None = None
    """Task -> tokens of each row's gold target, its end token included, ``(rows of the split,)``."""
    texts: dict[int, tuple[str, ...]]
    """Row -> the generated label, and the rationale if there is one."""
    every_loss = True
    """Whether an evaluation reads the rationale task, too."""

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """As the base's, of the label task alone if not `every_loss`."""
        if not self.every_loss:
            batch = {**batch, "rationale": take(batch["rationale"], [])}
        super().validation_step(batch, batch_idx)

    def process_logits(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
        """The end token at the gold target's length, and not before."""
        if self.gold_lengths is None:
            return scores
        ends = self.gold_lengths[task].to(rows.device)[rows] <= step + 1
        end = self.student.model.config.eos_token_id
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, end] = torch.where(ends, 0.0, -torch.inf)
        return scores

    def answers(self, step: Step, key: AnswerKey, *, rationales: bool) -> list[Answer]:
        """As the base's; kept by row."""
        found = super().answers(step, key, rationales=rationales)
        for answer in found:
            self.texts[answer.index] = (answer.text,) if answer.rationale is None else (answer.text, answer.rationale)
        return found


class Ours:
    """A module with its data and settings.

    Args:
        settings: the benchmark's.
        data: a data module of `rows.open_data`.
        every_loss: whether an evaluation reads the rationale task, too.
        **arguments: further arguments of the module.
    """

    def __init__(self, settings: Settings, data: Any, *, every_loss: bool = True, **arguments: Any) -> None:
        self.settings = settings
        self.data = data
        # the weights of both sides
        torch.manual_seed(settings.seed)
        if settings.fast is not None:
            arguments.setdefault("fast", settings.fast)
        self.module = BenchmarkModule(
            settings.student,
            from_scratch=settings.from_scratch,
            learning_rate=5e-5,
            # each has its own cost, and the recipe does neither
            score_choices=False,
            num_samples=0,
            **arguments,
        )
        self.module.every_loss = every_loss

    def train(self, batches: Batches, on_step: Callable[[int], None]) -> None:
        """Train on these batches, one a step.

        Args:
            batches: row positions.
            on_step: called after each optimizer step with the number of steps done.
        """
        self.data.replayed = batches
        # after the optimizer and the schedule
        told = LambdaCallback(on_train_batch_end=lambda trainer, *rest: on_step(trainer.global_step))
        trainer = self._trainer(max_steps=len(batches), callbacks=[told])
        with as_run():
            trainer.fit(self.module, datamodule=self.data)

    def evaluator(self, gold_lengths: Mapping[str, Sequence[int]] | None) -> Callable[[], Texts]:
        """A ready trainer's validation: each call gives the generated texts of each row, label first."""
        trainer = self._trainer()
        self.module.gold_lengths = None
        if gold_lengths is not None:
            self.module.gold_lengths = {task: torch.tensor(own) for task, own in gold_lengths.items()}

        def evaluate() -> Texts:
            self.module.texts = {}
            with as_run():
                trainer.validate(self.module, datamodule=self.data, verbose=False)
            return [self.module.texts[row] for row in sorted(self.module.texts)]

        return evaluate

    def _trainer(self, **arguments: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="gpu" if self.settings.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if self.settings.precision == "bf16" else "32-true",
            gradient_clip_val=1.0,
            max_epochs=-1,
            limit_val_batches=None if "max_steps" not in arguments else 0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )
