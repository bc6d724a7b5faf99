"""A student that reads a corpus before it learns a task."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.modules.base import DistillModule
from lit_distill.objectives import Step
from lit_distill.tasks import TEXT, Task


class SpanCorruptionModule(DistillModule):
    """Reading: a T5 fills the gaps of texts (span corruption, Raffel et al. 2020), with `CorpusDataModule`.

    The loss is the mean cross-entropy of the target tokens: sentinels and what was in the gaps. A decoder-only student
    predicts the next token instead. With a teacher's objective beside it this is the first stage of TinyBERT (Jiao et
    al. 2020). Validation gives ``val/text_loss``, ``val/loss`` and ``val/perplexity``; nothing is generated.

    The saved student has learned no task: train it on one by ``--model.student FOLDER``.

    Args:
        student: as in ``DistillModule``.
        **kwargs: as in ``DistillModule``.
    """

    def __init__(self, student: str | Path, **kwargs: Any) -> None:
        super().__init__(student, **kwargs)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The one task, of texts without labels. Raises a ``UserError`` if there are to be others."""
        # before their prefixes are compared
        if other := [name for name in init_args.get("tasks") or {} if name != TEXT.name]:
            raise UserError(f"tasks: {cls.__name__} has the task {TEXT.name} alone, not {other[0]}")
        return {TEXT.name: TEXT}

    @classmethod
    def check_tasks(cls, tasks: Mapping[str, Task]) -> None:
        """It needs no answer."""

    @property
    def answer_task(self) -> str:
        """The one task."""
        return TEXT.name

    def collect_answers(self, step: Step, batch: TaskBatch) -> None:
        """There are none."""

    def answer_metrics(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The perplexity of a target token."""
        loss = losses.get(f"{TEXT.name}_loss", math.inf)
        return {"perplexity": math.exp(loss)} if loss < 700 else {}
