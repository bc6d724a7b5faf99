"""Adapters of both families: they train as PEFT's own do, and are kept, merged and saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lit_distill.batch import IGNORE_INDEX, TaskBatch
from lit_distill.errors import UserError
from lit_distill.students import Student, load
from lit_distill.students.files import CHECKPOINT_KEY
from tests.students import add_weights, make_causal_folder, make_student_folder

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.23 by names that are going
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:`gradient_checkpointing:FutureWarning",
)

LORA: dict[str, Any] = {"r": 4, "alpha": 8}
SOURCE, TARGET = [5, 9, 12, 3], [20, 22, 1]

BATCH: TaskBatch = {
    "label": {
        "input_ids": torch.tensor([SOURCE]),
        "attention_mask": torch.ones(1, len(SOURCE), dtype=torch.long),
        "labels": torch.tensor([TARGET]),
    }
}


def folder_of(kind: str, folder: Path) -> Path:
    """A student's folder with weights."""
    if kind == "t5":
        return add_weights(make_student_folder(folder))
    make_causal_folder(folder, kind)
    torch.manual_seed(11)
    load(folder, from_scratch=True).save(folder)
    return folder


def plain_model(kind: str, folder: Path) -> Any:
    return (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_pretrained(folder)


def plain_loss(kind: str, model: Any) -> Tensor:
    if kind == "t5":
        found: Tensor = model(input_ids=torch.tensor([SOURCE]), labels=torch.tensor([TARGET])).loss
        return found
    labels = [IGNORE_INDEX] * len(SOURCE) + TARGET
    causal: Tensor = model(input_ids=torch.tensor([SOURCE + TARGET]), labels=torch.tensor([labels])).loss
    return causal


def shake(model: torch.nn.Module) -> None:
    """Move an adapter, which begins as nothing, as training does; the same in every model of the same adapter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def loss(student: Student) -> float:
    with torch.no_grad():
        return float(student(BATCH).loss("label"))


def checkpoint(student: Student, path: Path) -> Path:
    weights = {f"student.{name}": value for name, value in student.state_dict().items()}
    torch.save({"state_dict": weights, CHECKPOINT_KEY: student.record()}, path)
    return path


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_an_adapter_trains_as_pefts_own(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    student = load(folder, adapter=LORA)
    # it begins as nothing
    assert loss(student) == pytest.approx(loss(load(folder)))
    plain = get_peft_model(
        plain_model(kind, folder),
        LoraConfig(
            task_type="SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM",
            r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=kind == "gpt2",
        ),
    )  # fmt: skip
    shake(student)
    shake(plain)
    step = student(BATCH).loss("label")
    expected = plain_loss(kind, plain)
    torch.testing.assert_close(step, expected)
    step.backward()
    expected.backward()
    found = {name.removeprefix("model."): p.grad for name, p in student.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in found.items():
        # float32 sums in another order: by each library up to 1e-4 from the same in float64
        assert float((gradient - wanted[name]).norm()) <= 3e-4 * float(wanted[name].norm()) + 1e-7, name


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_saved_merged_or_alone(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / "base")
    student = load(folder, adapter=LORA)
    shake(student)
    before = loss(student)
    student.save(tmp_path / "merged")
    assert loss(student) == before
    assert plain_loss(kind, plain_model(kind, tmp_path / "merged")).item() == pytest.approx(before, rel=1e-5)
    assert loss(load(tmp_path / "merged")) == pytest.approx(before, rel=1e-5)
    student = load(folder, adapter=LORA | {"export": "adapter"})
    shake(student)
    student.save(tmp_path / "alone")
    assert not (tmp_path / "alone/model.safetensors").exists()
    found = PeftModel.from_pretrained(plain_model(kind, folder), tmp_path / "alone")
    assert plain_loss(kind, found).item() == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_checkpoints(kind: str, tmp_path: Path) -> None:
    student = load(folder_of(kind, tmp_path / "base"), adapter=LORA)
    shake(student)
    path = checkpoint(student, tmp_path / "a.ckpt")
    before = loss(student)
    again = load(path, adapter=LORA)
    # bit by bit, and only the adapter learns
    assert loss(again) == before
    learn = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert learn
    assert all("lora_" in name for name in learn)
    assert again.record()["adapter"] == student.record()["adapter"]
    whole = load(path)
    assert loss(whole) == pytest.approx(before, rel=1e-5)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    assert "adapter" not in whole.record()
    other = load(path, adapter={"r": 2})
    assert loss(other) == pytest.approx(before, rel=1e-5)
    assert {p.shape[0] for name, p in other.named_parameters() if "lora_A" in name} == {2}


def test_another_kind_and_more_arguments(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    dora = load(folder, adapter=LORA | {"init_args": {"use_dora": True}})
    assert any("magnitude" in name for name, _ in dora.named_parameters())
    named = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ia3 = load(folder, adapter={"class_path": "peft.IA3Config", "init_args": named})
    assert {p.requires_grad for name, p in ia3.named_parameters() if "ia3_" in name} == {True}
    shake(ia3)
    assert loss(load(checkpoint(ia3, tmp_path / "a.ckpt"))) == pytest.approx(loss(ia3), rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_precision(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    student = load(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert loss(student) == pytest.approx(loss(load(folder)), rel=0.02)
    adapted = load(folder, dtype="bfloat16", adapter=LORA)
    types = {("lora_" in name, parameter.dtype) for name, parameter in adapted.named_parameters()}
    # what learns is in float32
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    assert torch.isfinite(adapted(BATCH).loss("label"))
    again = load(checkpoint(adapted, tmp_path / "a.ckpt"), dtype="bfloat16", adapter=LORA)
    assert loss(again) == loss(adapted)
    assert load(folder, from_scratch=True, dtype="bfloat16").network.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"target_modules": ["q_proj", "query"]}, "the student has no layers named query; it has down_proj, embed_tok"),
        ({"target_modules": "query"}, "Target modules query not found"),
        ({"rank": 3}, "unexpected rank; allowed are r, alpha, dropout, target_modules, class_path"),
        ({"r": 0}, "`r` should be a positive integer value"),
        ({"export": "whole"}, "export must be one of merged, adapter, got 'whole'"),
        ({"class_path": "peft.LoRA"}, "cannot import 'peft.LoRA'"),
        ({"class_path": "LoraConfig"}, "cannot import 'LoraConfig'"),
        ({"class_path": "pathlib.Path"}, "makes no adapter in a model's layers"),
        ({"init_args": {"nonsense": 3}}, "unexpected keyword argument 'nonsense'"),
        (
            {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 3}},
            "makes no adapter in a model's layers",
        ),
    ],
    ids=str,
)
def test_what_is_refused_before_weights_are_read(adapter: dict[str, Any], said: str, tmp_path: Path) -> None:
    # there are none: whoever looked for them would say so
    make_causal_folder(tmp_path)
    with pytest.raises(UserError) as error:
        load(tmp_path, adapter=adapter)
    assert str(error.value).startswith("adapter: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_embedding_that_t5_reads_under_other_names_is_refused(tmp_path: Path) -> None:
    make_student_folder(tmp_path)
    with pytest.raises(UserError, match="the student has no layers named shared; it has "):
        load(tmp_path, adapter={"target_modules": ["shared", "q"]})
