"""When validation runs, what is logged of a step, when training stops."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoTokenizer

import lit_distill.callbacks
from lit_distill.callbacks import ValidateEverySteps
from lit_distill.data.toy import toy_example
from lit_distill.errors import UserError
from tests.runs import CONFIGS, at_work_in, metric_rows, run, run_folders, small_model, small_trainer, toy_data

RECORDER = "--trainer.callbacks=tests.test_callbacks.Recorder"


class Recorder(pl.Callback):
    """Notes of a run, by the steps at which things happen."""

    validated: ClassVar[list[int]] = []
    norms: ClassVar[list[float]] = []
    batches: ClassVar[list[int]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)
            self.batches.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        grads = [parameter.grad.flatten() for parameter in pl_module.parameters() if parameter.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.cat(grads).double()).item())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("validated", "norms", "batches"):
        monkeypatch.setattr(Recorder, name, [])
    with at_work_in(tmp_path, monkeypatch) as folder:
        yield folder


def fit(student: Path, *more: object, rows: int = 10, batch: int = 4, steps: int = 2, every: int | None = 1) -> None:
    run("fit", small_model(student), toy_data(rows, batch), small_trainer(steps, every), RECORDER, *more)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "every", "steps", "expected"),
    [
        # 3 micro-batches an epoch, windows of 2 and 1: steps and micro-batches run apart
        (10, 4, 2, 3, 7, [3, 6, 7]),
        (10, 4, 2, 2, 6, [2, 4, 6]),
        # an interval longer than an epoch
        (10, 4, 1, 5, 7, [5, 7]),
        # one window an epoch, shorter than the accumulation
        (6, 4, 4, 2, 5, [2, 4, 5]),
        # an interval beyond the run: once, at the end
        (10, 4, 1, 100, 2, [2]),
        (10, 4, 3, 1, 3, [1, 2, 3]),
    ],
)
def test_validation_is_due_by_optimizer_steps(
    rows: int, batch: int, accumulate: int, every: int, steps: int, expected: list[int], student_folder: Path
) -> None:
    more = [f"--trainer.accumulate_grad_batches={accumulate}", "--test_after_fit=false"]
    fit(student_folder, more, rows=rows, batch=batch, steps=steps, every=every)
    assert Recorder.validated == expected
    [folder] = run_folders()
    logged = [int(row["step"]) + 1 for row in metric_rows(folder) if "val/accuracy" in row]
    assert logged == expected
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == expected[-1] == steps


def test_a_run_that_ends_with_an_epoch_is_validated_there(student_folder: Path) -> None:
    # 3 steps an epoch
    fit(student_folder, "--trainer.max_epochs=2", "--test_after_fit=false", steps=-1, every=4)
    assert Recorder.validated == [4, 6]


def test_null_leaves_validation_to_the_trainer(student_folder: Path) -> None:
    more = ["--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches=3", "--test_after_fit=false"]
    fit(student_folder, more, steps=3, every=None)
    # of micro-batches, as Lightning counts
    assert Recorder.batches == [2, 4, 6, 8]


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_below_1_is_refused(every: int) -> None:
    with pytest.raises(UserError, match=r"validation\.every_n_steps must be at least 1"):
        ValidateEverySteps(every)


@pytest.mark.parametrize("clip", [[], ["--trainer.gradient_clip_val=0.5"]], ids=["free", "clipped"])
def test_the_gradients_norm_is_logged_before_clipping(clip: list[str], student_folder: Path) -> None:
    fit(student_folder, clip, "--trainer.accumulate_grad_batches=2", steps=3, every=100)
    [folder] = run_folders()
    logged = [float(row["train/grad_norm"]) for row in metric_rows(folder) if "train/grad_norm" in row]
    assert len(logged) == 3
    assert logged == pytest.approx(Recorder.norms, rel=1e-5)
    assert min(logged) > 0.5


def test_rows_are_logged_as_often_as_asked(student_folder: Path) -> None:
    fit(student_folder, "--trainer.log_every_n_steps=2", steps=5, every=100)
    [folder] = run_folders()
    rows = [row for row in metric_rows(folder) if "train/loss" in row]
    assert [row["step"] for row in rows] == ["1", "3"]
    assert all({"train/grad_norm", "train/examples_per_second"} <= row.keys() for row in rows)


def test_no_rows_are_logged_where_none_are_asked_for(student_folder: Path) -> None:
    fit(student_folder, "--trainer.log_every_n_steps=0", steps=2, every=100)
    [folder] = run_folders()
    assert not [row for row in metric_rows(folder) if "train/loss" in row]


def test_rates_count_examples_and_tokens_and_leave_all_but_training_out(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1.0)
    # a second passes with every look at the clock
    monkeypatch.setattr(lit_distill.callbacks, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    # half a second of the first step is that of choosing how to compute it
    choosing = itertools.chain([0.0], itertools.repeat(0.5))
    monkeypatch.setattr(lit_distill.modules.training, "time", SimpleNamespace(perf_counter=lambda: next(choosing)))
    # one window is all data: 3 micro-batches of 5, 5 and 2 rows
    fit(student_folder, "--trainer.accumulate_grad_batches=3", rows=12, batch=5, steps=2, every=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(student_folder)
    tokens = 0
    for position in range(12):
        row = toy_example(0, "train", position)
        assert row.label is not None
        assert row.rationale is not None
        texts = ["predict: " + row.input, row.label, "explain: " + row.input, row.rationale]
        tokens += sum(len(tokenizer(text)["input_ids"]) for text in texts)
    [folder] = run_folders()
    first, second = [row for row in metric_rows(folder) if "train/examples_per_second" in row]
    # started at 1, looked at 2
    assert float(first["train/examples_per_second"]) == pytest.approx(24)
    assert float(first["train/tokens_per_second"]) == pytest.approx(2 * tokens)
    assert float(first["train/steps_per_second"]) == pytest.approx(2)
    # from 2 to 3, when validation began, and from 4 to 5
    assert float(second["train/examples_per_second"]) == pytest.approx(6)
    assert float(second["train/tokens_per_second"]) == pytest.approx(tokens / 2)
    assert float(second["train/steps_per_second"]) == pytest.approx(0.5)


def test_a_run_ends_after_so_many_tokens(student_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(student_folder)
    tokens = 0
    for row in (toy_example(0, "train", position) for position in range(12)):
        texts = ["predict: " + row.input, str(row.label), "explain: " + row.input, str(row.rationale)]
        tokens += sum(len(tokenizer(text)["input_ids"]) for text in texts)
    # two micro-batches of 4 of 12 rows a step
    budget = f"--max_tokens={round(3.2 * tokens * 8 / 12)}"
    for method in ("StepByStepModule", "StandardModule"):
        small = [*small_model(student_folder, method), *toy_data(12, 4), *small_trainer(50, 100)]
        run("fit", small, budget, "--trainer.accumulate_grad_batches=2", "--test_after_fit=false")
    standard, both = (max(int(row["step"]) for row in metric_rows(folder)) + 1 for folder in run_folders())
    assert both == 3
    # a step without rationales reads less than half
    assert standard > 6
    small = [*small_model(student_folder), *toy_data(12, 4), *small_trainer(50, 100)]
    # which ends a run alone, too
    run(
        "fit",
        *small,
        budget,
        "--trainer.max_steps=-1",
        "--trainer.accumulate_grad_batches=2",
        "--baseline_after_fit=true",
    )
    # the baseline takes as many steps
    [_] = run_folders()[-1].glob("baseline/checkpoints/*step=3.ckpt")


def test_early_stopping_stops(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_distill.modules.evaluating.summarise", lambda *args, **kwargs: {"accuracy": 0.5})
    overlay = f"--config={CONFIGS / 'overlay' / 'early_stopping.yaml'}"
    run("fit", small_model(student_folder), toy_data(), small_trainer(30), overlay, "--test_after_fit=false")
    [folder] = run_folders()
    validated = [row["step"] for row in metric_rows(folder) if "val/accuracy" in row]
    # the first, and then the overlay's ten without a rise
    assert len(validated) == 11
