"""The end of ``fit`` on a corpus: save the best checkpoint's student, write the record, show what was read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.text import Text

from lit_distill.commands.finish import Run, best_metric, repeatable, save_student, what_was_trained
from lit_distill.commands.loggers import names, run_folder
from lit_distill.exporting.hugging_face import push_folder
from lit_distill.records import NO_LABELS, RunRecord, write_record
from lit_distill.tables import console_table


def finish_reading(run: Run) -> None:
    """Save the best checkpoint's student, write the record and print the results."""
    config, trainer, folder = run.config, run.trainer, run_folder(run.trainer)
    steps, tokens, best = what_was_trained(run)
    # of all processes
    documents: Any = run.module.all_gather(torch.tensor(run.data.counts.get("documents", 0), device=run.module.device))
    student = save_student(run, best, folder / "student", {})
    if not config["trainer"]["fast_dev_run"]:
        write_results(run, folder, steps, tokens, int(documents.sum()))
    last = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    report_losses(_of_best(last, best_metric(run.selection)), steps=steps, tokens=tokens, student=student)
    if config["push_to_hub"] is not None and student is not None and trainer.is_global_zero:
        push_folder(student, config["push_to_hub"])


@rank_zero_only
def write_results(run: Run, folder: Path, steps: int, tokens: int, documents: int) -> None:
    """Write a run's record, which tells comparisons that it was tested on nothing."""
    dataset, method = names(run.config)
    record = RunRecord(
        dataset=dataset,
        method=method,
        student=Path(str(run.module.hparams["student"])).name,
        label_source=NO_LABELS,
        train_fraction=1.0,
        seed=run.config["seed_everything"],
        data_seed=run.data.seed,
        train_rows=documents,
        test_rows=0,
        steps=steps,
        metrics={},
        validation=best_metric(run.selection),
        train_tokens=tokens,
        **repeatable(run),
    )
    write_record(folder, record)


def _of_best(last: Mapping[str, float], best: Mapping[str, float]) -> dict[str, float]:
    """What is known of the saved checkpoint: the metric that chose it; without one, the metrics of the last step."""
    if not best:
        return dict(last)
    found = {name: value for name, value in best.items() if name != "step"}
    # the loss is that of the texts alone
    if "val/loss" in found and last.get("val/loss") == last.get("val/text_loss"):
        found["val/perplexity"] = math.exp(min(found["val/loss"], 700))
    return found


@rank_zero_only
def report_losses(
    metrics: Mapping[str, float], *, steps: int = 0, tokens: int = 0, student: Path | None = None
) -> None:
    """Print the metrics of a corpus, and with ``steps`` what was read in training."""
    table = console_table("corpus", [""], ["value"])
    if steps:
        table.add_row("optimizer steps", f"{steps:,}")
        table.add_row("tokens read, of sources and targets", f"{tokens:,}")
    for name, value in sorted(metrics.items()):
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console = Console()
    console.print()
    console.print(table)
    if student is not None:
        console.print("Saved student:", style="bold")
        console.print(Text(f"  {student}"), soft_wrap=True)
