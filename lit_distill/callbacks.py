"""Callbacks of a run: validation schedule, throughput, gradients of the terms, sample tables."""

import sys
import time
from collections import Counter
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.checks import check_int
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Evaluation
from lit_distill.modules.evaluating import Evaluating
from lit_distill.tables import markdown_table

_NEVER = sys.maxsize


class ValidateEverySteps(Callback):
    """Validate every ``every_n_steps`` optimizer steps, and at the end.

    Lightning counts micro-batches, so an epoch's shorter last window would shift the steps.

    Args:
        every_n_steps: optimizer steps between validations; ``null``, or a ``trainer.val_check_interval``, leaves
            validation to Lightning's own settings.
    """

    def __init__(self, every_n_steps: int | None = 250) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"validation.every_n_steps must be at least 1 or null, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._is_due = False  # whether the validation after the last step has not ended yet

    def state_dict(self) -> dict[str, Any]:
        return {"is_due": self._is_due}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._is_due = checkpoint["callbacks"].get(self.state_key, {}).get("is_due", False)
        if trainer.strategy.restore_checkpoint_after_setup:
            self.on_fit_start(trainer)

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._is_due and trainer.max_steps != -1:
            # a finished run starts once more; the learning-rate schedule exists by now
            trainer.fit_loop.epoch_loop.max_steps += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the validation that was due or interrupted when the run stopped."""
        loop = trainer.fit_loop.epoch_loop
        if self._is_due:
            if trainer.max_steps != -1:
                loop.max_steps -= 1
            # as the training loop does; its rows are those of the step before it is counted for the loggers
            trainer.validating = True
            loop._batches_that_stepped = trainer.global_step - 1
            loop.val_loop.restarting = False
            loop.val_loop.run()
            # or the loop would end a resumed epoch without batches over and over
            loop.val_loop._has_run = False
            loop._batches_that_stepped = trainer.global_step
            trainer.training = True
        if self.every_n_steps is not None and isinstance(trainer.val_check_batch, int | float):
            trainer.val_check_batch = _NEVER

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # before checkpoints are written
        self._is_due = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        # Lightning then validates exactly when it is due
        loop = trainer.fit_loop.epoch_loop
        stepped = not loop._should_accumulate()
        if self.every_n_steps is not None:
            due = stepped and (trainer.global_step % self.every_n_steps == 0 or self._is_last(trainer))
            across_epochs = trainer.check_val_every_n_epoch is None
            done = (loop.total_batch_idx if across_epochs else loop.batch_idx) + 1
            trainer.val_check_batch = done if due else _NEVER
        # one inside a step is repeated anyway, as a resumed run begins with that step
        fetcher = trainer.fit_loop._data_fetcher
        self._is_due = stepped and fetcher is not None and loop._should_check_val_fx(fetcher)

    @staticmethod
    def _is_last(trainer: pl.Trainer) -> bool:
        # -1 and `None` stand for no limit
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        epoch_ends: bool = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return trainer.global_step == trainer.max_steps or (last_epoch and epoch_ends)


class TokenBudget(Callback):
    """Train for as many optimizer steps as read about so many tokens, to compare methods that read more or less.

    Source and target tokens without padding count; their number in a step is the mean over the training rows.

    Args:
        tokens: of all devices.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = check_int("max_tokens", tokens, 1)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the trainer's ``max_steps``. Raises a ``UserError`` if the number of tokens is not known."""
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # not declared by Lightning
        in_step = data.tokens_per_row() * data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        trainer.fit_loop.epoch_loop.max_steps = max(1, round(self.tokens / in_step))
        rank_zero_info(f"max_tokens: {trainer.max_steps:,} steps of {in_step:,.0f} tokens")


class Throughput(Callback):
    """Log examples, tokens (without padding) and optimizer steps per second of training, over all ranks."""

    def __init__(self) -> None:
        self._done: Counter[str] = Counter()  # examples, tokens and steps since the last line of the log
        self._seconds = 0.0  # that the clock ran before it was stopped for a validation
        self._started = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        if not self._started:
            self._started = time.perf_counter()

    def on_validation_start(self, *args: Any) -> None:
        if self._started:
            self._seconds += time.perf_counter() - self._started
            self._started = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not isinstance(pl_module, Evaluating) or trainer.fit_loop.epoch_loop.batch_idx != pl_module.window.last:
            return
        window = pl_module.window
        world = trainer.world_size
        self._done.update(examples=window.examples * world, tokens=window.tokens * world, steps=1)
        # 0 stands for never; global_step has been raised by now
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # not declared by Lightning
        if not every or trainer.global_step % every:
            return
        now = time.perf_counter()
        # a path was chosen before the first step
        seconds = self._seconds + now - self._started - pl_module.choosing_seconds
        pl_module.choosing_seconds = 0.0
        rates = {f"train/{name}_per_second": count / seconds for name, count in self._done.items()}
        pl_module.log_dict(rates, batch_size=1)
        self._done.clear()
        self._started, self._seconds = now, 0.0


class GradientShares(Callback):
    r"""Log how much each term moves the student, and whether it pulls where the label's term does.

    With :math:`g_i` the gradient, over the whole optimizer step, of a term times its weight with respect to the
    student's trained parameters, ``train/<term>_grad_share`` is :math:`|g_i| / \sum_j |g_j|`, and
    ``train/<term>_grad_cosine`` is the cosine of :math:`g_i` and the gradient of the answer task's term. Both are of
    gradients before clipping; a term without a gradient in a step has no cosine.

    A measured step has one more backward pass a term, and as many more copies of the gradient in memory. Training
    itself does not change.

    Args:
        every_n_steps: optimizer steps from one measured step to the next; the first step is measured, too.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_int("GradientShares: every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self._gradients: dict[str, list[Tensor]] = {}  # term -> its gradient over the step's micro-batches so far

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(pl_module, Evaluating) and pl_module.sharded:
            raise UserError(
                "GradientShares: a sharded strategy has no whole gradient on any rank; use ddp or leave it out"
            )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not isinstance(pl_module, Evaluating) or trainer.global_step % self.every_n_steps:
            return
        batch, window = trainer.fit_loop.epoch_loop.batch_idx, pl_module.window
        if batch == window.start:
            self._gradients = {}
        parameters = pl_module.student.trained
        # of a scaled loss the ratios are the same, and small gradients in 16 bits are not lost
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        terms = pl_module.scaled_terms
        nothing = {name: torch.zeros_like(term) for name, term in terms.items()}
        for name, term in terms.items():
            total = pl_module.total_loss(nothing | {name: term})
            if scaler is not None:
                total = scaler.scale(total)
            found = self._gradients.setdefault(name, [torch.zeros_like(parameter) for parameter in parameters])
            if total.requires_grad:
                grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
                for whole, grad in zip(found, grads, strict=True):
                    if grad is not None:
                        whole += grad
        if batch == window.last:
            self._log(trainer, pl_module.answer_task)

    def _log(self, trainer: pl.Trainer, label: str) -> None:
        gradients, self._gradients = self._gradients, {}
        if trainer.world_size > 1:
            reduce = trainer.strategy.reduce
            gradients = {
                name: [cast(Tensor, reduce(g, reduce_op="sum")) for g in own] for name, own in gradients.items()
            }
        norms = {name: torch.nn.utils.get_total_norm(own) for name, own in gradients.items()}
        total = torch.stack(list(norms.values())).sum()
        values = {f"{name}_grad_share": norm / total for name, norm in norms.items()}
        for name, own in gradients.items() if label in gradients else ():
            product = torch.stack([(a * b).sum() for a, b in zip(own, gradients[label], strict=True)]).sum()
            values[f"{name}_grad_cosine"] = product / (norms[name] * norms[label])
        # 0/0 without any gradient, and a scaled one that overflowed
        shown = {f"train/{name}": float(value) for name, value in values.items() if value.isfinite()}
        # not through the module, which would repeat them in each further line of the log
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


class SampleTable(Callback):
    """Log sample predictions with rationales to loggers that support tables or text."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        evaluation: Evaluation | None = getattr(pl_module, "evaluation", None)
        if trainer.sanity_checking or not trainer.is_global_zero or evaluation is None or not evaluation.samples:
            return
        rows, title = evaluation.sample_rows(), f"{evaluation.split}/samples"
        columns, data = list(rows[0]), [list(row.values()) for row in rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(title, columns=columns, data=data)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(title, markdown_table(columns, data), trainer.global_step)

    on_test_end = on_validation_end
