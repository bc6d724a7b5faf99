"""LoRA through PEFT: the adapters' own forward runs, and has its gradients."""

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from lit_distill.students.fast.greedy import greedy
from lit_distill.students.fast.support import reason_against
from lit_distill.students.fast.t5 import encode
from tests.students.fast.examples import TASKS, VARIANTS, check_gradients, checkpointed, compare, fast_losses, gradients
from tests.students.fast.examples import make_student as make_plain_student

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.23 by names that are going
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:`gradient_checkpointing:FutureWarning",
)

TARGETS: dict[str, list[str]] = {
    "usual": ["q", "v"],
    "attention": ["q", "k", "v", "o"],
    "gated feed-forward": ["wi_0", "wi_1", "wo"],
    "all": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}


def refused(model: Any) -> str | None:
    return reason_against(getattr(model, "get_base_model", lambda: model)())


def adapted(targets: list[str], kind: str = "v1.1", **settings: Any) -> Any:
    student = make_plain_student(1, **VARIANTS[kind])
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, target_modules=targets, **settings)
    found = get_peft_model(student, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            # these begin with zeros: as after some training
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return found.train()


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lora(targets: list[str]) -> None:
    student = adapted(targets)
    assert refused(student) is None
    compare(student, TASKS)


def test_lora_of_the_original_t5() -> None:
    student = adapted(["q", "v", "wi", "wo"], "original")
    assert refused(student) is None
    compare(student, TASKS)


def test_lora_is_felt() -> None:
    student = adapted(["q", "v"])
    ours = torch.stack(fast_losses(student, TASKS))
    found = gradients(student, fast_losses(student, TASKS))
    assert {name for name, g in found.items() if g is not None} == {
        name for name, _ in student.named_parameters() if "lora_" in name
    }
    with student.disable_adapter():
        assert not torch.allclose(torch.stack(fast_losses(student, TASKS)), ours)


def test_one_base_and_its_adapter() -> None:
    # as a module sees it that holds the model which PEFT has changed in place
    wrapper = adapted(["q", "v"])
    base = wrapper.get_base_model()
    assert refused(base) is None
    assert torch.equal(torch.stack(fast_losses(base, TASKS)), torch.stack(fast_losses(wrapper, TASKS)))


def test_hooks_inside_an_adapter_are_refused() -> None:
    # what they would see are packed rows
    student = adapted(["q"])
    layer = student.get_base_model().encoder.block[0].layer[0].SelfAttention.q.lora_A["default"]
    layer.register_forward_hook(lambda module, given, out: None)
    assert "has hooks" in str(refused(student))


def test_checkpointing() -> None:
    student = adapted(["q", "k", "v", "wo"])
    expected = gradients(student, fast_losses(student, TASKS))
    checkpointed(student.get_base_model())
    check_gradients(gradients(student, fast_losses(student, TASKS)), expected, 1e-6)


def test_lora_dropout() -> None:
    student = adapted(["q", "v"], lora_dropout=0.5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(fast_losses(student, TASKS)[0].detach()))
    assert losses[0] == losses[1] != losses[2]
    student.eval()
    compare(student, TASKS)


def test_merged() -> None:
    student = adapted(["q", "v"])
    before = torch.stack(fast_losses(student, TASKS))
    merged = student.merge_and_unload()
    assert refused(merged) is None
    torch.testing.assert_close(torch.stack(fast_losses(merged, TASKS)), before, rtol=1e-5, atol=0)


def test_bfloat16() -> None:
    student = adapted(TARGETS["all"])
    with torch.autocast("cpu", torch.bfloat16):
        losses = fast_losses(student, TASKS)
    assert float(losses[1].detach()) == pytest.approx(float(fast_losses(student, TASKS)[1].detach()), rel=0.01)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients(student, losses).values())


@torch.no_grad()
def check_greedy(student: Any) -> None:
    found = greedy(student, encode(student, TASKS[:1]), [0, 1, 2, 3], 10)
    plain = student.generate(
        input_ids=TASKS[0]["input_ids"], attention_mask=TASKS[0]["attention_mask"], max_new_tokens=10,
        num_beams=1, do_sample=False,
    )  # fmt: skip
    for ours, theirs in zip(found, plain.tolist(), strict=True):
        assert theirs[1 : len(ours) + 1] == ours


def test_greedy_decoding() -> None:
    check_greedy(adapted(TARGETS["all"]).eval())


def test_ia3_is_felt_or_refused() -> None:
    config = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    student: Any = get_peft_model(make_plain_student(1), config)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "ia3_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    if refused(student) is None:
        compare(student.train(), TASKS)


@pytest.mark.parametrize("settings", [{"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapted_head_is_felt_or_refused(settings: dict[str, Any]) -> None:
    settings = {"target_modules": ["q"]} | settings
    student = adapted(settings.pop("target_modules"), **settings)
    if refused(student) is None:
        compare(student, TASKS)


def test_adapted_embeddings_are_felt_or_refused() -> None:
    student = adapted(["q", "embed_tokens"])
    if refused(student) is None:
        compare(student, TASKS)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer")
@pytest.mark.parametrize("targets", [["q", "v"], ["k", "v"]], ids=str)
def test_greedy_decoding_with_biases(targets: list[str]) -> None:
    student = adapted(targets, lora_bias=True).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_(std=2.0)
    assert refused(student) is None
    check_greedy(student)
