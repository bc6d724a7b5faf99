"""A decoder-only student, and adapters of both families, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.modules import StepByStepModule
from lit_distill.students import load
from lit_distill.tasks import LABEL
from tests.runs import (
    CONFIGS,
    break_off,
    last,
    metric_rows,
    read_lines,
    refusal,
    run,
    run_folders,
    small_model,
    small_toy,
    small_trainer,
    toy_data,
)
from tests.students import add_weights, make_causal_folder, make_student_folder

LORA = f"--config={CONFIGS / 'overlay/lora.yaml'}"

pytestmark = [
    pytest.mark.usefixtures("here"),
    # PEFT 0.21 asks transformers 5.23 by names that are going
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:`gradient_checkpointing:FutureWarning"
    ),
]


def student_of(family: str, folder: Path, **changes: Any) -> Path:
    """A tiny student with weights."""
    if family == "t5":
        return add_weights(make_student_folder(folder))
    make_causal_folder(folder, **changes)
    torch.manual_seed(11)
    student = load(folder, from_scratch=True)
    with torch.no_grad():
        for parameter in student.parameters():
            # so that it writes more than the end of a target, which is token 1
            parameter.normal_(std=0.3)
        student.network.lm_head.weight[1] = 0.0
    student.save(folder)
    return folder


@pytest.mark.parametrize("method", ["StepByStepModule", "SingleTaskModule"])
def test_a_method_trains_and_saves_a_causal_student(
    method: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of("causal", here / "tiny-llama")
    arguments = [small_model(student, method), toy_data(), small_trainer(3, 3)]
    run("fit", arguments)
    [folder] = run_folders()
    record = json.loads((folder / "run.json").read_text())
    assert record["student"] == "tiny-llama"
    assert {"test/accuracy", "test/loss"} <= set(record["metrics"])
    # closed choices are scored where the label is a task of its own
    assert ("test/scored_accuracy" in record["metrics"]) is (method != "SingleTaskModule")
    checkpoint = next((folder / "checkpoints").glob("best*.ckpt"))
    shutil.rmtree(student)
    run("predict", arguments, f"--ckpt_path={checkpoint}", "--predictions=a.jsonl")
    # the saved student says the same, through the command line and by the code of its card
    run("predict", [*small_model(folder / "student", method), toy_data(), small_trainer()], "--predictions=b.jsonl")
    first, second = read_lines(here / "a.jsonl"), read_lines(here / "b.jsonl")
    assert first == second
    assert any(row["prediction"] for row in first)
    if method != "SingleTaskModule":
        said = snippet(folder.absolute() / "student", first[0]["input"], monkeypatch, capsys)
        assert LABEL.read(said).label == first[0]["prediction"]


def snippet(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the code of a saved student's card prints for an input."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "your input" in code
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(code.replace("your input", text.replace("\n", "\\n")), {})  # noqa: S102 - the card's own
    return capsys.readouterr().out.strip()


TEMPLATE = (
    "{% for message in messages %}<s> Answer {{ message.content }} . {% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n' }}Rationale:{% endif %}"
)


@pytest.mark.parametrize("family", ["causal", "t5"])
def test_lora_from_its_overlay(
    family: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of(family, here / "student", attention_dropout=0.1)
    # 3 micro-batches an epoch in windows of 2 and 1
    small = [*small_model(student), *toy_data(10, 4), *small_trainer(4, 2), "--trainer.accumulate_grad_batches=2"]
    arguments = [LORA, *small, "--model.learning_rate=0.03", "--model.dropout=0.2", "--test_after_fit=false"]
    run("fit", arguments)
    [folder] = run_folders()
    record = json.loads((folder / "run.json").read_text())
    adapter = record["config"]["model"]["init_args"]["adapter"]
    assert (adapter["r"], adapter["alpha"], adapter["export"]) == (16, 32, "merged")
    checkpoint = next((folder / "checkpoints").glob("best*.ckpt"))
    # what did not learn is as it was
    before, weights = load(student).model.state_dict(), last(folder)["state_dict"]
    kept = {
        name.replace(".base_layer", "").removeprefix("student.model.base_model.model."): w
        for name, w in weights.items()
    }
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    assert metric_rows(folder)[0]["train/loss"] != metric_rows(folder)[-1].get("train/loss")
    module = StepByStepModule.load_from_checkpoint(checkpoint)
    assert all("lora_" in name for name, p in module.named_parameters() if p.requires_grad)
    # the saved student has it merged
    run("predict", arguments, f"--ckpt_path={checkpoint}", "--predictions=a.jsonl")
    run("predict", [*small_model(folder / "student"), *toy_data(10, 4), *small_trainer()], "--predictions=b.jsonl")
    assert read_lines(here / "a.jsonl") == read_lines(here / "b.jsonl")
    said = refusal(capsys, "predict", small, f"--ckpt_path={checkpoint}")
    assert said.startswith("ckpt_path: the checkpoint was trained with adapter {")
    said = refusal(capsys, "fit", arguments, "--model.adapter.target_modules=[query]")
    assert said.startswith("adapter: the student has no layers named query; it has ")
    if family == "t5":
        # its checkpoint was read above; how a run goes on from one does not depend on the family
        return
    # a broken run goes on bit by bit, without the student's folder
    break_off(monkeypatch, 4, arguments)
    broken = run_folders()[-1]
    shutil.rmtree(student)
    run("fit", arguments, f"--ckpt_path={broken / 'checkpoints/last.ckpt'}")
    resumed = last(run_folders()[-1])
    assert resumed["global_step"] == 4
    for name, weight in weights.items():
        assert torch.equal(weight, resumed["state_dict"][name]), name


def test_an_adapter_saved_alone_and_a_chat_template(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of("causal", here / "student")
    (student / "chat_template.jinja").write_text(TEMPLATE)
    arguments = [LORA, *small_toy(student, 3, 3), "--model.adapter.export=adapter", "--model.learning_rate=0.03"]
    run("fit", arguments, "--test_after_fit=false")
    [folder] = run_folders()
    saved = folder.absolute() / "student"
    assert not (saved / "model.safetensors").exists()
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(student)
    assert "apply_chat_template" in (saved / "README.md").read_text()
    best = next((folder / "checkpoints").glob("best*.ckpt"))
    run("predict", arguments, f"--ckpt_path={best}", "--predictions=a.jsonl")
    row = read_lines(here / "a.jsonl")[0]
    said = snippet(saved, row["input"], monkeypatch, capsys)
    assert LABEL.read(said).label == row["prediction"]


def test_a_name_in_place_of_settings_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = student_of("t5", here / "student")
    said = refusal(capsys, "fit", small_toy(student), "--model.teachers={big: t5-large}")
    assert said.startswith("model.teachers: got {'big': 't5-large'}; allowed are settings by name, as {NAME: {KEY: ")
    said = refusal(capsys, "fit", small_toy(student), "--model.objectives=[NoSuchLoss]")
    # where objectives of other tests are imported, they are listed
    assert said.startswith(("model.objectives: got 'NoSuchLoss'; allowed is ", "model.objectives: unknown class "))
    assert "or the import path of a class" in said
