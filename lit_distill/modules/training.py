"""Training: the losses that define a method, exact over an optimizer step's micro-batches and ranks."""

import copy
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lit_distill.batch import TaskBatch, target_tokens
from lit_distill.checkpoints import last_good_checkpoint
from lit_distill.errors import UserError
from lit_distill.modules.choosing import Choosing
from lit_distill.modules.counting import TokenCount
from lit_distill.modules.optimization import clip_in_step, configure, skip_in_step
from lit_distill.modules.weighting import UncertaintyWeighting
from lit_distill.modules.window import Counts, Position, Window, WindowLoader, seed_step
from lit_distill.objectives import Objective, Step, check_stored
from lit_distill.students import Tokens
from lit_distill.students.precision import report_precision
from lit_distill.tasks import Task, task_texts
from lit_distill.teachers.models import Progress


class Training(Choosing):
    """The losses of `DistillModule`, and its training hooks."""

    tasks: dict[str, Task]  # the tasks that the module trains on, by name; the data module must build the same
    objectives: list[Objective]  # an `nn.ModuleList`
    weighting: UncertaintyWeighting | None  # of the terms, if it is trained
    window: Window  # the optimizer step in progress
    scaled_terms: dict[str, Tensor]  # of the micro-batch in progress, its shares of the step's terms, with their graph
    _window_terms: dict[str, Tensor]  # the terms of the step so far
    _gradient_norm: Tensor | None = None  # before clipping; `None` if gradients are sharded or scaled
    _found: tuple[int, list[str], Tensor, torch.Event | None] | None = None  # see `check_finite`: step, names, flags

    def __init__(self) -> None:
        super().__init__()
        self._seed = -1  # of the run, saved in checkpoints; negative before a run
        self._count = TokenCount()  # of this rank; on the first rank also of resumed parts of the run
        self._given_seed = 0  # of the first process, as the trainer's last command found it
        self._resumed: Position = (0, [])  # where the run that is resumed stopped
        self._window_weights: dict[str, Tensor] = {}  # see `window_weights`; empty before a run
        self._target_limits: dict[str, int] = {}  # of generated tokens of each task, from the targets in train

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        """The losses of a micro-batch: named, unweighted scalars.

        By default each task's cross-entropy, the mean over its target tokens (Eq. 3 and 4 of the paper), and the
        objectives.
        """
        terms = {task: step.student.loss(task) for task in self.tasks}
        return terms | {objective.name: objective(step) for objective in self.objectives}

    def total_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """Combine the terms into the loss that is minimised; must be linear in them.

        By default their sum, each times its weight in `term_weights`, or 1. It is applied to each micro-batch's share
        of the terms, and the results add up to the loss of the whole optimizer step.
        """
        weights = self.term_weights()
        return torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()

    def term_weights(self) -> Mapping[str, float | Tensor]:
        """The weight of each task and objective in this optimizer step, and in a validation after it."""
        fixed = self._fixed_weights()
        return fixed if self.weighting is None else self.weighting.weights(fixed)

    def _fixed_weights(self) -> dict[str, float]:
        done = self._done if self._moving else 0.0
        weights = {name: task.weight_at(done) for name, task in self.tasks.items()}
        return weights | {objective.name: objective.weight for objective in self.objectives}

    @property
    def _moving(self) -> list[str]:
        """The tasks whose weight changes in training."""
        return [name for name, task in self.tasks.items() if task.final_weight is not None]

    @property
    def _done(self) -> float:
        """The share of a run's steps that are done, 1 from the last one on; 0 outside of ``fit``."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit" or trainer.state.finished:
            return 0.0
        return min(1.0, trainer.global_step / max(1, trainer.estimated_stepping_batches - 1))

    def term_counts(self, batch: TaskBatch) -> Counts:
        """What each term is a mean over; a term that is absent here is averaged plainly.

        Must depend on the batch alone (it is called before the step begins) and name the same terms on every rank.
        """
        counts = {task: target_tokens(batch[task]) for task in self.tasks}
        own = {objective.name: objective.counts(batch) for objective in self.objectives}
        return counts | {name: count for name, count in own.items() if count is not None}

    def prepare(self, window: list[TaskBatch]) -> None:
        """Change an optimizer step's micro-batches in place, before its targets are counted.

        By default each objective may. Runs in evaluation mode without gradients, on the data loader's device; random
        numbers depend on the run's seed, the step and the rank alone.
        """
        steps = [self.step(batch) for batch in window]
        for objective in self.objectives:
            objective.prepare(steps)

    def step(self, batch: TaskBatch) -> Step:
        """The `Step` of a batch, which has each task, even without rows."""
        return Step(batch, self.student, self.teachers, self.progress)

    @property
    def progress(self) -> Progress:
        """Where training is."""
        if self._trainer is None or not self._trainer.training:
            return Progress(steps=0)
        trainer = self._trainer
        return Progress(trainer.global_step, trainer.estimated_stepping_batches, trainer.current_epoch)

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded over ranks, so that each forward pass is a collective."""
        name = type(self._trainer.strategy).__name__ if self._trainer is not None else ""
        return name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's; evaluates a student without the objectives and teachers that it was trained with.

        Raises a ``UserError`` if a checkpoint was trained with others, or training would go on without them.
        """
        # a parameter that has no shape yet cannot be detached
        both = state_dict, self.state_dict(keep_vars=True)
        kept, own = (
            {name for name in found if name.startswith(("objectives.", "teachers.", "weighting."))} for found in both
        )
        if strict and kept != own and (own or (self._trainer is not None and self._trainer.training)):
            name = min(kept ^ own)
            told = f"has {name}, which these have not" if name in kept else f"has no {name}, which these have"
            raise UserError(
                f"ckpt_path: its objectives, teachers or weighting are others: it {told}; give them as they were"
            )
        # which no answer needs
        needed = {name: value for name, value in state_dict.items() if name in own or name not in kept}
        return super().load_state_dict(needed, strict=strict, assign=assign)

    def check_teachers(self, trainer: pl.Trainer, stage: str) -> None:
        """Load the teachers, and let copies of the objectives check them, before a run reads data."""
        self.trainer = trainer
        self.student.sharded = self.sharded
        self.teachers.load(self.student)
        for objective in self.objectives if stage == "fit" else ():
            if objective.teacher is not None and (store := self.teachers.store(objective.teacher)) is not None:
                store.check_train()
        with isolate_rng():
            for objective in self.objectives:
                copy.deepcopy(objective).setup(self.student, self.teachers)

    def setup(self, stage: str) -> None:
        """Check the data module's tasks, load the teachers, and wrap the training loader."""
        datamodule = getattr(self.trainer, "datamodule", None)
        built, wanted = getattr(datamodule, "tasks", None), task_texts(self.tasks)
        if isinstance(built, dict) and (found := task_texts(built)) != wanted:
            raise UserError(
                f"tasks: {type(self).__name__} trains on {wanted} (task: prefix and target), but the data module builds"
                f" {found}; give the data module the module's own `tasks`"
            )
        tokens = getattr(datamodule, "tokens", None)
        if isinstance(tokens, Tokens) and tokens.family != self.student.tokens.family:
            raise UserError(
                f"tokenizer: the data module encodes texts for a {tokens.family} student, this one is"
                f" {self.student.tokens.family}; give the data module tokenizer=module.student.tokens"
            )
        self.student.sharded = self.sharded
        if self.weighting is not None and self.sharded:
            raise UserError("weighting: under a sharded strategy no rank has the trained weights; use ddp, or fixed")
        # the same on all ranks: rank 0 writes it into the checkpoint
        self._given_seed = seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**32))
        if stage != "predict":
            self.teachers.load(self.student)
            with isolate_rng():
                torch.manual_seed(seed)
                for objective in self.objectives:
                    objective.setup(self.student, self.teachers)
        self.student.losses_only = type(self).loss_terms is Training.loss_terms and not self.objectives
        if stage == "fit":
            check_stored(self.objectives, self.teachers, datamodule)
            for objective in self.objectives:
                objective.check_data(datamodule)
            # not those of an earlier run or `load_from_checkpoint`; a resumed run loads its own later
            self._resumed, self._seed, self.chosen_paths = (0, []), seed, {}
            self._count = TokenCount()
            source: Any = self.trainer.fit_loop._data_source
            # of the class: an earlier run has wrapped the object's
            source.dataloader = partial(self._read_ahead, partial(type(source).dataloader, source))
            if (limits := getattr(datamodule, "target_limits", None)) is not None:
                self._target_limits = limits()

    def _read_ahead(self, loader: Any) -> WindowLoader:
        resumed, self._resumed = self._resumed, (0, [])
        return WindowLoader(loader(), lambda: self.trainer.accumulate_grad_batches, self._prepare_and_count, resumed)

    def _prepare_and_count(self, batches: list[TaskBatch]) -> list[Counts]:
        """Call `prepare`, restore the random and training state after it, and count the targets."""
        if any(objective.prepares for objective in self.objectives) or type(self).prepare is not Training.prepare:
            modes = [(module, module.training) for module in self.modules()]
            with isolate_rng(), torch.no_grad():
                seed_step(self._seed, self.trainer.global_step, self.trainer.global_rank, preparing=True)
                self.eval()
                self.prepare(batches)
            for module, training in modes:
                module.training = training
        return [self.term_counts(batch) for batch in batches]

    def on_fit_start(self) -> None:
        """Compute teachers' weights that depend on the data, and report a faster precision and the effective batch."""
        if self._moving and self.trainer.estimated_stepping_batches == float("inf"):
            raise UserError(f"tasks: {self._moving[0]}: final_weight needs a run that ends; set trainer.max_steps")
        report_precision(self.student, str(self.trainer.precision))
        self.weigh_teachers()
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

    def on_train_batch_start(self, batch: TaskBatch, batch_idx: int) -> None:
        """At the start of an optimizer step: seed it, and compute the weights of its terms."""
        started = time.perf_counter()
        self.choose_path("training", batch)
        self.choosing_seconds += time.perf_counter() - started
        window = cast(WindowLoader, self.trainer.fit_loop._combined_loader).next_window()
        if batch_idx != window.start:
            return
        # the step that loggers use, which Lightning increments once too often after resuming
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        self._count.open(self.trainer.global_step, window.tokens)
        seed_step(self._seed, self.trainer.global_step, self.trainer.global_rank)
        # Lightning lets go of the last step's gradients only after this one's forward pass
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        self.window, self._window_weights, self._window_terms = window, self.window_weights(window), {}
        self.student.hold_weights(True)

    def train_tokens(self) -> int:
        """Source and target tokens that all ranks have read in complete optimizer steps, padding not counted.

        Negative if a part of the run is resumed from a checkpoint that does not tell. Call it on all ranks.
        """
        own = self._count.total(math.inf if self._trainer is None else self.trainer.global_step)
        if self._trainer is None or self.trainer.world_size == 1:
            return own
        return int(cast(Tensor, self.all_gather(torch.tensor(own, device=self.device))).sum())

    def window_weights(self, window: Window) -> dict[str, Tensor]:
        """Factors that turn a mean over one micro-batch into its share of the mean over the whole optimizer step.

        The share of a micro-batch with N_m counted items is N_m / N, with N the sum over micro-batches and ranks.
        Lightning later divides gradients by the accumulation factor k, and DDP averages over R ranks, so the factor is
        k R / N (N_m is applied where the micro-batch is known). Under ``""`` is k / m, for a plainly averaged term in a
        window of m micro-batches.
        """
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        counts = window.totals
        totals = torch.tensor(list(counts.values()), dtype=torch.float64)
        if world > 1:
            # float32, as some accelerators cannot reduce float64; exact up to 2**24 counts per rank and step
            reduced = self.trainer.strategy.reduce(totals.float().to(self.device), reduce_op="sum")
            totals = cast(Tensor, reduced).double()
        # float64 only for a student in float64: some accelerators lack it
        dtype = torch.promote_types(cast(torch.dtype, self.dtype), torch.float32)
        scale = torch.where(totals > 0, accumulate * world / totals.clamp(min=1), 0.0)
        # a copy that blocks would wait for the device
        scale = torch.cat([scale, scale.new_tensor([accumulate / len(window.counts)])])
        return dict(zip((*counts, ""), scale.to(self.device, dtype, non_blocking=True).unbind(), strict=True))

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, scaled so that the step's gradient is that of the whole step's loss."""
        terms, weights = self.loss_terms(self.step(batch)), self._window_weights
        if not weights:
            return self.total_loss(terms)
        # counted on the host: no device synchronisation
        counts = self.window.counts[batch_idx - self.window.start]
        scaled = {
            name: term * (weights[name] * counts[name] if name in counts else weights[""])
            for name, term in terms.items()
        }
        self.scaled_terms = scaled
        for name, term in scaled.items():
            share = term.detach() / self.trainer.accumulate_grad_batches
            self._window_terms[name] = self._window_terms.get(name, 0.0) + share
        if batch_idx == self.window.last:
            self._log_step()
        total = self.total_loss(scaled)
        if self.weighting is None:
            return total
        # once a step: plainly averaged, as it is the same in all micro-batches
        present = {name: weights[name] > 0 for name in counts}
        return total + weights[""] * self.weighting.penalty(self._fixed_weights(), present)

    def on_after_backward(self) -> None:
        """Let go of the graph, which a copy of the module could not hold."""
        self.scaled_terms = {}

    def _log_step(self) -> None:
        """Log each term as the mean over the optimizer step."""
        distributed, examples = self.trainer.world_size > 1, max(self.window.examples, 1)
        counts = self.window.totals
        for name, term in self._window_terms.items():
            if counts.get(name) == 0 and not self._window_weights[name]:
                # no targets on any rank: Lightning would repeat the last step's value
                cast(dict[str, Any], self.trainer._results).pop(f"training_step.train/{name}_loss", None)
                continue
            self.log(f"train/{name}_loss", term, sync_dist=distributed, batch_size=examples)
        weights = self.term_weights()
        for name in self._moving if self.weighting is None else weights:
            self.log(f"train/{name}_weight", weights[name], batch_size=1)
        with torch.no_grad():
            total = self.total_loss(self._window_terms)
        self.log("train/loss", total, sync_dist=distributed, batch_size=examples, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm before clipping, and stop the run if the loss or gradient is not finite.

        All ranks do, before the weights change. On a GPU a fused AdamW skips such a step by itself, and the run stops
        one step later, when the host need not wait for what the device found. Only the loss is checked under sharded
        strategies, where each rank has a part of the gradient, and under loss scaling, which skips such steps by
        itself.
        """
        self.student.hold_weights(False)
        self.check_finite()
        values = {f"{name} loss": term for name, term in self._window_terms.items()}
        self._gradient_norm = None
        # of the last step
        optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
        if not self.sharded:
            # a walk through the modules would take milliseconds
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.log("train/grad_norm", norm, batch_size=1)
            if getattr(self.trainer.precision_plugin, "scaler", None) is None:
                values["gradient"] = self._gradient_norm = norm
        bad = (~torch.stack([value.float() for value in values.values()]).isfinite()).float()
        if self.trainer.world_size > 1:
            bad = cast(Tensor, self.trainer.strategy.reduce(bad, reduce_op="sum"))
        skips = "gradient" in values and self._skips and skip_in_step(optimizer, bad.amax().clamp(max=1.0))
        copied = bad.to("cpu", non_blocking=skips)
        event = torch.cuda.current_stream().record_event() if skips and bad.is_cuda else None
        self._found = self.trainer.global_step + 1, list(values), copied, event
        if not skips:
            self.check_finite()

    @property
    def _skips(self) -> bool:
        """Whether reading a flag would wait for a device."""
        return self.device.type != "cpu"

    def check_finite(self) -> None:
        """Raise a ``UserError`` if the loss or gradient of the last step that was looked at was not finite."""
        if (found := self._found) is None:
            return
        step, names, bad, event = found
        self._found = None
        if event is not None:
            event.synchronize()
        if bad.any():
            name = names[int(bad.nonzero()[0])]
            raise UserError(f"step {step}: the {name} is not finite; {last_good_checkpoint(self.trainer)}")

    def on_train_end(self) -> None:
        """Check the last step."""
        self.check_finite()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Adafactor, with the schedule over all steps of the run."""
        return configure(self)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning's; also under FSDP (the norm over all shards), which Lightning refuses."""
        wrapped = self.trainer.strategy.model
        norm = None if gradient_clip_algorithm == "value" else self._gradient_norm
        if gradient_clip_val and isinstance(wrapped, FullyShardedDataParallel):
            wrapped.clip_grad_norm_(gradient_clip_val)
        elif not (gradient_clip_val and norm is not None and clip_in_step(optimizer, gradient_clip_val, norm)):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
