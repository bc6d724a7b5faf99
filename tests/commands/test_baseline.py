"""The label-only baseline beside a run is what a run of its own would have been."""

import re
from pathlib import Path

import pytest
import torch

from lit_distill.records import RECORD, read_record
from tests.runs import metric_rows, run, run_folders, small_model, small_trainer, toy_data

pytestmark = pytest.mark.usefixtures("here")


def test_the_baseline_is_a_standard_run(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = [*toy_data(), *small_trainer(3), "--model.learning_rate=0.01", "--model.dropout=0.1", "--seed_everything=5"]
    run("fit", small_model(student_folder), "--baseline_after_fit=true", rest)
    out = capsys.readouterr().out
    [both] = run_folders()
    run("fit", small_model(student_folder, "StandardModule"), rest)
    # and none where it is not asked for
    assert "baseline" not in capsys.readouterr().out
    [alone] = [folder for folder in run_folders() if folder.parent.name.startswith("toy-Standard")]
    [row] = [row for row in metric_rows(alone) if "test/accuracy" in row]
    found = re.search(r"accuracy of the label-only baseline\s+\S\s+(\S+)\s+\S\s+(\S+) to (\S+)", out)
    assert found is not None
    names = ("test/accuracy", "test/accuracy_low", "test/accuracy_high")
    assert [float(text) for text in found.groups()] == pytest.approx([float(row[name]) for name in names], abs=5e-4)
    [own] = both.glob("baseline/checkpoints/*.ckpt")
    [other] = alone.glob("checkpoints/best*.ckpt")
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in (own, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    # the run's own student is the one that is shown and saved
    assert "with StepByStep" in (both / "student" / "README.md").read_text()
    assert out.count("sample 1 of test") == 1
    assert read_record(both).method == "StepByStep"
    assert list(both.rglob(RECORD)) == [both / RECORD]
