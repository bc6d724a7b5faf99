"""Pruning in training: its schedule, what is zero, and an export that is smaller and says the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_distill.errors import UserError
from lit_distill.pruning import Pruning
from lit_distill.shrinking.shrink import without_zeros
from lit_distill.shrinking.structure import Structure
from lit_distill.students import load
from tests.runs import break_off, refusal, run, run_folders, small_model, small_trainer, toy_data
from tests.shrinking.test_shrink import logits_of, student_of
from tests.students import make_causal_folder, make_student_folder

pytestmark = pytest.mark.usefixtures("here")

HALF = [
    "--trainer.callbacks+=lit_distill.pruning.Pruning",
    "--trainer.callbacks.d_ff=0.5",
    "--trainer.callbacks.heads=0.5",
]
EACH = [*HALF, "--trainer.callbacks.begin=0.25", "--trainer.callbacks.end=0.75", "--trainer.callbacks.every_n_steps=1"]


def test_the_schedule_is_cubic() -> None:
    pruning = Pruning(d_ff=0.5)
    pruning._first, pruning._final = 10, 30
    assert [pruning.part(step) for step in (0, 10, 15, 20, 30, 99)] == [0, 0, 1 - 0.75**3, 0.875, 1, 1]
    pruning._first = pruning._final = 1
    assert [pruning.part(step) for step in (0, 1, 2)] == [0, 1, 1]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_exported_student_is_smaller_and_the_same(kind: str) -> None:
    folder = Path("student")
    student = make_student_folder(folder) if kind == "t5" else make_causal_folder(folder, num_key_value_heads=2)
    given = [
        *small_model(student),
        *toy_data(),
        *small_trainer(4, 1),
        EACH,
        "--model.learning_rate=0.01",
    ]
    run("fit", given)
    (folder,) = run_folders()
    (best,) = folder.glob("checkpoints/best-*.ckpt")
    # earlier ones were better or not, but larger
    assert best.name in ("best-step3.ckpt", "best-step4.ckpt")
    large, small = load(best, fast=False), load(folder / "student", fast=False)
    config: Any = small.network.config
    assert (config.num_attention_heads, config.d_ff if kind == "t5" else config.intermediate_size) == (1, 16)
    expected = logits_of(large.network)
    error = (logits_of(small.network) - expected).abs().max()
    assert error <= 1e-6 * max(1.0, float(expected.abs().max()))
    assert sum(map(torch.numel, small.parameters())) < 0.8 * sum(map(torch.numel, large.parameters()))


def test_a_resumed_run_prunes_the_same(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*small_model(student_folder), *toy_data(), *small_trainer(4, 1), EACH, "--test_after_fit=false"]
    run("fit", given)
    break_off(monkeypatch, 3, given)
    run("fit", given, "--resume")
    whole, resumed = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in run_folders())
    assert whole["callbacks"]["Pruning"] == resumed["callbacks"]["Pruning"]
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


def test_a_run_that_ends_before_the_schedule_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pruning, trainer = Pruning(d_ff=0.5), Trainer(logger=False, barebones=True, accelerator="cpu", max_steps=4)
    pruning._structure, pruning._final = Structure(student_of(tmp_path, "t5")), 3
    with caplog.at_level("INFO"):
        pruning.on_train_end(trainer, LightningModule())
    told = "Pruning: training ended at step 0, before all is gone at step 3: the student is larger than asked for"
    assert told in caplog.messages


@pytest.mark.parametrize("kind", ["t5", "qwen2"])
def test_only_what_is_zero_in_every_layer_goes(tmp_path: Path, kind: str) -> None:
    student = student_of(tmp_path, kind)
    model = without_zeros(student)
    assert logits_of(model).equal(logits_of(student.network))
    assert model.num_parameters() == student.network.num_parameters()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Pruning: d_ff or heads must be above 0, or nothing goes"),
        ({"d_ff": 1.0}, "Pruning: d_ff must be at least 0 and below 1, got 1.0"),
        ({"heads": 0.5, "begin": 0.8}, "Pruning: end must be above 0.8 and at most 1, got 0.7"),
        ({"heads": 0.5, "every_n_steps": 0}, "Pruning: every_n_steps must be an integer >= 1, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        Pruning(**settings)
    assert str(error.value) == said


def test_what_has_no_whole_weights_is_refused(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*small_model(student_folder), *toy_data(), *small_trainer(2), *HALF, "--model.adapter.r=2"]
    assert refusal(capsys, "fit", given).startswith("Pruning: neither with a sharded strategy nor with an adapter")
