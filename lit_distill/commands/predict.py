"""``predict``: write predictions as JSON lines."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, answer_row
from lit_distill.evaluation.summaries import gather_answers
from lit_distill.files import atomic_write
from lit_distill.modules.base import DistillModule


class _Writer(Callback):
    """Collects the answers of all ranks, and writes each row once, in the data's order."""

    def __init__(self, path: Path, datamodule: RationaleDataModule) -> None:
        self.path, self.datamodule = path, datamodule
        self.answers: list[Answer] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: list[Answer], *args: Any
    ) -> None:
        self.answers += outputs

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)  # noqa: S101 - for the type checker
        answers = self.answers
        if trainer.world_size > 1:
            answers = gather_answers(answers, pl_module.gather, pl_module.device)
        if trainer.is_global_zero:
            key = self.datamodule.answer_key(self.datamodule.predict_split)
            with atomic_write(self.path) as file:
                for answer in sorted(answers, key=lambda answer: answer.index):
                    file.write(json.dumps(answer_row(answer, key), ensure_ascii=False) + "\n")
            rank_zero_info(f"Wrote {len(answers)} predictions to {self.path}")


def write_predictions(
    trainer: pl.Trainer, module: DistillModule, datamodule: RationaleDataModule, path: Path, **kwargs: Any
) -> None:
    """Predict the data module's ``predict_split`` and write one JSON object per row; labels may be absent.

    Args:
        trainer: runs the prediction.
        module: the student.
        datamodule: the data.
        path: the file; keys are id, input, label, prediction, correct, rationale.
        **kwargs: for ``Trainer.predict``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            # loggers take a folder with files for an earlier run
            path.unlink()
    except OSError as error:
        raise UserError(f"predictions: {path} cannot be read or written: {error.strerror}") from error
    trainer.callbacks.append(_Writer(path, datamodule))  # type: ignore[attr-defined]  # not declared by Lightning
    trainer.predict(module, datamodule=datamodule, return_predictions=False, **kwargs)
