"""The hooks that define a method."""

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_distill.batch import TaskBatch, TaskInputs, target_tokens
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import AnswerKey, Split
from lit_distill.modules.window import Counts
from lit_distill.objectives import Objective, Step
from lit_distill.students import Student
from lit_distill.tasks import Task, answer_task, rationale_task
from lit_distill.teachers.models import Teachers


class Hooks(pl.LightningModule):
    """The hooks of `DistillModule` that a method may override, and what training and evaluation share."""

    student: Student
    tasks: dict[str, Task]  # the tasks that the module trains on, by name; the data module must build the same
    objectives: nn.ModuleList
    teachers: Teachers
    _target_limits: dict[str, int]  # maximum generated tokens of each task, from the target lengths in train

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        """The losses of a micro-batch: named, unweighted scalars.

        By default each task's cross-entropy, the mean over its target tokens (Eq. 3 and 4 of the paper), and the
        objectives.
        """
        terms = {task: step.student.loss(task) for task in self.tasks}
        return terms | {objective.name: objective(step) for objective in self._objectives}

    def total_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """Combine the terms into the loss that is minimised; must be linear in them.

        By default their sum, each times the weight of its task or objective, or 1. It is applied to each micro-batch's
        share of the terms, and the results add up to the loss of the whole optimizer step.
        """
        weights = {task.name: task.weight for task in self.tasks.values()}
        weights |= {objective.name: objective.weight for objective in self._objectives}
        return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()

    def term_counts(self, batch: TaskBatch) -> Counts:
        """What each term is a mean over; a term that is absent here is averaged plainly.

        Must depend on the batch alone (it is called before the step begins) and name the same terms on every rank.
        """
        counts = {task: target_tokens(batch[task]) if task in batch else 0 for task in self.tasks}
        own = {objective.name: objective.counts(batch) for objective in self._objectives}
        return counts | {name: count for name, count in own.items() if count is not None}

    def prepare(self, window: list[TaskBatch]) -> None:
        """Change an optimizer step's micro-batches in place, before its targets are counted.

        By default each objective may. Runs in evaluation mode without gradients; random numbers depend on the run's
        seed, the step and the rank alone.

        Args:
            window: the step's micro-batches on this rank, on the data loader's device.
        """
        for batch in window:
            batch.update(self._missing(batch))
        steps = [self.step(batch) for batch in window]
        for objective in self._objectives:
            objective.prepare(steps)

    def process_logits(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
        """Change the scores of the next token; the identity by default.

        Args:
            task: the task that is generated.
            scores: ``(rows, vocabulary)``, float32.
            step: number of tokens generated so far.
            rows: the rows' positions in their split, ``(rows,)``.
        """
        return scores

    def step(self, batch: TaskBatch) -> Step:
        """The `Step` of a batch; tasks that the batch lacks are added without rows."""
        return Step({**batch, **missing} if (missing := self._missing(batch)) else batch, self.student, self.teachers)

    def _missing(self, batch: TaskBatch) -> TaskBatch:
        """The tasks that a batch lacks, without rows."""
        empty = torch.zeros(0, 1, dtype=torch.long, device=self.device)
        inputs: TaskInputs = {"input_ids": empty, "attention_mask": empty, "labels": empty, "index": empty[:, 0]}
        return {task: inputs.copy() for task in self.tasks if task not in batch}

    @property
    def _objectives(self) -> list[Objective]:
        return cast(list[Objective], list(self.objectives))

    @property
    def answer_task(self) -> str:
        """The first task whose text contains the label."""
        return answer_task(self.tasks).name

    @property
    def rationale_task(self) -> str | None:
        """The task whose text contains the rationale: the answer task if it does, else the first that does."""
        return found.name if (found := rationale_task(self.tasks)) is not None else None

    def generation_settings(self, task: str) -> dict[str, int]:
        """``generate``'s arguments for a task.

        The maximum length is the task's ``max_new_tokens``, or else the sum over its parts: as configured, as the
        targets of train need, or without training data as the student's configuration says (else 64 for a label, 256
        for a rationale).
        """
        own = self.tasks[task]
        defaults = {"label": 64} if own.gives_label else {}
        if own.gives_rationale or not own.gives_label:
            defaults["rationale"] = 256
        configured = [self.hparams[f"max_{part}_length"] for part in defaults]
        length = sum(part or 0 for part in configured)
        if None in configured:
            exported = (getattr(self.student.model.config, "task_specific_params", None) or {}).get(task, {})
            length += self._target_limits.get(task, exported.get("max_new_tokens", sum(defaults.values())))
        return {"max_new_tokens": own.max_new_tokens or length, "num_beams": self.hparams["num_beams"]}

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded over ranks, so that each forward pass is a collective."""
        name = type(self._trainer.strategy).__name__ if self._trainer is not None else ""
        return name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")

    def answer_key(self, split: Split) -> AnswerKey:
        """The data module's answer key of a split. Raises a ``UserError`` if the trainer has bare data loaders."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "answer_key"):
            raise UserError(
                "datamodule: evaluation needs the data's answers: pass a RationaleDataModule (an object with"
                " `answer_key(split)`) to the trainer, not bare data loaders"
            )
        found: AnswerKey = datamodule.answer_key(split)
        return found


def task_texts(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Prefixes and targets in plain types, to compare with those of the data module or a checkpoint."""
    return {name: [task.prefix, task.target] for name, task in tasks.items()}
