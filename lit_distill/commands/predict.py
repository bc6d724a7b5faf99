"""``predict``: what a student says of each row, as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.batch import TaskBatch
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, answer_row
from lit_distill.evaluation.summaries import gather_answers
from lit_distill.files import atomic_write
from lit_distill.modules.base import DistillModule


class _Writer(BasePredictionWriter):
    """Collects every rank's answers, and writes each row once, in the data's order."""

    def __init__(self, path: Path, datamodule: RationaleDataModule) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self.datamodule = datamodule
        self.answers: list[Answer] = []

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: list[Answer],
        batch_indices: Sequence[int] | None,
        batch: TaskBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.answers += prediction

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)  # noqa: S101 - for the type checker
        answers = (
            gather_answers(self.answers, pl_module.gather, pl_module.device) if trainer.world_size > 1 else self.answers
        )
        if not trainer.is_global_zero:
            return
        key = self.datamodule.answer_key(self.datamodule.predict_split)
        with atomic_write(self.path) as file:
            for answer in sorted(answers, key=lambda answer: answer.index):
                file.write(json.dumps(answer_row(answer, key), ensure_ascii=False) + "\n")
        rank_zero_info(f"Wrote {len(answers)} predictions to {self.path}")


def write_predictions(
    trainer: pl.Trainer, module: DistillModule, datamodule: RationaleDataModule, path: Path, **kwargs: Any
) -> None:
    """Predict the data module's ``predict_split`` and write one JSON object a row.

    Args:
        trainer: runs the prediction.
        module: the student.
        datamodule: the data; labels may be absent.
        path: the file; its keys are id, input, label, prediction, correct, rationale.
        **kwargs: for ``Trainer.predict``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            # a logger takes a folder with files for an earlier run's
            path.unlink()
    except OSError as error:
        raise UserError(f"predictions: cannot write {str(path)!r} ({error.strerror})") from error
    trainer.callbacks.append(_Writer(path, datamodule))  # type: ignore[attr-defined]  # not declared by Lightning
    trainer.predict(module, datamodule=datamodule, return_predictions=False, **kwargs)
