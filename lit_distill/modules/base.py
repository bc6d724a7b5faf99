"""DistillModule: a student, the tasks and objectives that it is trained on, and the settings of its training."""

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
    """A student and how it is trained; the base of every method.

    A method is a subclass that names its tasks (`make_tasks`) and overrides ``loss_terms`` (which losses) or
    ``total_loss`` (how they are combined), never ``training_step``; or a list of ``objectives`` that adds losses.

    A term that is named after a task is a mean over that task's target tokens, and stays one over the whole optimizer
    step: all micro-batches of ``accumulate_grad_batches`` and all ranks, also where an epoch's last step has fewer
    micro-batches. So does an objective over what it counts. Every other term is averaged plainly over micro-batches and
    ranks, unless ``term_counts`` says what it averages over.

    Args:
        student: a hub name, a folder, a folder with a configuration only, or a checkpoint file of this framework.
        tasks: tasks beside those of the method, or other settings of these, by name:
            ``{rationale: {weight: 0.5, max_new_tokens: 200}}``.
        objectives: losses beside those of the tasks.
        teachers: frozen models by the names that objectives call them.
        from_scratch: random weights from the student's configuration.
        dtype: what the student's weights are kept in. Small updates are lost in ``bfloat16``; it suits a large student
            of which only an adapter is trained.
        adapter: train an adapter in the layers of the frozen student: LoRA's ``r``, ``alpha``, ``dropout`` and
            ``target_modules``, or another of PEFT's configurations as ``class_path`` and ``init_args``; ``export`` says
            whether it is saved ``merged`` into the student or as an ``adapter`` alone.
        learning_rate: the highest learning rate, reached after the warm-up.
        optimizer: ``adamw``, or ``adafactor`` with the given learning rate (no relative steps).
        weight_decay: decoupled weight decay, left out for biases and layer norms.
        lr_schedule: ``linear`` to 0 at the last step, or ``constant``, both after the warm-up.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        dropout: dropout rate in place of the student's own.
        activation_checkpointing: recompute activations in the backward pass: less memory, a slower step.
        fast: run the student's layers on real tokens only, losses and greedy decoding included: the same mathematics,
            faster. A student, a strategy or a batch that this cannot serve runs through the student's own forward, and
            the run says why. Gradients of gradients need ``false``.
        compile: train through the student's own forward compiled by ``torch.compile`` for any shape, in place of the
            fast path; lengths rounded up by ``data.pad_to_multiple_of`` suit it. Evaluation is not compiled.
        max_label_length: generated tokens at most for a label; by default half more than the longest label target in
            train has. The paper's is 64.
        max_rationale_length: generated tokens at most for a rationale; by default half more than the longest in train.
        num_beams: beams of the generation; 1 is greedy.
        evaluate_losses: compute the losses of ``all`` terms in evaluation, or only that of the task that gives the
            ``answer``, at less than half the time where there are two tasks; there is no ``val/loss`` then, and a
            method has to name a term after that task.
        evaluate_rationales: generate the rationale of every row in evaluation and score it.
        score_choices: with closed choices, also answer by their likelihoods.
        num_samples: rows of an evaluation whose rationales are generated and shown.
        effective_batch_size: examples an optimizer step that the settings were written for; a warning tells when the
            run's differ.

    Raises:
        UserError: an argument is out of its range, or the student cannot be loaded.
    """

    def __init__(
        self,
        student: str | Path,
        *,
        tasks: dict[str, dict[str, Any] | Task] | None = None,
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
        compile: bool = False,
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
        # called from here, this still finds the subclass's own arguments
        self.save_hyperparameters()
        self.tasks = self.all_tasks(self.hparams)
        answer_task(self.tasks)
        self.teachers = Teachers(teachers)
        self.objectives = nn.ModuleList(objectives or [])
        check_objectives(objectives or [], list(self.tasks), self.teachers)
        # plain types only: a checkpoint is read with `weights_only=True`
        self.hparams["student"] = str(student)
        self.hparams["tasks"] = tasks and {
            name: given.plain() if isinstance(given, Task) else dict(given) for name, given in tasks.items()
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
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            meta=is_deferred(),
        )
        if evaluate_rationales and self.rationale_task is None:
            rank_zero_warn(f"evaluate_rationales: {type(self).__name__} writes no rationales, none are scored")

    def configure_model(self) -> None:
        """Give a student that was built without weights those that it is to have under this strategy."""
        if any(parameter.is_meta for parameter in self.student.parameters()):
            load = partial(students.load_model, self._student_source, **self._model_settings)
            give_weights(self.student, self.trainer.strategy, load)

    @classmethod
    def make_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The method's own tasks for a module with these constructor arguments; `init_settings` adds the defaults."""
        return {"label": LABEL}

    @classmethod
    def all_tasks(cls, init_args: Mapping[str, Any]) -> dict[str, Task]:
        """The method's tasks with those that ``tasks`` adds or changes.

        The command line asks the class, so that the data module builds the same tasks without a module.

        Raises:
            UserError: a task is not as it should be, or two have the same prefix.
        """
        settings = cls.init_settings(init_args)
        made: dict[str, Any] = dict(cls.make_tasks(settings))
        for name, given in (settings.get("tasks") or {}).items():
            plain = isinstance(given, Mapping) and name in made
            made[name] = {**made[name].plain(), **given} if plain else given
        return tasks_from(made)

    @classmethod
    def init_settings(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """These constructor arguments, and the defaults of the others (a subclass's own before its base's)."""
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
