"""What checkpoints hold besides weights, and loading a module from its checkpoint alone."""

import copy
import io
import pickle
from typing import Any, Self

import torch

from lit_distill.errors import UserError
from lit_distill.modules.optimization import check_optimizer_states
from lit_distill.modules.resume import consumed_batches, rewind
from lit_distill.modules.training import Training
from lit_distill.objectives.base import build_objective
from lit_distill.students.adapters import Adapter
from lit_distill.students.files import CHECKPOINT_KEY, check_weights

_SEED_KEY = "lit_distill_seed"
_TASKS_KEY = "lit_distill_tasks"
_LIMITS_KEY = "lit_distill_target_limits"


class Checkpointing(Training):
    """The checkpoint hooks of `DistillModule`."""

    def setup(self, stage: str) -> None:
        """Check before training that a checkpoint can hold the settings, which include those of a user's classes.

        Raises:
            UserError: names the first setting that it cannot.
        """
        if stage == "fit" and self.trainer.checkpoint_callbacks:
            own = {name: value for name, value in self.hparams.items() if name != "objectives"}
            owners = {"data": getattr(getattr(self.trainer, "datamodule", None), "hparams", {}), "model": own}
            owners |= {f"objectives: {each.name}": each.hparams for each in self._objectives}
            for owner, name, value in ((owner, *item) for owner, given in owners.items() for item in given.items()):
                try:
                    torch.save(value, file := io.BytesIO())
                    torch.load(io.BytesIO(file.getvalue()), weights_only=True)
                except (pickle.PickleError, AttributeError, TypeError) as error:
                    raise UserError(
                        f"{owner}: {name}: a checkpoint cannot hold a {type(value).__name__}; use numbers, texts,"
                        " lists and mappings"
                    ) from error
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what loading needs, and rewind the progress to the last complete optimizer step.

        Raises:
            UserError: a weight is not finite; nothing is written.
        """
        if not self.sharded:
            check_weights(checkpoint["state_dict"], f"step {checkpoint['global_step']}")
        checkpoint[CHECKPOINT_KEY] = self.student.record()
        checkpoint[_TASKS_KEY] = self.task_texts(self.tasks)
        checkpoint[_LIMITS_KEY] = dict(self._target_limits)
        if self._seed >= 0:
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
        """Restore seed and position. Raises a ``UserError`` if tasks or adapter differ, or weights are not finite."""
        if not self.sharded:
            check_weights(checkpoint["state_dict"], "ckpt_path")
        if self._trainer is not None and self._trainer.training:
            before, now = checkpoint.get("hyper_parameters", {}).get("optimizer"), self.hparams["optimizer"]
            if before not in (None, now):
                raise UserError(
                    f"ckpt_path: the checkpoint holds the state of {before}, which is of no use to {now};"
                    f" give --model.optimizer {before}"
                )
            check_optimizer_states(checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", []))
        kept, adapter = checkpoint.get(CHECKPOINT_KEY, {}).get("adapter"), self.student.adapter
        if (adapter or kept) and not (adapter and kept and adapter.same(Adapter.of(kept))):
            raise UserError(
                f"ckpt_path: the checkpoint was trained with the adapter {kept}, here it is"
                f" {adapter and adapter.plain()}; give model.adapter as it was trained with"
            )
        own = self.task_texts(self.tasks)
        if (trained := checkpoint.get(_TASKS_KEY, own)) != own:
            raise UserError(
                f"ckpt_path: the checkpoint was trained on {trained} (task: prefix and target), {type(self).__name__}"
                f" here asks for {own}; give the method and the prefixes that it was trained with"
            )
        self._target_limits = dict(checkpoint.get(_LIMITS_KEY, {}))
        self._seed = checkpoint.get(_SEED_KEY, -1)
        if (loops := checkpoint.get("loops")) is not None:
            self._resumed_batches = loops["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
            self._resumed_loaders = loops["fit_loop"]["state_dict"].get("combined_loader", [])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # a plain classmethod in place of Lightning's descriptor
        cls,
        checkpoint_path: Any,
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, but rebuilds the student from the checkpoint and unpickles plain data only.

        Args:
            checkpoint_path: the checkpoint file.
            kwargs: Lightning's own arguments, and constructor arguments that replace the saved ones (``student``
                changes the recorded name only).
        """
        saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]
        given = {"weights_only": True, "from_scratch": True} | kwargs | {"student": str(checkpoint_path)}
        if objectives := saved.get("objectives"):
            given.setdefault("objectives", [build_objective(plain) for plain in objectives])
        module = super().load_from_checkpoint(checkpoint_path, **given)
        remembered = {name: saved[name] for name in ("student", "from_scratch") if name in saved} | kwargs
        for name in ("student", "from_scratch"):
            module.hparams[name] = str(remembered[name]) if name == "student" else remembered[name]
        module.set_logged_hparams()
        return module

    def set_logged_hparams(self) -> None:
        """Log the current settings, without the tasks, which the data module logs."""
        self._hparams_initial = copy.deepcopy(self.hparams)
        del self._hparams_initial["tasks"]
