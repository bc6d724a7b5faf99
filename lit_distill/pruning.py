"""Prune a student while it trains: whole heads and feed-forward units, which the exported student then lacks."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.checkpoints import BestCheckpoint
from lit_distill.checks import check_int, check_range
from lit_distill.errors import UserError
from lit_distill.modules.evaluating import Evaluating
from lit_distill.shrinking.importance import best, best_heads, magnitude
from lit_distill.shrinking.structure import Structure, owner, positions
from lit_distill.students import Student


class Pruning(Callback):
    r"""Set the least important heads and feed-forward units to zero, ever more of them.

    Their part rises as in Zhu and Gupta 2017 (1710.01878), Eq. 1, from nothing: :math:`s_t = s_f (1 - (1 -
    \frac{t - t_0}{t_f - t_0})^3)` at step :math:`t`. They are chosen by `magnitude`, in each layer as many, and stay
    zero. The exported student is smaller by them and gives the same logits. Checkpoints from before :math:`t_f` are
    not chosen as the best, as their students are larger.

    Args:
        d_ff: the part :math:`s_f` of feed-forward units that goes.
        heads: the part of heads that goes; with grouped-query attention keys go with all of their queries.
        begin: :math:`t_0`, as a part of training.
        end: :math:`t_f`, likewise.
        every_n_steps: optimizer steps from one choice to the next.
    """

    def __init__(
        self, d_ff: float = 0.0, heads: float = 0.0, begin: float = 0.1, end: float = 0.7, every_n_steps: int = 100
    ) -> None:
        for name, part in (("d_ff", d_ff), ("heads", heads)):
            check_range(f"Pruning: {name}", part, at_least=0, below=1)
        if not d_ff and not heads:
            raise UserError("Pruning: d_ff or heads must be above 0, or nothing goes")
        check_range("Pruning: begin", begin, at_least=0, below=1)
        check_range("Pruning: end", end, above=begin, at_most=1)
        check_int("Pruning: every_n_steps", every_n_steps, 1)
        self.parts = {"unit": d_ff, "head": heads}
        self.span = (begin, end)
        self.every_n_steps = every_n_steps
        self._gone: dict[str, list[int]] = {}  # module -> its units or heads that are zero
        self._last_step = -1
        self._first, self._final = 0, 0
        self._structure: Structure | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"gone": self._gone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._gone = state_dict["gone"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, Evaluating):
            return
        student: Student = pl_module.student
        if pl_module.sharded or student.adapter is not None:
            raise UserError(
                "Pruning: neither with a sharded strategy nor with an adapter, which leave no whole weights"
            )
        if math.isinf(steps := trainer.estimated_stepping_batches):
            raise UserError(
                "Pruning: a run without trainer.max_steps has no end that the schedule could be measured by"
            )
        self._structure = Structure(student)
        self._structure.check_widths("Pruning")
        self._first, self._final = (math.ceil(part * steps) for part in self.span)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, BestCheckpoint):
                callback.first_step = self._final

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if self._structure is None or step == self._last_step:
            return
        self._last_step = step
        # the optimizer's momentum has moved it
        set_to_zero(self._structure, self._gone)
        since = step - self._first
        if step == self._final or (0 <= since < self._final - self._first and since % self.every_n_steps == 0):
            self._choose(self._structure, step)
            set_to_zero(self._structure, self._gone)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._structure is not None and trainer.global_step < self._final:
            rank_zero_info(
                f"Pruning: training ended at step {trainer.global_step}, before all is gone at step {self._final}:"
                " the student is larger than asked for"
            )

    def part(self, step: int) -> float:
        """Which part of the way to the final parts is gone after a step."""
        # a run of few steps may begin and end at the same one
        done = 1.0 if step >= self._final else (step - self._first) / max(self._final - self._first, 1)
        return float(1 - (1 - max(done, 0.0)) ** 3)

    @torch.no_grad()
    def _choose(self, structure: Structure, step: int) -> None:
        scores = magnitude(structure)
        for axis, found in (("unit", scores.units), ("head", scores.heads)):
            total = len(next(iter(found.values())))
            number = max(1, total - round(self.parts[axis] * self.part(step) * total))
            each = {name: best(own, number) for name, own in found.items()}
            kept = best_heads(structure, found, number) if axis == "head" else each
            for name, own in kept.items() if number < total else ():
                self._gone[name] = sorted(set(range(total)) - set(own.tolist()))


@torch.no_grad()
def set_to_zero(structure: Structure, gone: Mapping[str, list[int]]) -> None:
    """Set all weights of some units and heads to zero, but T5's position biases, which other layers share."""
    for name, weight in structure.network.named_parameters():
        if (own := gone.get(owner(owner(name)))) is None or "relative_attention_bias" in name:
            continue
        for dim, axis in enumerate(structure.axes(name)):
            if axis in ("unit", "head"):
                places, size = torch.tensor(own, device=weight.device), weight.shape[dim]
                weight.index_fill_(dim, positions(places, structure.groups, size) if axis == "head" else places, 0.0)
