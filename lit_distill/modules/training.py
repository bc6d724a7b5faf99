"""Training: optimizer steps with losses exact over micro-batches and ranks, and a stop at the first NaN or infinity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lit_distill.batch import TaskBatch, remember_rows
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.modules.hooks import Hooks
from lit_distill.modules.optimization import clip_within_step, configure, reset_clipping
from lit_distill.modules.resume import seed_step
from lit_distill.modules.window import Window, WindowLoader, WindowSource
from lit_distill.objectives import Objective, Step
from lit_distill.students import Tokens
from lit_distill.tasks import Task

_SHOWN_ROWS = 8


class Part(NamedTuple):
    """Terms and rows of a micro-batch, kept until its optimizer step or evaluation is known to be finite."""

    terms: dict[str, Tensor]
    rows: list[Tensor]  # the rows' positions in their split, for each task that has them

    @classmethod
    def of(cls, terms: dict[str, Tensor], batch: TaskBatch) -> "Part":
        """A micro-batch's detached terms and its rows."""
        rows = [inputs["index"] for inputs in batch.values() if "index" in inputs]
        return cls({name: term.detach() for name, term in terms.items()}, rows)


class Training(Hooks):
    """The training hooks of `DistillModule`."""

    def __init__(self) -> None:
        super().__init__()
        self._seed = -1
        """Of the run, saved in checkpoints; negative before a run."""
        self._resumed_batches = 0
        self._resumed_loaders: list[dict[str, Any]] = []
        self._windows: WindowLoader | None = None
        self._window: Window | None = None
        self._window_weights: dict[str, Tensor] = {}
        self._window_terms: dict[str, Tensor] = {}
        self._window_parts: list[Part] = []
        self._gradient_norm: Tensor | None = None
        self._target_limits: dict[str, int] = {}

    @property
    def window(self) -> Window | None:
        """The optimizer step in progress."""
        return self._window

    def setup(self, stage: str) -> None:
        """Check the data module's tasks, load the teachers, and wrap the training loader."""
        datamodule = getattr(self.trainer, "datamodule", None)
        self._check_tasks(getattr(datamodule, "tasks", None))
        tokens = getattr(datamodule, "tokens", None)
        if isinstance(tokens, Tokens) and tokens.family != self.student.tokens.family:
            raise UserError(
                f"tokenizer: the data module encodes texts for a {tokens.family} student, this one is"
                f" {self.student.tokens.family}; give the data module tokenizer=module.student.tokens"
            )
        self.student.sharded = self.sharded
        if stage != "predict":
            self.teachers.load(self.student)
        if stage == "fit":
            # left by an earlier run or `load_from_checkpoint`; a resumed run loads its own later
            self._seed, self._resumed_batches, self._resumed_loaders = -1, 0, []
            source: Any = self.trainer.fit_loop._data_source
            inner = source.inner if isinstance(source, WindowSource) else source
            self.trainer.fit_loop._data_source = WindowSource(inner, self._read_ahead)  # type: ignore[assignment]
            if (limits := getattr(datamodule, "target_limits", None)) is not None:
                self._target_limits = limits()

    def _check_tasks(self, built: Any) -> None:
        """Check that the data module builds the inputs and targets of this module, if it says what it builds."""
        if not isinstance(built, dict):
            return
        found, wanted = self.task_texts(built), self.task_texts(self.tasks)
        if found != wanted:
            raise UserError(
                f"tasks: {type(self).__name__} trains on {wanted} (task: prefix and target), but the data module builds"
                f" {found}; give the data module the module's own `tasks`"
            )

    @staticmethod
    def task_texts(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
        """Prefixes and targets in plain types, to compare with those of the data module or a checkpoint."""
        return {name: [task.prefix, task.target] for name, task in tasks.items()}

    def _read_ahead(self, loader: Any) -> WindowLoader:
        mode = "max_size_cycle"
        if isinstance(loader, CombinedLoader):
            loader, mode = loader.iterables, loader._mode
        self._windows = WindowLoader(
            loader,
            mode,
            size=lambda: self.trainer.accumulate_grad_batches,
            count=self.term_counts,
            prepare=self._prepare,
            position=self._resumed_batches,
            states=self._resumed_loaders,
        )
        self._resumed_batches, self._resumed_loaders = 0, []
        return self._windows

    def on_fit_start(self) -> None:
        """Set the run's seed, and report the effective batch size and generation lengths."""
        if self._seed < 0:
            # the same on all ranks: rank 0 writes it into the checkpoint
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**32))
        if limits := {task: self.generation_settings(task)["max_new_tokens"] for task in self._target_limits}:
            shown = ", ".join(f"{task} {length}" for task, length in limits.items())
            rank_zero_info(f"Maximum generated tokens: {shown} (max_..._length sets them).")
        if (per_device := getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)) is None:
            return
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        effective = per_device * accumulate * world
        parts = f"{per_device} a device x {accumulate} accumulated x {world} device(s)"
        rank_zero_info(f"Effective batch: {effective} examples an optimizer step ({parts}).")
        for logger in self.trainer.loggers:
            logger.log_hyperparams({"effective_batch": effective})
        if (wanted := self.hparams["effective_batch_size"]) not in (None, effective):
            rank_zero_warn(
                f"The effective batch is {effective} examples ({parts}), the settings were written for {wanted}:"
                " change batch_size or accumulate_grad_batches, or the learning rate and effective_batch_size with it."
            )

    def _prepare(self, batches: list[TaskBatch]) -> None:
        """Call `prepare` and restore the random and training state after it."""
        own = any(type(objective).prepare is not Objective.prepare for objective in self._objectives)
        if type(self).prepare is Hooks.prepare and not own:
            return
        modes = [(module, module.training) for module in self.modules()]
        with isolate_rng(), torch.no_grad():
            seed_step(self._seed, self.trainer.global_step, self.trainer.global_rank, preparing=True)
            self.eval()
            self.prepare(batches)
        for module, training in modes:
            module.training = training

    def on_train_batch_start(self, batch: TaskBatch, batch_idx: int) -> None:
        """At the start of an optimizer step: seed it, and compute the weights of its terms."""
        if self._windows is None:
            return
        window = self._windows.next_window()
        if batch_idx != window.start:
            return
        # the step that loggers use, which Lightning increments once too often after resuming
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        seed_step(self._seed, self.trainer.global_step, self.trainer.global_rank)
        self._window = window
        self._window_weights = self.window_weights(window)
        self._window_terms, self._window_parts = {}, []

    def window_weights(self, window: Window) -> dict[str, Tensor]:
        """Factors that turn a mean over one micro-batch into its share of the mean over the whole optimizer step.

        The share of a micro-batch with N_m counted items is N_m / N, with N the sum over micro-batches and ranks.
        Lightning later divides gradients by the accumulation factor k, and DDP averages over R ranks, so the factor is
        k R / N (N_m is applied where the micro-batch is known). Under ``""`` is k / m, for a plainly averaged term in a
        window of m micro-batches.
        """
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        names = sorted(window.counts)
        totals = torch.tensor([window.counts[name] for name in names], dtype=torch.float64)
        if world > 1:
            # float32, as some accelerators cannot reduce float64; exact up to 2**24 counts per rank and step
            reduced = self.trainer.strategy.reduce(totals.float().to(self.device), reduce_op="sum")
            totals = cast(Tensor, reduced).double()
        scale = torch.where(totals > 0, accumulate * world / totals.clamp(min=1), 0.0).float()
        weights = {name: scale[i].to(self.device) for i, name in enumerate(names)}
        return weights | {"": torch.tensor(accumulate / window.size, device=self.device)}

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the step's gradient is that of the whole step's loss."""
        terms = self.checked_terms(self.step(batch))
        if self._window is None:
            return self.total_loss(terms)
        # counted on the host: no device synchronisation
        counts = self._window.batch_counts[batch_idx - self._window.start]
        self._window_parts.append(Part.of(terms, batch))
        weights = self._window_weights
        scaled = {
            name: term * (weights[name] * counts[name] if name in counts else weights[""])
            for name, term in terms.items()
        }
        self._log_training(scaled, last=batch_idx + 1 == self._window.start + self._window.size)
        return self.total_loss(scaled)

    def _log_training(self, scaled: dict[str, Tensor], *, last: bool) -> None:
        """Log each term as the mean over the optimizer step, once it is complete."""
        accumulate = self.trainer.accumulate_grad_batches
        for name, term in scaled.items():
            self._window_terms[name] = self._window_terms.get(name, 0.0) + term.detach() / accumulate
        if not last:
            return
        assert self._window is not None  # noqa: S101 - for the type checker
        distributed, examples = self.trainer.world_size > 1, max(self._window.examples, 1)
        for name, term in self._window_terms.items():
            if self._window.counts.get(name) == 0 and not self._window_weights[name]:
                # no targets on any rank: Lightning would repeat the last step's value
                cast(dict[str, Any], self.trainer._results).pop(f"training_step.train/{name}_loss", None)
                continue
            self.log(f"train/{name}_loss", term, sync_dist=distributed, batch_size=examples)
        with torch.no_grad():
            total = self.total_loss(self._window_terms)
        self.log("train/loss", total, sync_dist=distributed, batch_size=examples, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm before clipping, and stop the run if the loss or gradient is not finite.

        The weights have not changed yet. This synchronises with the device once a step. Under sharded strategies, where
        each rank has a part of the gradient, and under loss scaling, which skips such steps by itself, only the loss is
        checked.

        Raises:
            UserError: on all ranks; names the step, the term, the rows and the last good checkpoint.
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
        found = self.first_not_finite(self._window_parts, "train")
        if found is not None:
            number, term, value, rows = found
            micro_batch = (self._window.start if self._window else 0) + number
            what = f"the {term} loss is {value} in micro-batch {micro_batch} of epoch {self.current_epoch}{rows}"
        else:
            gradients = ((name, p.grad) for name, p in self.named_parameters() if p.grad is not None)
            bad = next((name for name, gradient in gradients if not gradient.isfinite().all()), None)
            rows = self._rows_of([one for part in self._window_parts for one in part.rows], "train")
            what = f"the gradient{f' of {bad}' if bad else ''} is not finite{rows}"
        if self.trainer.world_size > 1:
            what += f" on rank {self.global_rank}"
        return f"step {self.trainer.global_step + 1}: {what}; {self.last_good_checkpoint()}"

    def first_not_finite(self, parts: list[Part], split: Split) -> tuple[int, str, float, str] | None:
        """The first micro-batch with a term that is not finite: its number, term, value, and rows as text."""
        for number, part in enumerate(parts):
            for name, term in part.terms.items():
                if not term.isfinite():
                    return number, name, float(term), self._rows_of(part.rows, split)
        return None

    def _rows_of(self, indices: list[Tensor], split: Split) -> str:
        """The ids of rows for a message; empty where batches carry no row numbers."""
        rows = sorted({row for one in indices for row in one.tolist() if row >= 0})
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        ids = datamodule.answer_key(split).ids if hasattr(datamodule, "answer_key") else ()
        names = [ids[row] if row < len(ids) else str(row) for row in rows]
        more = f" and {len(names) - _SHOWN_ROWS} more" if len(names) > _SHOWN_ROWS else ""
        return f" (rows {', '.join(names[:_SHOWN_ROWS])}{more})" if names else ""

    def last_good_checkpoint(self) -> str:
        """The checkpoint to resume from, for a message."""
        good = "none yet"
        for one in self.trainer.checkpoint_callbacks:
            if not isinstance(one, ModelCheckpoint):
                continue
            # with one process, the last complete step is saved on the exception
            saves = one.save_on_exception and self.trainer.world_size == 1
            if saves and one._last_global_step_saved != self.trainer.global_step:
                good = str(Path(str(one.dirpath)) / f"{one.filename}{one.FILE_EXTENSION}")
            elif one.best_model_path and Path(one.best_model_path).exists():
                good = one.best_model_path
        return f"the last good checkpoint: {good}"

    def checked_terms(self, step: Step) -> dict[str, Tensor]:
        """The loss terms, after checking that the term which evaluation needs exists."""
        terms = self.loss_terms(step)
        if self.hparams["evaluate_losses"] == "answer" and self.answer_task not in terms:
            raise UserError(
                f"evaluate_losses: 'answer' needs a loss term named after the answer task, {self.answer_task!r};"
                f" the terms of {type(self).__name__} are {', '.join(terms)}; give all"
            )
        return terms

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Adafactor, with the schedule over all steps of the run."""
        settings = self.hparams
        return configure(
            self,
            optimizer=settings["optimizer"],
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            schedule=settings["lr_schedule"],
            warmup_steps=settings["warmup_steps"],
            total_steps=self.trainer.estimated_stepping_batches,
        )

    @property
    def _scales_losses(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's; also under FSDP (the norm over all shards), which Lightning refuses."""
        wrapped = self.trainer.strategy.model
        if gradient_clip_val and isinstance(wrapped, FullyShardedDataParallel):
            wrapped.clip_grad_norm_(gradient_clip_val)
            return
        norm = self._gradient_norm if gradient_clip_algorithm in (None, "norm") else None
        # not with a loss scaler: the norm is of scaled gradients
        within = gradient_clip_val and norm is not None and self.hparams["fast"] and not self._scales_losses
        if not (within and clip_within_step(optimizer, float(gradient_clip_val or 0), cast(Tensor, norm))):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Drop the clipping of an interrupted step with its gradients."""
        reset_clipping(optimizer)

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """As Lightning's; remembers rows' lengths before the transfer, to avoid a synchronisation later.

        Lightning would warn about ``transfer_batch_to_device`` in both the module and the data module.
        """
        found = super()._call_batch_hook(hook_name, *args)
        if hook_name == "transfer_batch_to_device" and args[1].type != "cpu" and self.hparams["fast"]:
            owners = self, getattr(self._trainer, "datamodule", None)
            # an overridden hook may change more than the device
            if not any(is_overridden(hook_name, owner) for owner in owners):
                remember_rows(args[0], found)
        return found
