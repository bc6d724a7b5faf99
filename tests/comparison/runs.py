"""Run folders as a finished ``fit`` leaves them, without one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_distill.records import RECORD, RunRecord, write_predictions_file, write_record

SIZES = {"t5-v1_1-small": 76_961_152, "t5-v1_1-base": 247_577_856, "t5-v1_1-large": 783_150_080}


def config_of(
    dataset: str, method: str, student: str, model: Mapping[str, Any], data: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """A config with what differs between methods, and with what is of no account."""
    defaults: dict[str, dict[str, Any]] = {
        "StepByStep": {"rationale_weight": 1.0},
        "SingleTask": {"order": "rationale_first"},
    }
    own = defaults.get(method, {})
    return {
        "seed_everything": data["seed"],
        "trainer": {
            "max_steps": 10_000,
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}}],
        },
        "model": {
            "class_path": f"lit_distill.modules.{method}Module",
            "init_args": {"student": f"google/{student}", "learning_rate": 5e-5, "from_scratch": False}
            | own
            | dict(model),
        },
        "data": {
            "class_path": f"lit_distill.data.{dataset.upper()}DataModule",
            "init_args": {"data_dir": str(folder / "data"), "batch_size": 64, "rationales": None} | dict(data),
        },
        "checkpoint": {"dirpath": str(folder / "checkpoints")},
    }


def answers(accuracy: float, rows: int, seed: int, shared: int = 0) -> list[bool]:
    """Which rows a student has right: hard rows are hard for all of one ``shared`` seed."""
    common, own = np.random.default_rng(1000 + shared).random(rows), np.random.default_rng(seed).random(rows)
    mixed = 0.75 * common + 0.25 * own
    right: list[bool] = (np.argsort(np.argsort(mixed)) < round(accuracy * rows)).tolist()
    return right


def write_run(
    folder: Path,
    *,
    correct: Sequence[bool] | None = None,
    dataset: str = "cqa",
    method: str = "Standard",
    student: str = "t5-v1_1-base",
    label_source: str = "gold",
    train_fraction: float = 1.0,
    seed: int = 0,
    data_seed: int | None = None,
    rationales: str | None = None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    predictions: bool = True,
    further: Mapping[str, float] | None = None,
    votes: Sequence[bool] | None = None,
    **more: Any,
) -> Path:
    """One run.

    Args:
        folder: the run's; it is made.
        correct: of each test row.
        predictions: also write them.
        further: metrics, by their logged names.
        votes: of each test row, whether the vote was right.
        **more: further fields of the record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    correct = answers(0.62, 200, seed) if correct is None else correct
    data_seed = seed if data_seed is None else data_seed
    rationales = rationales or (None if method == "Standard" else "own")
    given = {"seed": data_seed, "label_source": label_source, "train_fraction": train_fraction}
    given |= {"rationale_pairing": rationales or "own"}
    fields: dict[str, Any] = {
        "dataset": dataset,
        "method": method,
        "student": student,
        "label_source": label_source,
        "train_fraction": train_fraction,
        "seed": seed,
        "data_seed": data_seed,
        "train_rows": round(8766 * train_fraction) if train_fraction <= 1 else int(train_fraction),
        "test_rows": len(correct),
        "steps": 10_000,
        "metrics": {"test/accuracy": float(np.float32(np.mean(correct))), "test/loss": 0.25 + 0.001 * seed}
        | ({} if votes is None else {"test/vote_accuracy": float(np.mean(votes))})
        | dict(further or {}),
        "validation": {"val/accuracy": 0.6, "step": 2000},
        "rationales": rationales,
        "parameters": SIZES.get(student, 1_000_000),
        "fingerprints": {"train": f"{train_fraction:g}-{data_seed}-{rationales}", "test": f"{dataset}-test"},
        "config": config_of(dataset, method, student, model or {}, given | dict(data or {}), folder),
        "command": [
            "python",
            "-m",
            "lit_distill",
            "fit",
            "--config",
            f"configs/{dataset}/{method}.yaml",
            f"--seed={seed}",
        ],
        "versions": {"lit_distill": "0.1.0", "torch": "2.13.0"},
        "git": {"commit": "a" * 40, "changed": False},
        "started": f"2026-11-21T06:00:{seed:02d}+00:00",
        "wall_seconds": 12.5,
        "peak_memory_mib": 617.0,
    }
    if predictions:
        write_predictions_file(
            folder,
            (
                {
                    "id": f"{dataset}-test-{i}",
                    "input": f"row {i}",
                    "label": "yes",
                    "prediction": "yes" if right else "no",
                }
                | {"correct": right, "rationale": None}
                | ({} if votes is None else {"vote": "yes" if votes[i] else "no", "vote_correct": votes[i]})
                for i, right in enumerate(correct)
            ),
        )
    write_record(folder, RunRecord(**(fields | more)))
    return folder


def edit(folder: Path, **changes: object) -> None:
    """Change fields of a record."""
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | changes))


def write_runs(root: Path, seeds: Sequence[int], accuracy: float, rows: int = 200, **how: Any) -> None:
    """A run for each seed, about as good."""
    keys = ("dataset", "method", "student", "label_source", "train_fraction", "rationales")
    name = "-".join(str(how.get(key, "")) for key in keys)
    name += "-".join(f"{key}={value}" for key, value in ((how.get("model") or {}) | (how.get("data") or {})).items())
    for seed in seeds:
        own = accuracy + 0.012 * float(np.random.default_rng(seed + 77).normal())
        write_run(root / f"{name}-seed{seed}", correct=answers(own, rows, seed), seed=seed, **how)
