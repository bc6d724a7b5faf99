"""How a command ends: the metrics as a table, the saved student, sample predictions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill.data.base import RationaleDataModule
from lit_distill.evaluation.answers import Evaluation
from lit_distill.evaluation.metrics import judge
from lit_distill.export import CardFacts, export_checkpoint, model_card, origin
from lit_distill.files import write_text
from lit_distill.modules.base import DistillModule

_SHOWN_SAMPLES = 3

_NAMES = {
    "accuracy": "accuracy",
    "scored_accuracy": "accuracy, choices scored",
    "macro_f1": "macro F1",
    "rouge_l": "ROUGE-L of rationales",
    "rationale_ends_in_prediction": "rationales that end in the prediction",
    "loss": "loss",
}


def save_best_student(
    trainer: pl.Trainer, module: DistillModule, data: RationaleDataModule, best: Path | None, folder: Path
) -> Path | None:
    """Save the best checkpoint's student as ``student`` in the run's folder, on rank 0.

    Returns:
        The student's folder; ``None`` where no checkpoint was kept.
    """
    if best is None:
        return None
    if not best.is_file():
        rank_zero_warn(f"{best} is a sharded checkpoint: no student is saved; consolidate it and export it by hand")
        return None
    target = folder / "student"
    if trainer.is_global_zero:
        export_checkpoint(
            best, target, prefixes=module.prefixes, generation=_generation(module), facts=_card_facts(module, data)
        )
    trainer.strategy.barrier("student")
    return target


@rank_zero_only
def add_baseline(
    student: Path, module: DistillModule, data: RationaleDataModule, baseline: Mapping[str, float]
) -> None:
    """Write a saved student's card once more, with the label-only baseline beside its metrics."""
    facts = replace(_card_facts(module, data), baseline=baseline)
    write_text(student / "README.md", model_card(facts, module.prefixes, _generation(module)))


def _generation(module: DistillModule) -> dict[str, dict[str, Any]]:
    return {task: module.generation_settings(task) for task in module.active_tasks}


def _card_facts(module: DistillModule, data: RationaleDataModule) -> CardFacts:
    settings = dict(module.hparams)
    evaluation = module.evaluation
    tested = evaluation is not None and evaluation.split == "test"
    base_model, licence = origin(str(settings["student"]), from_scratch=settings["from_scratch"])
    return CardFacts(
        method=type(module).__name__.removesuffix("Module"),
        dataset=data.name,
        student=Path(str(settings["student"])).name,
        settings=settings,
        data=data.describe(),
        metrics=evaluation.metrics if evaluation is not None and tested else {},
        rows=len(evaluation.answers) if evaluation is not None and tested else 0,
        base_model=base_model,
        license=licence,
        hub_dataset=data.hub_name,
    )


@rank_zero_only
def report(
    module: DistillModule,
    *,
    student: Path | None = None,
    baseline: Mapping[str, float] | None = None,
    seconds: float = 0.0,
    validation: float = 0.0,
) -> None:
    """Print an evaluation: a table of metrics, the student's folder, sample predictions.

    Args:
        module: it holds its last evaluation.
        student: the folder of the saved student, if there is one.
        baseline: metrics of a label-only baseline to show beside, under their logged names.
        seconds: how long the run took.
        validation: seconds of it that validation took.
    """
    evaluation = module.evaluation
    if evaluation is None:
        return
    console = Console()
    console.print()
    console.print(metrics_table(evaluation, baseline))
    if validation:
        console.print(f"Validation took {validation:.0f} s of {seconds:.0f} s ({validation / seconds:.0%}).")
    if student is not None:
        # on a line of its own and unwrapped, so that it can be copied
        console.print("Saved student:", style="bold")
        console.print(Text(f"  {student}"), soft_wrap=True)
    rows = evaluation.sample_rows()[:_SHOWN_SAMPLES]
    for number, row in enumerate(rows, start=1):
        console.print(_sample(row, f"sample {number} of {evaluation.split}"))


def metrics_table(evaluation: Evaluation, baseline: Mapping[str, float] | None) -> Table:
    """The metrics with their 95 % intervals, and the baselines' accuracies beside."""
    rows, whole = len(evaluation.answers), len(evaluation.key)
    shown = f"{rows} rows" if rows == whole else f"{rows} of {whole} rows"
    table = Table(title=f"{evaluation.split} ({shown})", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    metrics = evaluation.metrics
    for name in sorted(metrics, key=_order):
        if name.removesuffix("_low").removesuffix("_high") != name:
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        table.add_row(_NAMES.get(name, name.replace("_", " ")), f"{metrics[name]:.3f}", interval)
    chance = chance_level(evaluation)
    lines = [] if chance is None else [(f"chance: {chance[0]}", chance[1], "")]
    if baseline is not None:
        split = evaluation.split
        low, high = baseline[f"{split}/accuracy_low"], baseline[f"{split}/accuracy_high"]
        lines.append(("accuracy of the label-only baseline", baseline[f"{split}/accuracy"], f"{low:.3f} to {high:.3f}"))
    if lines:
        table.add_section()
        for name, value, interval in lines:
            table.add_row(escape(name), f"{value:.3f}", interval)
    return table


def chance_level(evaluation: Evaluation) -> tuple[str, float] | None:
    """The better of two ways to answer without reading the input, and its accuracy on the rows that were evaluated.

    A uniform guess among closed choices, or always the commonest training label; ``None`` where there is neither.
    """
    key = evaluation.key
    rows = [row for answer in evaluation.answers if key.labels[row := answer.index] is not None]
    if not rows:
        return None
    levels: list[tuple[str, float]] = []
    if key.choices and all(key.choices[row] for row in rows):
        # a choice that is there twice is guessed twice as often
        hits = [key.choices[row].count(str(key.labels[row])) / len(key.choices[row]) for row in rows]
        levels.append(("a uniform guess", sum(hits) / len(rows)))
    if key.majority_label is not None:
        hits = [float(judge(key.metric)(key.majority_label, str(key.labels[row]))) for row in rows]
        levels.append((f"always {key.majority_label!r}", sum(hits) / len(rows)))
    return max(levels, key=lambda level: level[1], default=None)


def _order(name: str) -> tuple[int, str]:
    known = list(_NAMES)
    return (known.index(name) if name in known else len(known), name)


def _sample(row: Mapping[str, Any], title: str) -> Panel:
    verdict = {True: ("right", "green"), False: ("wrong", "red"), None: ("", "")}[row["correct"]]
    text = Text()
    text.append("input       ", style="bold").append(f"{row['input']}\n")
    if row["rationale"]:
        text.append("rationale   ", style="bold").append(f"{row['rationale']}\n")
    text.append("prediction  ", style="bold").append(f"{row['prediction']}  ").append(*verdict)
    if row["label"] is not None:
        text.append("\nlabel       ", style="bold").append(f"{row['label']}")
    return Panel(text, title=title, title_align="left")
