"""DistillModule: made from settings or from a checkpoint, and saved in one."""

import copy
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_distill import students
from lit_distill.checks import check_choice, check_range
from lit_distill.errors import UserError
from lit_distill.modules.counting import TokenCount
from lit_distill.modules.evaluating import Evaluating
from lit_distill.modules.optimization import OptimizerName, ScheduleName, check_numbers
from lit_distill.modules.voting import Vote
from lit_distill.modules.weighting import UncertaintyWeighting, WeightingName
from lit_distill.modules.window import rewind
from lit_distill.objectives import Objective, build_objective, check_objectives
from lit_distill.students.adapters import Adapter
from lit_distill.students.files import CHECKPOINT_KEY, check_weights
from lit_distill.students.mimetic import FromScratch
from lit_distill.students.models import Dtype
from lit_distill.students.seq2seq import PATHS, Fast, path_of
from lit_distill.students.sharding import give_weights, is_deferred
from lit_distill.students.timing import Choice
from lit_distill.tasks import LABEL, Task, answer_task, task_texts, tasks_from
from lit_distill.teachers.models import TeacherModel, Teachers

_SEED_KEY = "lit_distill_seed"
_TASKS_KEY = "lit_distill_tasks"
_PATHS_KEY = "lit_distill_paths"
LIMITS_KEY = "lit_distill_target_limits"
_TOKENS_KEY = "lit_distill_train_tokens"


class DistillModule(Evaluating):
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
        weighting: ``uncertainty`` trains a factor beside each task's and objective's weight, inverse to its loss in the
            end (`UncertaintyWeighting`), which is logged, saved in checkpoints, and no part of the exported student.
        teachers: frozen models, by the names that objectives use.
        from_scratch: initialise the weights randomly from the student's configuration. ``mimetic``: a T5's encoder also
            begins with heads that look for like words, the first to the left and the second to the right, without
            which it learns little from few rows.
        dtype: of the student's weights. ``bfloat16`` loses small updates; use it for a large student of which only an
            adapter is trained.
        adapter: train an adapter and freeze the student: LoRA's ``r``, ``alpha``, ``dropout`` and ``target_modules``,
            or another PEFT configuration as ``class_path`` and ``init_args``; ``export`` is ``merged`` to save the
            adapter merged into the student, or ``adapter`` to save it alone.
        learning_rate: the peak learning rate, reached after the warm-up.
        optimizer: ``adamw``, or ``adafactor`` with the given learning rate (no relative steps). ``adafactor_scaled``
            multiplies it by each parameter's root mean square, at least 1e-3, as T5 was pretrained (Shazeer and Stern
            2018, section 8): a T5 from random weights has embeddings of 1 and queries of 0.01, for which no one rate
            is right.
        weight_decay: decoupled weight decay, not applied to biases and layer norms.
        lr_schedule: ``linear`` to 0 at the last step, or ``constant``, both after the warm-up.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        dropout: dropout rate in place of the student's own.
        activation_checkpointing: recompute activations in the backward pass: less memory, slower steps.
        fast: how a T5 is computed. ``packed`` (or true): on real tokens only, without padding, losses and greedy
            decoding included: the same mathematics, faster. ``plain`` (or false): by the student's own forward, which
            also runs where the packed one is not supported; the run says why. Second-order gradients need ``plain``.
            ``compiled``: the packed one as one graph of few kernels, for GPUs; its first steps take minutes, and no
            adapter and no activation checkpointing are supported. ``auto`` times these on a run's first batch and takes
            the fastest; on a CPU ``packed``, unless ``plain`` takes at most 90 % of its time. A resumed run keeps it.
            Two runs are the same to the last bit only on the same path.
        max_label_length: maximum generated tokens for a label; by default 1.5 times the longest label target in train.
            The paper uses 64.
        max_rationale_length: maximum generated tokens for a rationale; by default 1.5 times the longest in train.
        num_beams: beams in generation; 1 is greedy.
        evaluate_rationales: generate and score the rationale of every row in evaluation.
        score_choices: with closed choices, also answer by the most likely choice.
        vote: also answer by the vote of several texts in ``test`` and ``predict``: ``{samples: 8}`` of the answer task,
            or ``{tasks: [label, program]}``, each task's greedy text.
        num_samples: rows of an evaluation whose generated rationales are shown.
        effective_batch_size: examples per optimizer step that the settings were tuned for; a run with another size
            warns.
    """

    def __init__(
        self,
        student: str | Path,
        *,
        tasks: dict[str, Any] | None = None,
        objectives: list[Objective] | None = None,
        weighting: WeightingName = "fixed",
        teachers: dict[str, TeacherModel] | None = None,
        from_scratch: FromScratch = False,
        dtype: Dtype = "float32",
        adapter: dict[str, Any] | None = None,
        learning_rate: float = 5e-5,
        optimizer: OptimizerName = "adamw",
        weight_decay: float = 0.0,
        lr_schedule: ScheduleName = "linear",
        warmup_steps: int = 0,
        dropout: float | None = None,
        activation_checkpointing: bool = False,
        fast: Fast = "auto",
        max_label_length: int | None = None,
        max_rationale_length: int | None = None,
        num_beams: int = 1,
        evaluate_rationales: bool = False,
        score_choices: bool = True,
        vote: Vote | None = None,
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
        if adapter and optimizer == "adafactor_scaled":
            raise UserError(
                "optimizer: adafactor_scaled hardly moves an adapter, which begins at 0; use adamw or adafactor"
            )
        # Lightning finds the subclass's arguments from here, too
        self.save_hyperparameters()
        self.tasks = self.all_tasks(self.hparams)
        # a checkpoint holds plain types
        self.vote = Vote(**vote) if isinstance(vote, Mapping) else vote
        if self.vote is not None:
            self.vote.check(self.tasks, num_beams)
        self.teachers = Teachers(teachers)
        self.objectives = nn.ModuleList(objectives or [])  # type: ignore[assignment]
        check_objectives(objectives or [], list(self.tasks), self.teachers)
        check_choice("weighting", weighting, get_args(WeightingName))
        self.weighting = self._trained_weighting() if weighting == "uncertainty" else None
        # plain types only: a checkpoint is read with `weights_only=True`
        plain_tasks = tasks and {
            name: given.plain() if isinstance(given, Task) else dict(given or {}) for name, given in tasks.items()
        }
        self._record_hparams(
            student=str(student),
            tasks=plain_tasks,
            objectives=objectives and [objective.plain() for objective in objectives],
            teachers=teachers and self.teachers.plain(),
            adapter=adapter and dict(adapter),
            vote=self.vote and asdict(self.vote),
        )
        self._student_source = student
        self._model_settings: dict[str, Any] = {
            "from_scratch": from_scratch, "dropout": dropout, "dtype": dtype, "adapter": adapter,
        }  # fmt: skip
        self.student = students.load(
            student,
            **self._model_settings,
            fast=fast,
            activation_checkpointing=activation_checkpointing,
            meta=is_deferred(),
        )
        if evaluate_rationales and self.rationale_task is None:
            rank_zero_warn(f"evaluate_rationales: {type(self).__name__} writes no rationales, none are scored")

    def _trained_weighting(self) -> UncertaintyWeighting:
        if type(self).total_loss is not Evaluating.total_loss:
            raise UserError(f"weighting: {type(self).__name__} weighs its terms itself (total_loss); use fixed")
        if negative := [objective.name for objective in self.objectives if objective.may_be_negative]:
            raise UserError(
                f"weighting: {negative[0]} can be below 0, and its weight would grow without end; use fixed"
            )
        return UncertaintyWeighting(len(self.tasks) + len(self.objectives))

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
        """The method's tasks, with those that ``tasks`` adds or changes. Raises a ``UserError`` for invalid ones.

        A class method, so that the command line can build the data module before the module.
        """
        settings = cls.init_settings(init_args)
        made: dict[str, Any] = dict(cls.make_tasks(settings))
        for name, given in (settings.get("tasks") or {}).items():
            plain = isinstance(given, Mapping) and name in made
            made[name] = {**made[name].plain(), **given} if plain else given
        tasks = tasks_from(made)
        cls.check_tasks(tasks)
        return tasks

    @classmethod
    def check_tasks(cls, tasks: Mapping[str, Task]) -> None:
        """Raise a ``UserError`` unless one of the tasks gives an answer."""
        answer_task(tasks)

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

    def _record_hparams(self, **values: Any) -> None:
        """Change hyperparameters, and log them without the tasks, which the data module logs."""
        self.hparams.update(values)
        self._hparams_initial = copy.deepcopy(self.hparams)
        del self._hparams_initial["tasks"]

    def setup(self, stage: str) -> None:
        """Check before training that a checkpoint can hold the settings, which include those of a user's classes."""
        if stage == "fit" and self.trainer.checkpoint_callbacks:
            data = getattr(getattr(self.trainer, "datamodule", None), "hparams", {})
            for name, value in [*data.items(), *self.hparams.items()]:
                try:
                    json.dumps(value)
                except TypeError as error:
                    raise UserError(
                        f"{name}: a checkpoint cannot hold it ({error}); use numbers, texts, lists and mappings"
                    ) from error
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what loading needs, and rewind the progress to the last complete optimizer step.

        Raises a ``UserError``, and writes nothing, if a weight or the last step's loss or gradient is not finite.
        """
        self.check_finite()
        if not self.sharded:
            check_weights(checkpoint["state_dict"], f"step {checkpoint['global_step']}")
        checkpoint[CHECKPOINT_KEY] = self.student.record()
        checkpoint[_TASKS_KEY] = task_texts(self.tasks)
        checkpoint[LIMITS_KEY] = dict(self._target_limits)
        checkpoint[_TOKENS_KEY] = self.train_tokens()
        if self._seed >= 0:
            checkpoint[_SEED_KEY] = self._seed
        if self.chosen_paths:
            checkpoint[_PATHS_KEY] = {stage: asdict(choice) for stage, choice in self.chosen_paths.items()}
        if "loops" in checkpoint and self._trainer is not None:
            rewind(checkpoint, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore seed and position. Raises a ``UserError`` if weights are not finite or another method's."""
        if not self.sharded:
            check_weights(checkpoint["state_dict"], "ckpt_path")
        adapter = self.student.adapter
        kept = checkpoint.get(CHECKPOINT_KEY, {}).get("adapter")
        compared: dict[str, tuple[Any, Any]] = {
            "adapter": (Adapter.of(kept).trained() if kept else {}, adapter.trained() if adapter else {}),
            "tasks (prefix and target)": (checkpoint.get(_TASKS_KEY), task_texts(self.tasks)),
        }
        if self._trainer is not None and self._trainer.training:
            # of all ranks together; older checkpoints do not tell
            self._count = TokenCount(0 if self.global_rank else checkpoint.get(_TOKENS_KEY, -(2**62)))
            before = checkpoint.get("hyper_parameters", {}).get("optimizer")
            compared["optimizer"] = (before, self.hparams["optimizer"])
            groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
            check_numbers([*groups, *checkpoint.get("lr_schedulers", [])])
            if self.hparams["fast"] == "auto":
                fast = checkpoint.get("hyper_parameters", {}).get("fast", "auto")
                named = {} if fast == "auto" else {"training": {"path": path_of(fast)}}
                for stage, choice in checkpoint.get(_PATHS_KEY, named).items():
                    check_choice("ckpt_path: path", choice["path"], tuple(PATHS))
                    self.take_path(stage, Choice(**choice))
        for name, (before, now) in compared.items():
            if before not in (None, now):
                raise UserError(
                    f"ckpt_path: the checkpoint was trained with {name} {before}, not {now};"
                    " give the method and its arguments as they were"
                )
        self._target_limits = dict(checkpoint.get(LIMITS_KEY, {}))
        self._seed = checkpoint.get(_SEED_KEY, self._seed)
        if (loops := checkpoint.get("loops")) is not None:
            loop = loops["fit_loop"]
            batches = loop["epoch_loop.batch_progress"]["current"]["completed"]
            self._resumed = (batches, loop["state_dict"].get("combined_loader", []))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> Self:  # type: ignore[override]  # a descriptor
        """As Lightning's, but rebuilds the student from the checkpoint and unpickles plain data only.

        ``kwargs`` are Lightning's own arguments, and constructor arguments that replace the saved ones (``student``
        changes the recorded name only).
        """
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
        given = {"weights_only": True, "from_scratch": True} | kwargs | {"student": str(checkpoint_path)}
        if objectives := saved.get("objectives"):
            given.setdefault("objectives", [build_objective(plain) for plain in objectives])
        module = super().load_from_checkpoint(checkpoint_path, **given)
        recorded = saved | kwargs
        module._record_hparams(student=str(recorded["student"]), from_scratch=recorded["from_scratch"])
        return module
