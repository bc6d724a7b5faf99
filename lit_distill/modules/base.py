"""DistillModule: the student, its tasks and objectives, and the training settings."""

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_distill import students
from lit_distill.checks import check_choice, check_range
from lit_distill.modules.checkpoint import Checkpointing
from lit_distill.modules.evaluating import Evaluating
from lit_distill.modules.optimization import OptimizerName, ScheduleName
from lit_distill.objectives import Objective
from lit_distill.objectives.base import check_objectives
from lit_distill.students.models import Dtype
from lit_distill.students.sharding import give_weights, is_deferred
from lit_distill.tasks import LABEL, Task, answer_task, tasks_from
from lit_distill.teachers.models import TeacherModel, Teachers


class DistillModule(Evaluating, Checkpointing):
    """Base of every method: a student and how it is trained.

    A method is a subclass that defines its tasks (`make_tasks`) and overrides ``loss_terms`` (which losses) or
    ``total_loss`` (how they are combined), never ``training_step``. Or it is a list of ``objectives``, which add
    losses.

    A term named after a task is the mean over that task's target tokens in the whole optimizer step: over all
    micro-batches of ``accumulate_grad_batches`` and all ranks, even where an epoch's last step has fewer micro-batches.
    The same holds for an objective and what it counts. Every other term is averaged over micro-batches and ranks,
    unless ``term_counts`` says what it is a mean over.

    Args:
        student: a hub name, a folder (with weights, or a configuration only), or a checkpoint file of this framework.
        tasks: further tasks, or changed settings of the method's own, by name: ``{rationale: {weight: 0.5,
            max_new_tokens: 200}}``.
        objectives: losses in addition to those of the tasks.
        teachers: frozen models, by the names that objectives use.
        from_scratch: initialise the weights randomly from the student's configuration.
        dtype: of the student's weights. ``bfloat16`` loses small updates; use it for a large student of which only an
            adapter is trained.
        adapter: train an adapter and freeze the student: LoRA's ``r``, ``alpha``, ``dropout`` and ``target_modules``,
            or another PEFT configuration as ``class_path`` and ``init_args``; ``export`` is ``merged`` to save the
            adapter merged into the student, or ``adapter`` to save it alone.
        learning_rate: the peak learning rate, reached after the warm-up.
        optimizer: ``adamw``, or ``adafactor`` with the given learning rate (no relative steps).
        weight_decay: decoupled weight decay, not applied to biases and layer norms.
        lr_schedule: ``linear`` to 0 at the last step, or ``constant``, both after the warm-up.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        dropout: dropout rate in place of the student's own.
        activation_checkpointing: recompute activations in the backward pass: less memory, slower steps.
        fast: compute on real tokens only, without padding, losses and greedy decoding included: the same mathematics,
            faster. Where it is not supported the student's own forward runs, and the run says why. Second-order
            gradients need ``false``.
        max_label_length: maximum generated tokens for a label; by default 1.5 times the longest label target in train.
            The paper uses 64.
        max_rationale_length: maximum generated tokens for a rationale; by default 1.5 times the longest in train.
        num_beams: beams in generation; 1 is greedy.
        evaluate_losses: in evaluation, compute ``all`` loss terms, or only that of the ``answer`` task, which with two
            tasks takes less than half the time; there is no ``val/loss`` then, and the method must have a term of that
            name.
        evaluate_rationales: generate and score the rationale of every row in evaluation.
        score_choices: with closed choices, also answer by the most likely choice.
        num_samples: rows of an evaluation whose generated rationales are shown.
        effective_batch_size: examples per optimizer step that the settings were tuned for; a run with another size
            warns.

    Raises:
        UserError: an argument is out of range, or the student cannot be loaded.
    """

    def __init__(
        self,
        student: str | Path,
        *,
        tasks: dict[str, Any] | None = None,
        objectives: list[Objective] | None = None,
        teachers: dict[str, TeacherModel] | None = None,
        from_scratch: bool = False,
        dtype: Dtype = "float32",
        adapter: dict[str, Any] | None = None,
        learning_rate: float = 5e-5,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        lr_schedule: ScheduleName = "linear",
        warmup_steps: int = 0,
        dropout: float | None = None,
        activation_checkpointing: bool = False,
        fast: bool = True,
        max_label_length: int | None = None,
        max_rationale_length: int | None = None,
        num_beams: int = 1,
        evaluate_losses: Literal["all", "answer"] = "all",
        evaluate_rationales: bool = False,
        score_choices: bool = True,
        num_samples: int = 8,
        effective_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_range("learning_rate", learning_rate, above=0)
        check_range("weight_decay", weight_decay, at_least=0)
        check_range("warmup_steps", warmup_steps, at_least=0, whole=True)
        check_range("dropout", dropout, at_least=0, below=1)
        check_range("max_label_length", max_label_length, at_least=1, below=10_001, whole=True)
        check_range("max_rationale_length", max_rationale_length, at_least=1, below=10_001, whole=True)
        check_range("num_beams", num_beams, at_least=1, below=101, whole=True)
        check_range("num_samples", num_samples, at_least=0, whole=True)
        check_range("effective_batch_size", effective_batch_size, at_least=1, whole=True)
        check_choice("evaluate_losses", evaluate_losses, ("all", "answer"))
        # Lightning finds the subclass's arguments from here, too
        self.save_hyperparameters()
        self.tasks = self.all_tasks(self.hparams)
        self.teachers = Teachers(teachers)
        self.objectives = nn.ModuleList(objectives or [])
        check_objectives(objectives or [], list(self.tasks), self.teachers)
        # plain types only: a checkpoint is read with `weights_only=True`
        self.hparams["student"] = str(student)
        self.hparams["tasks"] = tasks and {
            name: given.plain() if isinstance(given, Task) else dict(given or {}) for name, given in tasks.items()
        }
        self.hparams["objectives"] = objectives and [objective.plain() for objective in objectives]
        self.hparams["teachers"] = teachers and self.teachers.plain()
        self.hparams["adapter"] = adapter and dict(adapter)
        self.set_logged_hparams()
        self._student_source = student
        self._model_settings: dict[str, Any] = {
            "from_scratch": from_scratch,
            "dropout": dropout,
            "dtype": dtype,
            "adapter": adapter,
        }
        self.student = students.load(
            student,
            **self._model_settings,
            fast=fast,
            activation_checkpointing=activation_checkpointing,
            meta=is_deferred(),
        )
        if evaluate_rationales and self.rationale_task is None:
            rank_zero_warn(f"evaluate_rationales: {type(self).__name__} writes no rationales, none are scored")

    def configure_model(self) -> None:
        """Initialise or load the weights of a student that was built without them, as the strategy needs."""
        if any(parameter.is_meta for parameter in self.student.parameters()):
            load = partial(students.load_model, self._student_source, **self._model_settings)
            give_weights(self.student, self.trainer.strategy, load)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The method's own tasks, from constructor arguments (`init_settings` adds the defaults)."""
        return {"label": LABEL}

    @classmethod
    def all_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The method's tasks, with those that ``tasks`` adds or changes.

        A class method, so that the command line can build the data module before the module.

        Raises:
            UserError: a task is invalid, two have the same prefix, or none gives a label.
        """
        settings = cls.init_settings(init_args)
        made: dict[str, Any] = dict(cls.make_tasks(settings))
        for name, given in (settings.get("tasks") or {}).items():
            plain = isinstance(given, Mapping) and name in made
            made[name] = {**made[name].plain(), **given} if plain else given
        tasks = tasks_from(made)
        answer_task(tasks)
        return tasks

    @classmethod
    def init_settings(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """These constructor arguments with the defaults of the others; a subclass's defaults win."""
        defaults = {
            name: parameter.default
            for klass in reversed(cls.__mro__)
            if "__init__" in vars(klass)
            for name, parameter in inspect.signature(vars(klass)["__init__"]).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        return defaults | dict(init_args)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.student.tokenizer
