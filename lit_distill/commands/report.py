"""What an evaluation ends with: metrics, the saved student and sample predictions, or a file of predictions."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lit_distill.data.base import RationaleDataModule
from lit_distill.evaluation.answers import Answer, Evaluation, answer_row, gather_answers, worst_group
from lit_distill.files import atomic_write
from lit_distill.modules.base import DistillModule
from lit_distill.records import FLOORS, below_floor
from lit_distill.tables import console_table, text_panel

_SHOWN_SAMPLES = 3


@rank_zero_only
def report(
    module: DistillModule,
    *,
    student: Path | None = None,
    baseline: Mapping[str, float] | None = None,
    floors: Mapping[str, float] | None = None,
    read: Mapping[str, int] | None = None,
    best: Mapping[str, float] | None = None,
) -> None:
    """Print the module's last evaluation, with an exported student's folder, metrics of a baseline, and `floors`.

    Without an evaluation, as of a student that only reads, print what it has ``read`` and its losses, of the ``best``
    checkpoint if there is one. A last evaluation on val is of the last step: that of the best stands beside it.
    """
    evaluation = module.evaluation
    saved = best if best and evaluation and evaluation.split == "val" else {}
    console = Console()
    if evaluation is None:
        found = module.trainer.callback_metrics
        losses = {name: float(value) for name, value in found.items() if name.startswith("val/")}
        table = losses_table(module.trainer.datamodule.name, _of_best(losses, best or {}), read or {})  # type: ignore[attr-defined]
    else:
        table = metrics_table(evaluation, baseline, floors, saved)
    console.print()
    console.print(table)
    if evaluation and floors:
        accuracy = saved.get("val/accuracy", evaluation.metrics.get("accuracy", 1.0))
        if accuracy < max(floors.values()):
            console.print(below_floor(accuracy, max(floors.values())))
    if student is not None:
        # on its own unwrapped line, so that it can be copied
        console.print("Saved student:", style="bold")
        console.print(Text(f"  {student}"), soft_wrap=True)
    if evaluation is None:
        return
    for number, row in enumerate(evaluation.sample_rows()[:_SHOWN_SAMPLES], start=1):
        console.print(text_panel(f"sample {number} of {evaluation.split}", _sample(row)))


def losses_table(title: str, losses: Mapping[str, float], read: Mapping[str, int]) -> Table:
    """What a student has read, and its losses."""
    table = console_table(title, [""], ["value"])
    for name, number in read.items():
        table.add_row(name, f"{number:,}")
    for name, value in sorted(losses.items()):
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    return table


def _of_best(last: Mapping[str, float], best: Mapping[str, float]) -> Mapping[str, float]:
    """What is known of the saved checkpoint: the metric that chose it; without one, the metrics of the last step."""
    found = {name: value for name, value in best.items() if name != "step"}
    # the loss is that of the texts alone
    if "val/loss" in found and last.get("val/loss") == last.get("val/text_loss"):
        found["val/perplexity"] = math.exp(min(found["val/loss"], 700))
    return found or last


def metrics_table(
    evaluation: Evaluation,
    baseline: Mapping[str, float] | None,
    floors: Mapping[str, float] | None = None,
    saved: Mapping[str, float] | None = None,
) -> Table:
    """The metrics with 95 % intervals, of the ``saved`` student too, accuracies of chance, floors and baseline."""
    count, whole = len(evaluation.answers), len(evaluation.key)
    part = "" if count == whole else f" of {whole}"
    table = console_table(f"{evaluation.split} ({count}{part} rows)", ["metric"], ["value", "95 % interval"])
    metrics = evaluation.metrics
    # the losses last
    shown = sorted((name.endswith("loss"), name) for name in metrics if not name.endswith(("_low", "_high")))
    rows: list[tuple[str, Mapping[str, float], str]]
    worst = worst_group(evaluation.answers, evaluation.key)
    titles = {"worst_group_accuracy": f"worst group accuracy ({worst[0]})"} if worst else {}
    rows = [(titles.get(name, name.replace("_", " ")), metrics, name) for _, name in shown]
    saved = saved or {}
    for name in saved.keys() - {"step"}:
        title = f"{name.removeprefix('val/').replace('_', ' ')} of the saved student"
        rows.append((f"{title} (step {saved['step']})" if "step" in saved else title, saved, name))
    if chance := evaluation.chance():
        rows.append((f"chance: {chance[0]}", {"accuracy": chance[1]}, "accuracy"))
    rows += [(f"floor: {FLOORS[name]}", {"accuracy": value}, "accuracy") for name, value in (floors or {}).items()]
    if baseline is not None:
        rows.append(("accuracy of the label-only baseline", baseline, f"{evaluation.split}/accuracy"))
    for title, values, name in rows:
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        table.add_row(escape(title), f"{values[name]:.3f}", interval)
    return table


def _sample(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    verdict = {True: "  right", False: "  wrong", None: ""}[row["correct"]]
    texts = {**row, "prediction": f"{row['prediction']}{verdict}"}
    given = {name: texts[name] for name in ("input", "rationale", "prediction", "label") if texts[name] is not None}
    return [(name, text) for name, text in given.items() if text or name != "rationale"]


class _Writer(Callback):
    """Writes the answers of all ranks, each row once, in the data's order."""

    def __init__(self, path: Path, data: RationaleDataModule) -> None:
        self.path, self.data = path, data
        self.answers: list[Answer] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: list[Answer], *args: Any
    ) -> None:
        self.answers += outputs

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        answers = gather_answers(self.answers, pl_module)
        if trainer.is_global_zero:
            key = self.data.answer_key(self.data.predict_split)
            with atomic_write(self.path) as file:
                for answer in answers:
                    file.write(json.dumps(answer_row(answer, key), ensure_ascii=False) + "\n")
            rank_zero_info(f"Wrote {len(answers)} predictions to {self.path}")


def write_predictions(
    trainer: pl.Trainer, module: DistillModule, data: RationaleDataModule, path: Path, **kwargs: Any
) -> None:
    """Predict the data module's ``predict_split``: one JSON object per row, whose label may be absent.

    Its keys are those of `answer_row`; ``kwargs`` are for ``Trainer.predict``.
    """
    # before the work: whether it can be written
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        # loggers take a folder with files for an earlier run
        path.unlink()
    trainer.callbacks.append(_Writer(path, data))  # type: ignore[attr-defined]  # not declared by Lightning
    trainer.predict(module, datamodule=data, return_predictions=False, **kwargs)
