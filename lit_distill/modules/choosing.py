"""What a run finds out for itself as it begins: the fastest path of its student, and the weights of its teachers."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lit_distill.batch import TaskBatch
from lit_distill.students import Student
from lit_distill.students.seq2seq import Seq2SeqStudent
from lit_distill.students.timing import Choice, Stage, choose
from lit_distill.teachers.models import Teachers

COMPARED_ROWS = 256
"""Rows of train, in whole batches, on which the weights of teachers are computed."""


class Choosing(pl.LightningModule):
    """A student, its teachers, and the choices that a run makes for them."""

    student: Student
    teachers: Teachers
    chosen_paths: dict[Stage, Choice]  # with ``fast: auto``
    choosing_seconds: float = 0.0  # that were spent on it in training, and not yet left out of the throughput

    def __init__(self) -> None:
        super().__init__()
        self.chosen_paths = {}

    def choose_path(self, stage: Stage, batch: TaskBatch) -> None:
        """With ``fast: auto``, time the paths of a T5's passes on a run's first batch and take the fastest.

        All ranks take that of the first one.
        """
        student = self.student
        if self.hparams["fast"] != "auto" or stage in self.chosen_paths or not isinstance(student, Seq2SeqStudent):
            return
        with self.trainer.precision_plugin.forward_context():
            choice = choose(student, batch, stage)
        self.take_path(stage, self.trainer.strategy.broadcast(choice))

    def take_path(self, stage: Stage, choice: Choice) -> None:
        """Compute the student's passes on this path from now on, and say and log so if it was chosen by timing."""
        student: Any = self.student
        self.chosen_paths[stage] = choice
        if stage == "training":
            student.path = choice.path
        else:
            student.evaluation_path = choice.path
        if choice.seconds:
            rank_zero_info(f"fast: {stage} on {choice}")
            for logger in self.trainer.loggers:
                logger.log_hyperparams({f"fast_{stage}": str(choice)})

    def weigh_teachers(self) -> None:
        """Compare teachers with the first rows of train (of rank 0), unless a checkpoint knows their weights."""
        if not (groups := self.teachers.unweighed()):
            return
        source: Any = self.trainer.fit_loop._data_source
        batches: list[TaskBatch] = []
        rows = 0
        # a loader draws a number to seed its workers
        with isolate_rng():
            for batch in type(source).dataloader(source):
                batches.append(batch)
                rows += max((len(inputs["labels"]) for inputs in batch.values()), default=0)
                if rows >= COMPARED_ROWS:
                    break
        for group in groups:
            group.similarities = self.trainer.strategy.broadcast(group.compare(batches, self.student))
            values = dict(zip(group.settings.names, group.similarities, strict=True))
            told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            rank_zero_info(f"Teacher {group.name}: linear CKA with the targets of {rows} rows of train: {told}")
            for logger in self.trainer.loggers:
                logger.log_hyperparams({f"teachers.{group.name}.cka": str(values)})
