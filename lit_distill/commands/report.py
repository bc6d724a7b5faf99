"""The report at the end of a command: metrics, the exported student, sample predictions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill.evaluation.answers import Evaluation
from lit_distill.evaluation.metrics import judge
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
"""Names of the metrics in the table, in order."""


@rank_zero_only
def report(module: DistillModule, *, student: Path | None = None, baseline: Mapping[str, float] | None = None) -> None:
    """Print an evaluation.

    Args:
        module: with the last evaluation.
        student: folder of the exported student, if any.
        baseline: metrics of a label-only baseline, by logged name.
    """
    evaluation = module.evaluation
    if evaluation is None:
        return
    console = Console()
    console.print()
    console.print(metrics_table(evaluation, baseline))
    if student is not None:
        # on its own unwrapped line, so that it can be copied
        console.print("Saved student:", style="bold")
        console.print(Text(f"  {student}"), soft_wrap=True)
    for number, row in enumerate(evaluation.sample_rows()[:_SHOWN_SAMPLES], start=1):
        console.print(_sample(row, f"sample {number} of {evaluation.split}"))


def metrics_table(evaluation: Evaluation, baseline: Mapping[str, float] | None) -> Table:
    """The metrics with 95 % intervals, and the accuracies of chance and baseline."""
    rows, whole = len(evaluation.answers), len(evaluation.key)
    shown = f"{rows} rows" if rows == whole else f"{rows} of {whole} rows"
    table = Table("metric", title=f"{evaluation.split} ({shown})", title_justify="left")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")

    def add(name: str, values: Mapping[str, float], key: str) -> None:
        low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        table.add_row(escape(name), f"{values[key]:.3f}", interval)

    known = list(_NAMES)
    metrics = evaluation.metrics
    for name in sorted(metrics, key=lambda name: (known.index(name) if name in known else len(known), name)):
        if not name.endswith(("_low", "_high")):
            add(_NAMES.get(name, name.replace("_", " ")), metrics, name)
    table.add_section()
    if chance := chance_level(evaluation):
        add(f"chance: {chance[0]}", {"accuracy": chance[1]}, "accuracy")
    if baseline is not None:
        add("accuracy of the label-only baseline", baseline, f"{evaluation.split}/accuracy")
    return table


def chance_level(evaluation: Evaluation) -> tuple[str, float] | None:
    """The best accuracy without reading the input on the evaluated rows, and how it is reached.

    A uniform guess among closed choices, or the majority class of train; ``None`` if neither exists.
    """
    key = evaluation.key
    rows = [row for answer in evaluation.answers if key.labels[row := answer.index] is not None]
    levels: list[tuple[str, float]] = []
    if rows and key.choices and all(key.choices[row] for row in rows):
        # a repeated choice is guessed more often
        hits = [key.choices[row].count(str(key.labels[row])) / len(key.choices[row]) for row in rows]
        levels.append(("a uniform guess", sum(hits) / len(rows)))
    if rows and key.majority_label is not None:
        hits = [float(judge(key.metric)(key.majority_label, str(key.labels[row]))) for row in rows]
        levels.append((f"always {key.majority_label!r}", sum(hits) / len(rows)))
    return max(levels, key=lambda level: level[1], default=None)


def _sample(row: Mapping[str, Any], title: str) -> Panel:
    verdict = {True: ("right", "green"), False: ("wrong", "red"), None: ("", "")}[row["correct"]]
    text = Text()
    for name in ("input", "rationale", "prediction", "label"):
        if row[name] or (name != "rationale" and row[name] is not None):
            text.append(f"{name:<12}", style="bold").append(str(row[name]))
            if name == "prediction":
                text.append("  ").append(*verdict)
            text.append("\n")
    text.rstrip()
    return Panel(text, title=title, title_align="left")
