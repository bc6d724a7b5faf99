"""The tidy table: one row a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_distill.comparison.comparing import Comparison
from lit_distill.comparison.runs import Run
from lit_distill.comparison.settings import WEIGHT, as_text, whole_config


def run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row a run, those that were done again included; all rows have the same keys."""
    runs = sorted((*comparison.runs, *comparison.repeated), key=_order)
    keys = sorted({key for section in comparison.sections for key in section.keys})
    metrics = sorted({name for run in runs for name in run.record.metrics})
    return [_row(run, keys, metrics, comparison.duplicates.get(run.source)) for run in runs]


def _order(run: Run) -> tuple[object, ...]:
    record = run.record
    setting = (record.dataset, record.label_source, record.student, record.train_fraction, record.method)
    return *setting, *run.seeds, run.source


def _row(run: Run, keys: Sequence[str], metrics: Sequence[str], duplicate_of: str | None) -> dict[str, Any]:
    record, config = run.record, whole_config(run.record.config)
    selected = {name: value for name, value in record.validation.items() if name != "step"}
    weight = config.get(WEIGHT)
    return {
        "dataset": record.dataset,
        "method": record.method,
        "student": record.student,
        "parameters": record.parameters or None,
        "label_source": record.label_source,
        "train_fraction": float(record.train_fraction),
        "train_rows": record.train_rows or None,
        "rationales": record.rationales,
        "rationale_weight": float(weight) if isinstance(weight, int | float) else None,
        **{key: as_text(config[key]) if key in config else None for key in keys},
        "seed": record.seed,
        "data_seed": record.data_seed,
        **{name: _number(record.metrics.get(name)) for name in metrics},
        "validation_metric": next(iter(selected), None),
        "validation_value": _number(next(iter(selected.values()), None)),
        "validation_step": _number(record.validation.get("step")),
        "test_rows": record.test_rows or None,
        "teacher_accuracy": _number(record.teacher_accuracy),
        "steps": record.steps,
        "wall_seconds": _number(record.wall_seconds),
        "peak_memory_mib": _number(record.peak_memory_mib),
        "started": record.started,
        "commit": str(record.git.get("commit", "")) or None,
        "train_fingerprint": record.fingerprints.get("train"),
        "test_fingerprint": record.fingerprints.get("test"),
        "test_ids": run.ids or None,
        "predictions": run.predictions is not None,
        "duplicate_of": duplicate_of,
        "folder": run.source,
    }


def _number(value: object) -> float | None:
    """A finite number; a record holds whatever JSON does."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 1e308:
        return None
    return float(value)


def write_table(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write ``runs.parquet`` and ``runs.csv``."""
    # only those who compare wait for it
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.csv as pa_csv  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    table = pa.Table.from_pylist(list(rows))
    pq.write_table(table, folder / "runs.parquet")
    pa_csv.write_csv(table, folder / "runs.csv")
