"""DistillModule: training, evaluation and checkpoints of a T5 student. A method overrides one of its two hooks."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, join, remember_rows, take, target_tokens
from lit_distill.checks import check_distinct, check_range
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, AnswerKey, AnswerSource, Evaluation, Split
from lit_distill.evaluation.summaries import gather_answers, summarise
from lit_distill.losses import token_cross_entropy
from lit_distill.modules.fast_path import FastPath
from lit_distill.modules.finite import Part, first_not_finite, part_of, rows_of
from lit_distill.modules.generation import add_rationales, answer_rows
from lit_distill.modules.optimization import (
    OptimizerName,
    ScheduleName,
    check_optimizer_states,
    clip_within_step,
    configure,
    take_off_clipping,
)
from lit_distill.modules.resume import consumed_batches, rewind, seed_step
from lit_distill.modules.window import Counts, Window, WindowLoader, WindowSource
from lit_distill.students import CHECKPOINT_KEY, check_weights, load_model, load_tokenizer, record_model

_SEED_KEY = "lit_distill_seed"
_PREFIXES_KEY = "lit_distill_prefixes"
_LIMITS_KEY = "lit_distill_target_limits"


class DistillModule(pl.LightningModule):
    """A T5 student and how it is trained; the base of every method.

    A method is a subclass that names its tasks and overrides ``loss_terms`` (which losses) or ``total_loss`` (how they
    are combined), never ``training_step``. The prefix of a task is the constructor argument ``<task>_prefix``.

    A term that is named after a task is a mean over that task's target tokens, and stays one over the whole optimizer
    step: all micro-batches of ``accumulate_grad_batches`` and all ranks, also where an epoch's last step has fewer
    micro-batches. Every other term is averaged plainly over micro-batches and ranks, unless ``term_counts`` says what
    it averages over.

    Args:
        student: a hub name, a folder, a folder with a configuration only, or a checkpoint file of this framework.
        from_scratch: random weights from the student's configuration.
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

    tasks: ClassVar[tuple[str, ...]] = ("label",)
    """The tasks that the method trains on; the data module builds exactly these."""

    def __init__(
        self,
        student: str | Path,
        *,
        from_scratch: bool = False,
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
        if evaluate_losses not in ("all", "answer"):
            raise UserError(f"evaluate_losses must be one of all, answer, got {evaluate_losses!r}")
        # called from here, this still finds the subclass's own arguments
        self.save_hyperparameters()
        self.hparams["student"] = str(student)
        self._hparams_initial = copy.deepcopy(self.hparams)
        self.prefixes: dict[str, str] = check_distinct(self.task_prefixes(dict(self.hparams)))
        self.student = load_model(student, from_scratch=from_scratch, dropout=dropout)
        if activation_checkpointing:
            # older releases of transformers know only the second name, which newer ones deprecate
            enable = getattr(self.student, "activation_checkpointing_enable", None)
            (enable or self.student.gradient_checkpointing_enable)({"use_reentrant": False})
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(student)
        if len(self.tokenizer) > self.student.config.vocab_size:
            raise UserError(
                f"student: the tokenizer of {str(student)!r} has {len(self.tokenizer)} tokens, its configuration's"
                f" vocab_size is {self.student.config.vocab_size}"
            )
        if evaluate_rationales and self.rationale_task is None:
            rank_zero_warn(f"evaluate_rationales: {type(self).__name__} writes no rationales, none are scored")
        self.fast_path = FastPath(self, wanted=fast)
        self.evaluation: Evaluation | None = None
        """What the last complete evaluation found; sanity checks do not count."""
        self._seed: int | None = None
        self._resumed_batches = 0
        self._resumed_loaders: list[dict[str, Any]] = []
        self._windows: WindowLoader | None = None
        self._window: Window | None = None
        self._window_weights: dict[str, Tensor] = {}
        self._window_terms: dict[str, Tensor] = {}
        self._window_parts: list[Part] = []
        self._gradient_norm: Tensor | None = None
        self._target_limits: dict[str, int] = {}
        self._told: set[str] = set()
        self._forget_evaluation()

    # ------------------------------------------------------------------ the two hooks, and what they declare

    def loss_terms(self, batch: TaskBatch) -> dict[str, Tensor]:
        """The losses of a batch: named, unweighted scalars."""
        return self.task_losses(batch, self.active_tasks)

    def total_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """How the losses are combined into the one that is minimised; it has to be linear in them.

        It is applied to each micro-batch's share of the terms, whose sum over the optimizer step is then the loss of
        the whole step.
        """
        return torch.stack(list(terms.values())).sum()

    def term_counts(self, batch: TaskBatch) -> Counts:
        """What each term averages over; a term that is absent here is averaged plainly.

        It has to be known from the batch alone (it is asked for before the step begins) and to name the same terms on
        every rank.
        """
        return {task: target_tokens(batch[task]) if task in batch else 0 for task in self.active_tasks}

    @classmethod
    def task_prefixes(cls, init_args: Mapping[str, Any]) -> dict[str, str]:
        """Task -> input prefix for a module with these constructor arguments, without building one.

        The command line asks the class, so that the data module builds the same tasks with the same prefixes.
        """
        settings = cls.init_settings(init_args)
        return {task: settings.get(f"{task}_prefix") or "" for task in cls.tasks}

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
    def active_tasks(self) -> tuple[str, ...]:
        """The tasks of this very module (a subclass's arguments may change them)."""
        return tuple(self.prefixes)

    @property
    def answer_task(self) -> str:
        """The task whose generated text holds the label."""
        return "label" if "label" in self.prefixes else self.active_tasks[0]

    @property
    def rationale_task(self) -> str | None:
        """The task whose generated text holds the rationale, if there is one."""
        return next((task for task in self.active_tasks if "rationale" in task), None)

    # ------------------------------------------------------------------ what a variant composes its losses of

    def task_logits(self, batch: TaskBatch, task: str) -> tuple[Tensor, Tensor]:
        """A task's logits under teacher forcing, and the labels that they are scored against.

        A task without rows gives one row that counts nothing: each rank runs the same number of forward passes, which
        sharded strategies wait for, and every parameter has a gradient.

        Returns:
            Logits ``(batch, target_len, vocabulary)`` and labels ``(batch, target_len)``.
        """
        inputs = self._task_inputs(batch, task)
        labels = inputs["labels"]
        forward = self._compiled_forward() if self.hparams["compile"] and torch.is_grad_enabled() else self.student
        output = forward(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=self.student.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
        return output.logits, labels

    def task_losses(self, batch: TaskBatch, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Each task's cross-entropy, the mean over its target tokens (Eq. 3 and 4 of the paper); 0 without any.

        On the fast path all tasks share one pass over the student. Where a subclass computes logits or a task's loss
        in its own way, each task goes through that.
        """
        inputs = [self._task_inputs(batch, task) for task in tasks]
        if self.overrides("task_loss") or not self.fast_path.applies_to_losses(inputs):
            return {task: self.task_loss(batch, task) for task in tasks}
        return dict(zip(tasks, self.fast_path.losses(inputs), strict=True))

    def task_loss(self, batch: TaskBatch, task: str) -> Tensor:
        """One task's cross-entropy; tasks that are wanted together cost less through `task_losses`."""
        inputs = self._task_inputs(batch, task)
        if self.fast_path.applies_to_losses([inputs]):
            return self.fast_path.losses([inputs])[0]
        return token_cross_entropy(*self.task_logits(batch, task))

    def _compiled_forward(self) -> Callable[..., Any]:
        """The student's forward, compiled once for all shapes."""
        compiled = self.__dict__.get("_compiled")
        # a copy of this module has a student of its own
        if compiled is None or compiled[0] is not self.student:
            compiled = self.student, torch.compile(self.student, dynamic=True)
            # not as an attribute of the module: what is compiled would be registered as a second student
            self.__dict__["_compiled"] = compiled
        return cast(Callable[..., Any], compiled[1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_compiled"}

    def _task_inputs(self, batch: TaskBatch, task: str) -> TaskInputs:
        inputs = batch.get(task)
        return self._nothing() if inputs is None or len(inputs["labels"]) == 0 else inputs

    def overrides(self, *names: str) -> bool:
        """Whether a subclass has methods of its own for any of these of the base."""
        return any(getattr(type(self), name) is not getattr(DistillModule, name) for name in names)

    def _nothing(self) -> TaskInputs:
        pad = cast(int, self.student.config.pad_token_id)
        ids = torch.full((1, 1), pad, device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.full_like(ids, IGNORE_INDEX),
        }

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Read the training data one optimizer step ahead; check that the data module builds this module's tasks."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and (built := getattr(datamodule, "prefixes", None)) is not None:
            self._check_tasks(dict(built))
        self.fast_path.prepare(self.trainer.strategy.root_device)
        if stage == "fit":
            # what an earlier run or `load_from_checkpoint` left; a run that resumes loads its own after this
            self._seed, self._resumed_batches, self._resumed_loaders = None, 0, []
            source: Any = self.trainer.fit_loop._data_source
            inner = source.inner if isinstance(source, WindowSource) else source
            self.trainer.fit_loop._data_source = WindowSource(inner, self._read_ahead)  # type: ignore[assignment]
            if (limits := getattr(datamodule, "target_limits", None)) is not None:
                self._target_limits = limits()

    def _check_tasks(self, built: dict[str, str]) -> None:
        if built != self.prefixes:
            raise UserError(
                f"tasks: {type(self).__name__} trains on {self.prefixes} (task: prefix), but the data module builds"
                f" {built}; give the data module tasks={self.active_tasks!r} and prefixes={self.prefixes!r}"
            )

    def _read_ahead(self, loader: Any) -> WindowLoader:  # noqa: ANN401 - whatever Lightning takes
        mode = "max_size_cycle"
        if isinstance(loader, CombinedLoader):
            loader, mode = loader.iterables, loader._mode
        self._windows = WindowLoader(
            loader,
            mode,
            size=lambda: self.trainer.accumulate_grad_batches,
            count=self.term_counts,
            position=self._resumed_batches,
            states=self._resumed_loaders,
        )
        self._resumed_batches, self._resumed_loaders = 0, []
        return self._windows

    def on_fit_start(self) -> None:
        """Fix the run's seed, and compare the effective batch with the one that the settings were written for."""
        if self._seed is None:
            # one for all ranks: a checkpoint, which rank 0 writes, holds one
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**32))
        if limits := {task: self.generation_settings(task)["max_new_tokens"] for task in self._target_limits}:
            shown = ", ".join(f"{task} {length}" for task, length in limits.items())
            rank_zero_info(f"Generated tokens at most: {shown} (max_..._length sets them).")
        per_device = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if per_device is None:
            return
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        effective = per_device * accumulate * world
        parts = f"{per_device} a device x {accumulate} accumulated x {world} device(s)"
        rank_zero_info(f"Effective batch: {effective} examples an optimizer step ({parts}).")
        for logger in self.trainer.loggers:
            logger.log_hyperparams({"effective_batch": effective})
        wanted = self.hparams["effective_batch_size"]
        if wanted is not None and wanted != effective:
            rank_zero_warn(
                f"The effective batch is {effective} examples ({parts}), the settings were written for {wanted}:"
                " change batch_size or accumulate_grad_batches, or the learning rate and effective_batch_size with it."
            )

    def on_train_batch_start(self, batch: TaskBatch, batch_idx: int) -> None:
        """At the first micro-batch of a step: its random state, and what its terms are divided by."""
        if self._windows is None:
            return
        window = self._windows.next_window()
        if batch_idx != window.start:
            return
        # loggers number their rows by this count, which Lightning raises once too often where it resumes
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        assert self._seed is not None  # noqa: S101 - for the type checker
        seed_step(self._seed, self.trainer.global_step, self.trainer.global_rank)
        self._window = window
        self._window_weights = self.window_weights(window)
        self._window_terms, self._window_parts = {}, []

    def window_weights(self, window: Window) -> dict[str, Tensor]:
        """What turns a mean over one micro-batch's N_m counted things into its share of the mean over the whole step.

        A gradient is later divided by the accumulation factor k (Lightning, whatever the window's size) and averaged
        over the R ranks, so the share N_m / N of the step's N = sum over micro-batches and ranks is scaled by k R; the
        factor N_m is applied where the micro-batch is known. Under ``""`` stands the factor k / m of a plainly averaged
        term in a window of m micro-batches.
        """
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        names = sorted(window.counts)
        totals = torch.tensor([window.counts[name] for name in names], dtype=torch.float64)
        if world > 1:
            # float32 on the way: some accelerators reduce no float64; exact up to 2**24 counts a rank and step
            reduced = self.trainer.strategy.reduce(totals.float().to(self.device), reduce_op="sum")
            totals = cast(Tensor, reduced).double()
        scale = torch.where(totals > 0, accumulate * world / totals.clamp(min=1), 0.0).float()
        weights = {name: scale[i].to(self.device) for i, name in enumerate(names)}
        return weights | {"": torch.tensor(accumulate / window.size, device=self.device)}

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the step's gradient is that of the whole step's loss."""
        terms = self._checked(self.loss_terms(batch))
        if self._window is None:
            return self.total_loss(terms)
        # counted while the batch was on the host: the step does not wait for the device
        counts = self._window.batch_counts[batch_idx - self._window.start]
        self._window_parts.append(part_of(terms, batch))
        weights = self._window_weights
        scaled = {
            name: term * (weights[name] * counts[name] if name in counts else weights[""])
            for name, term in terms.items()
        }
        self._log_training(scaled, last=batch_idx + 1 == self._window.start + self._window.size)
        return self.total_loss(scaled)

    def _checked(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """These terms, if evaluation finds among them the one that it asks for; training asks before its first step."""
        if self.hparams["evaluate_losses"] == "answer" and self.answer_task not in terms:
            raise UserError(
                f"evaluate_losses must be all for a method without a loss term named {self.answer_task!r}, after the"
                f" task that gives the answer, got 'answer'; the terms of {type(self).__name__} are {', '.join(terms)}"
            )
        return terms

    def _log_training(self, scaled: dict[str, Tensor], *, last: bool) -> None:
        """Log each term as the mean over the whole step, once it is complete."""
        accumulate = self.trainer.accumulate_grad_batches
        for name, term in scaled.items():
            self._window_terms[name] = self._window_terms.get(name, 0.0) + term.detach() / accumulate
        if not last:
            return
        assert self._window is not None  # noqa: S101 - for the type checker
        distributed, examples = self.trainer.world_size > 1, max(self._window.examples, 1)
        for name, term in self._window_terms.items():
            if self._window.counts.get(name) == 0 and not self._window_weights[name]:
                # no rank has targets for it in this step; Lightning would log the last step's once more
                cast(dict[str, Any], self.trainer._results).pop(f"training_step.train/{name}_loss", None)
                continue
            self.log(f"train/{name}_loss", term, sync_dist=distributed, batch_size=examples)
        with torch.no_grad():
            total = self.total_loss(self._window_terms)
        self.log("train/loss", total, sync_dist=distributed, batch_size=examples, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient's norm before clipping, and stop a run whose loss or gradient is not finite.

        The weights have not moved yet. A device is waited for once a step, for one boolean. Under sharded strategies,
        where each rank has a part of the gradient, and under loss scaling, which leaves out such steps by itself, the
        loss alone is looked at.

        Raises:
            UserError: on all ranks; names the step, the term and the rows, and the last good checkpoint.
        """
        values, self._gradient_norm = list(self._window_terms.values()), None
        if not self.sharded:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)
            self.log("train/grad_norm", self._gradient_norm, batch_size=1)
            if not self._scales_losses:
                values.append(self._gradient_norm)
        bad = (~torch.stack([value.float() for value in values]).isfinite().all()).float()
        if self.trainer.world_size > 1:
            bad = cast(Tensor, self.trainer.strategy.reduce(bad, reduce_op="sum"))
        if bad:
            raise UserError(self._divergence())

    def _divergence(self) -> str:
        found = first_not_finite(self._window_parts)
        if found is not None:
            number, term, value = found
            micro_batch = (self._window.start if self._window else 0) + number
            rows = rows_of(self._window_parts[number], self._row_ids("train"))
            what = f"the {term} loss is {value} in micro-batch {micro_batch} of epoch {self.current_epoch}{rows}"
        else:
            gradients = ((name, p.grad) for name, p in self.named_parameters() if p.grad is not None)
            bad = next((name for name, gradient in gradients if not gradient.isfinite().all()), None)
            rows = rows_of(Part({}, [one for part in self._window_parts for one in part.rows]), self._row_ids("train"))
            what = f"the gradient{f' of {bad}' if bad else ''} is not finite{rows}"
        if self.trainer.world_size > 1:
            what += f" on rank {self.global_rank}"
        return f"step {self.trainer.global_step + 1}: {what}; {self._last_good()}"

    def _last_good(self) -> str:
        good = "none yet"
        for one in self.trainer.checkpoint_callbacks:
            if not isinstance(one, ModelCheckpoint):
                continue
            # on one process the last complete step is saved as the run ends
            saves = one.save_on_exception and self.trainer.world_size == 1
            if saves and one._last_global_step_saved != self.trainer.global_step:
                good = str(Path(str(one.dirpath)) / f"{one.filename}{one.FILE_EXTENSION}")
            elif one.best_model_path and Path(one.best_model_path).exists():
                good = one.best_model_path
        return f"the last good checkpoint: {good}"

    def _row_ids(self, split: Split) -> Sequence[str]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        return datamodule.answer_key(split).ids if hasattr(datamodule, "answer_key") else ()

    @property
    def _scales_losses(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    @property
    def window(self) -> Window | None:
        """The optimizer step that is under way."""
        return self._window

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Adafactor, with the schedule over the run's whole number of steps."""
        settings = self.hparams
        return configure(
            self,
            optimizer=settings["optimizer"],
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            schedule=settings["lr_schedule"],
            warmup_steps=settings["warmup_steps"],
            total_steps=lambda: self.trainer.estimated_stepping_batches,
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's; under FSDP the norm is taken over all ranks' shards, which Lightning refuses to do."""
        wrapped = self.trainer.strategy.model
        if gradient_clip_val and isinstance(wrapped, FullyShardedDataParallel):
            wrapped.clip_grad_norm_(gradient_clip_val)
            return
        by_norm = gradient_clip_algorithm in (None, "norm")
        # gradients that a loss scaler has scaled have another norm
        within = gradient_clip_val and by_norm and self.hparams["fast"] and not self.sharded and not self._scales_losses
        if not (within and clip_within_step(optimizer, float(gradient_clip_val or 0), self._gradient_norm)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """With the gradients of a step that was broken off goes what was to clip them."""
        take_off_clipping(optimizer)

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:  # noqa: ANN401 - as Lightning's
        """As Lightning's; while a batch lies on the host, its rows' lengths cost no waiting for the device.

        Not the hook ``transfer_batch_to_device`` itself: Lightning warns where a module has one beside a data module.
        """
        found = super()._call_batch_hook(hook_name, *args)
        if hook_name == "transfer_batch_to_device" and args[1].type != "cpu" and self.hparams["fast"]:
            owners = self, getattr(self._trainer, "datamodule", None)
            # a hook of somebody's own may change more than the device
            if not any(is_overridden(hook_name, owner) for owner in owners):
                remember_rows(args[0], found)
        return found

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Losses and answers of one batch of val."""
        self._evaluate(batch, "val")

    def test_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Losses and answers of one batch of test."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Forget what an evaluation that was broken off has left."""
        self._forget_evaluation()

    def on_test_epoch_start(self) -> None:
        """Forget what an evaluation that was broken off has left."""
        self._forget_evaluation()

    def _forget_evaluation(self) -> None:
        self._eval_parts: list[Part] = []
        self._eval_sums: dict[str, Tensor] = {}
        self._eval_answers: list[Answer] = []
        self._eval_samples: list[TaskInputs] = []

    def on_validation_epoch_end(self) -> None:
        """Metrics of val."""
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Metrics of test."""
        self._finish_evaluation("test")

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> list[Answer]:
        """Answers of one batch, with the rationales.

        Batches hold rows of similar length, longest first: ``Answer.index`` says which row an answer belongs to.
        """
        key = self._answer_key(cast(Split, getattr(self._datamodule(), "predict_split", "predict")))
        return self.answers(batch, key, rationales=True)

    def answers(self, batch: TaskBatch, key: AnswerKey, *, rationales: bool) -> list[Answer]:
        """What the student says of each row of an evaluation batch; see `lit_distill.modules.generation`."""
        return answer_rows(self, batch, key, rationales=rationales)

    def shape_scores(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
        """Change the scores that the next token is chosen by; as they are unless a subclass overrides this.

        Args:
            task: the task that is generated.
            scores: ``(rows, vocabulary)``, float32.
            step: tokens that were generated before this one.
            rows: the rows' positions in their split, ``(rows,)``.
        """
        return scores

    def generation_settings(self, task: str) -> dict[str, int]:
        """``generate``'s arguments for a task: a target is as long as its parts may be together.

        A part without a length of its own may be as long as train's targets of the task; of a student that was not
        trained here, as its own configuration says, or else 64 tokens for a label and 256 for a rationale.
        """
        parts = [part for part in ("label", "rationale") if part in task.split("_")]
        given = [length for part in parts if (length := self.hparams[f"max_{part}_length"]) is not None]
        length = sum(given)
        if len(given) < len(parts):
            exported = (getattr(self.student.config, "task_specific_params", None) or {}).get(task, {})
            default = exported.get("max_new_tokens", sum({"label": 64, "rationale": 256}[part] for part in parts))
            length += self._target_limits.get(task, default)
        return {"max_new_tokens": length, "num_beams": self.hparams["num_beams"]}

    def gather(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape from every rank, stacked."""
        return cast(Tensor, self.all_gather(tensor))

    @property
    def sharded(self) -> bool:
        """Whether the parameters are spread over ranks, so that each forward pass is a collective."""
        trainer = self._trainer
        name = type(trainer.strategy).__name__ if trainer is not None else ""
        return name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")

    def _evaluate(self, batch: TaskBatch, split: Literal["val", "test"]) -> None:
        key = self._answer_key(split)
        every = self.hparams["evaluate_losses"] == "all"
        counted = batch if every else {self.answer_task: batch[self.answer_task]}
        with self.fast_path.sharing(counted):
            terms, counts = self._checked(self.loss_terms(counted)), self.term_counts(counted)
            self._eval_parts.append(part_of({name: term for name, term in terms.items() if counts.get(name, 1)}, batch))
            self._eval_answers += self.answers(batch, key, rationales=self.hparams["evaluate_rationales"])
        self._sample_rationales(batch, key)
        if not every:
            terms = {self.answer_task: terms[self.answer_task]}
        for name, term in terms.items():
            number = counts.get(name, 1)
            if number == 0:
                # whatever a term is over nothing, NaN included
                term = torch.zeros_like(term)
            pair = torch.stack([term.detach().float() * number, torch.tensor(float(number), device=term.device)])
            self._eval_sums[name] = self._eval_sums.get(name, torch.zeros_like(pair)) + pair

    def _sample_rationales(self, batch: TaskBatch, key: AnswerKey) -> None:
        """Generate the rationales of the sample rows: all of them together, with the evaluation's last batch."""
        task = self.rationale_task
        if task in (None, self.answer_task) or self.hparams["evaluate_rationales"] or self.trainer.sanity_checking:
            return
        inputs = batch[task]
        index = inputs["index"].tolist()
        rows = [i for i, row in enumerate(index) if 0 <= row < self.hparams["num_samples"]]
        last = self.trainer._evaluation_loop.batch_progress.is_last_batch
        if last and self.sharded and self.hparams["num_samples"] and not rows and not self._eval_samples:
            # every rank has to generate as often, if only for a row that nobody asked for
            rows = [0]
        if rows:
            self._eval_samples.append(take(inputs, rows))
        if last and self._eval_samples:
            add_rationales(self, self._eval_answers, join(self._eval_samples), key)

    def _finish_evaluation(self, split: Literal["val", "test"]) -> None:
        sums, answers, parts = self._eval_sums, self._eval_answers, self._eval_parts
        self._forget_evaluation()
        names = sorted(sums)
        pairs = torch.stack([sums[name] for name in names]) if names else torch.zeros(0, 2, device=self.device)
        if self.trainer.world_size > 1:
            pairs = cast(Tensor, self.trainer.strategy.reduce(pairs, reduce_op="sum"))
            answers = gather_answers(answers, self.gather, self.device)
        else:
            # read longest first
            answers = sorted(answers, key=lambda answer: answer.index)
        if self.trainer.sanity_checking:
            return
        means = {name: total / count.clamp(min=1) for name, (total, count) in zip(names, pairs, strict=True)}
        measured = [name for name, (_, count) in zip(names, pairs, strict=True) if count > 0]
        metrics = {f"{name}_loss": float(means[name]) for name in measured}
        if self.hparams["evaluate_losses"] == "all" and measured:
            # it is linear: a term of 0 is one that is left out
            metrics["loss"] = float(self.total_loss(means))
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            found = first_not_finite(parts)
            rows = rows_of(parts[found[0]], self._row_ids(split)) if found else ""
            what = f"{split}/{bad[0]} is {metrics[bad[0]]}{rows}"
            fitting = self.trainer.state.fn == "fit"
            raise UserError(f"step {self.trainer.global_step}: {what}; {self._last_good()}" if fitting else what)
        self._say_unmeasured(split, [name for name in names if name not in measured])
        key = self._answer_key(split)
        settings = self.hparams
        metrics |= summarise(answers, key, rationales=settings["evaluate_rationales"], intervals=split == "test")
        samples = [answer for answer in answers if answer.index < settings["num_samples"]]
        self.evaluation = Evaluation(split, metrics, samples, key, answers)
        for name, value in metrics.items():
            # every rank holds the same value; the flag only says so to Lightning, which asks for it on any DDP run
            self.log(
                f"{split}/{name}",
                value,
                sync_dist=True,
                batch_size=1,
                prog_bar=split == "val" and name == "accuracy",
            )

    def _say_unmeasured(self, split: Literal["val", "test"], names: Sequence[str]) -> None:
        """Once each: terms that have nothing to be measured on, and answers that are right and cannot be given."""
        lines = []
        if names:
            keys = ", ".join(f"{split}/{name}_loss" for name in names)
            lines.append(f"{split} has no targets for {', '.join(names)}: no {keys}, {split}/loss is without")
        task, count = self.answer_task, getattr(self._datamodule(), "longer_targets", None)
        limit = self.generation_settings(task)["max_new_tokens"]
        if count is not None and (longer := count(split, task, limit)):
            lines.append(
                f"{split}: {longer} targets of {task} are longer than the {limit} tokens that are generated at most,"
                " and such answers are cut (max_..._length sets them)"
            )
        for line in lines:
            if line not in self._told:
                self._told.add(line)
                rank_zero_info(line)

    def _answer_key(self, split: Split) -> AnswerKey:
        return self._datamodule().answer_key(split)

    def _datamodule(self) -> AnswerSource:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "answer_key"):
            raise UserError(
                "datamodule: evaluation needs the data's answers; pass a RationaleDataModule (an object with"
                " `answer_key(split)`) to the trainer, not bare data loaders"
            )
        return cast(AnswerSource, datamodule)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what loading needs beside the weights, and rewind to the last complete optimizer step.

        Raises:
            UserError: a weight is not finite; nothing is written.
        """
        if not self.sharded:
            check_weights(checkpoint["state_dict"], f"step {checkpoint['global_step']}")
        checkpoint[CHECKPOINT_KEY] = record_model(self.student, self.tokenizer)
        checkpoint[_PREFIXES_KEY] = dict(self.prefixes)
        checkpoint[_LIMITS_KEY] = dict(self._target_limits)
        if self._seed is not None:
            checkpoint[_SEED_KEY] = self._seed
        if self._windows is not None and "loops" in checkpoint:
            boundary = consumed_batches(self.trainer)
            rewind(
                checkpoint["loops"]["fit_loop"],
                boundary=boundary,
                step=self.trainer.global_step,
                loader_states=self._windows.states_at(boundary),
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the run's seed and position.

        Raises:
            UserError: the checkpoint was trained on other tasks or prefixes, or a weight is not finite.
        """
        if not self.sharded:
            check_weights(checkpoint["state_dict"], "ckpt_path")
        before, now = checkpoint.get("hyper_parameters", {}).get("optimizer"), self.hparams["optimizer"]
        if before not in (None, now) and self._trainer is not None and self._trainer.training:
            raise UserError(
                f"ckpt_path: the checkpoint holds the state of {before}, which is of no use to {now};"
                f" give --model.optimizer {before}"
            )
        if self._trainer is not None and self._trainer.training:
            check_optimizer_states(checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", []))
        trained = checkpoint.get(_PREFIXES_KEY, self.prefixes)
        if trained != self.prefixes:
            raise UserError(
                f"ckpt_path: the checkpoint was trained on {trained} (task: prefix), {type(self).__name__} here asks"
                f" for {self.prefixes}; give the method and the prefixes that it was trained with"
            )
        self._target_limits = dict(checkpoint.get(_LIMITS_KEY, {}))
        self._seed = checkpoint.get(_SEED_KEY)
        if (loops := checkpoint.get("loops")) is not None:
            self._resumed_batches = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
            self._resumed_loaders = loops["fit_loop"]["state_dict"].get("combined_loader", [])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # a plain classmethod in place of Lightning's descriptor
        cls,
        checkpoint_path: Any,  # noqa: ANN401 - as Lightning's
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, but the student is rebuilt from the checkpoint itself and only plain data is unpickled.

        Args:
            checkpoint_path: the checkpoint file.
            kwargs: Lightning's own arguments, and constructor arguments in place of the saved ones; ``student`` only
                changes the name that is remembered.
        """
        kwargs.setdefault("weights_only", True)
        original = kwargs.pop("student", None)
        kwargs.setdefault("from_scratch", True)
        module = super().load_from_checkpoint(checkpoint_path, student=str(checkpoint_path), **kwargs)
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
        for name in ("student", "from_scratch"):
            module.hparams[name] = saved.get(name, module.hparams[name])
        if original is not None:
            module.hparams["student"] = str(original)
        # what loggers write
        module._hparams_initial = copy.deepcopy(module.hparams)
        return module
