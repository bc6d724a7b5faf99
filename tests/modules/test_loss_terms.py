"""Loss terms against the formula written plainly, with two separate Hugging Face forward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.batch import TaskBatch, TaskInputs
from lit_distill.errors import UserError
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule
from tests.modules.batches import collate, random_rows
from tests.modules.running import difference, gradients_of, plain_gradients

ROWS = random_rows(5, seed=21, without_rationale=(2,))


def make(folder: Path, kind: type[DistillModule] = StepByStepModule, **arguments: Any) -> Any:
    torch.manual_seed(7)
    return kind(folder, from_scratch=True, **arguments)


def by_log_softmax(student: torch.nn.Module, inputs: TaskInputs) -> float:
    """The mean of minus the log-probability of each target token, the decoder fed by hand."""
    values = []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        target = [label for label in labels.tolist() if label != -100]
        source = ids[mask.bool()][None]
        logits = student(input_ids=source, decoder_input_ids=torch.tensor([[0, *target[:-1]]])).logits[0]
        values += [-float(torch.log_softmax(row, 0)[label]) for row, label in zip(logits, target, strict=True)]
    return sum(values) / len(values)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
def test_step_by_step_is_the_formula(student_folder: Path, weight: float) -> None:
    module = make(student_folder, rationale_weight=weight)
    batch = collate(ROWS, module.tasks)
    terms = module.loss_terms(module.step(batch))
    assert list(terms) == ["label", "rationale"]
    with torch.no_grad():
        expected = {task: float(module.student.model(**batch[task]).loss) for task in module.tasks}
        for task, term in terms.items():
            assert float(term.detach()) == pytest.approx(expected[task], rel=1e-6)
            assert float(term.detach()) == pytest.approx(by_log_softmax(module.student.model, batch[task]), rel=1e-5)
    total = module.total_loss(terms)
    assert float(total.detach()) == pytest.approx(expected["label"] + weight * expected["rationale"], rel=1e-6)
    total.backward()
    found = gradients_of(module.student.model)
    assert difference(found, plain_gradients(module.student.model, ROWS, {"label": 1.0, "rationale": weight})) < 1e-5


def test_weight_0_is_standard_training_with_the_same_prefix(student_folder: Path) -> None:
    ours = make(student_folder, rationale_weight=0.0)
    standard = make(student_folder, StandardModule, label_prefix="predict: ")
    assert standard.tasks["label"] == ours.tasks["label"]
    losses, gradients = [], []
    for module in (ours, standard):
        loss = module.total_loss(module.loss_terms(module.step(collate(ROWS, module.tasks))))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(gradients_of(module.student.model))
    assert losses[0] == losses[1]
    assert difference(*gradients) < 1e-6


def nothing_to_learn(kind: str) -> TaskBatch:
    batch = collate(ROWS, ("label", "rationale"))
    if kind == "ignored targets":
        batch["rationale"]["labels"].fill_(-100)
    else:
        batch["rationale"] = {
            "input_ids": torch.zeros(0, 1, dtype=torch.long),
            "attention_mask": torch.zeros(0, 1, dtype=torch.long),
            "labels": torch.zeros(0, 1, dtype=torch.long),
        }
    return batch


@pytest.mark.parametrize("kind", ["ignored targets", "no rows"])
def test_nothing_to_learn_is_0(student_folder: Path, kind: str) -> None:
    module = make(student_folder)
    batch = nothing_to_learn(kind)
    terms = module.loss_terms(module.step(batch))
    assert terms["rationale"].item() == 0.0
    terms["rationale"].backward()
    assert all(torch.equal(found, torch.zeros_like(found)) for found in gradients_of(module.student.model).values())
    assert module.term_counts(batch)["rationale"] == 0
    module.zero_grad()
    module.total_loss(module.loss_terms(module.step(batch))).backward()
    assert (
        difference(gradients_of(module.student.model), plain_gradients(module.student.model, ROWS, {"label": 1.0}))
        < 1e-5
    )


def test_counts_are_the_target_tokens(student_folder: Path) -> None:
    module = make(student_folder)
    expected = {task: sum(len(row[task][1]) for row in ROWS if task in row) for task in module.tasks}
    assert module.term_counts(collate(ROWS, module.tasks, extra=3)) == expected


@pytest.mark.parametrize("kind", [StandardModule, SingleTaskModule])
def test_one_term_is_the_loss(student_folder: Path, kind: type[DistillModule]) -> None:
    module = make(student_folder, kind)
    (task,) = module.tasks
    batch = collate([{task: row["label"]} for row in ROWS], (task,))
    terms = module.loss_terms(module.step(batch))
    expected = float(module.student.model(**batch[task]).loss.detach())
    assert float(module.total_loss(terms).detach()) == pytest.approx(expected, rel=1e-6)


def test_terms_that_a_subclass_adds_count_once(student_folder: Path) -> None:
    module = make(student_folder, rationale_weight=2.0)
    terms = {"label": 1.0, "rationale": 10.0, "consistency": 100.0, "other": 1000.0}
    assert float(module.total_loss({name: torch.tensor(value) for name, value in terms.items()})) == 1121


def test_bfloat16_logits(student_folder: Path) -> None:
    module = make(student_folder)
    batch = collate(ROWS, module.tasks)
    whole = module.loss_terms(module.step(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = module.step(batch)
        terms, logits = module.loss_terms(step), step.student.logits("label")
    assert logits.dtype == torch.bfloat16
    for task, term in terms.items():
        assert term.dtype == torch.float32
        assert float(term.detach()) == pytest.approx(float(whole[task].detach()), rel=2e-2)


@pytest.mark.parametrize("value", [-0.1, float("nan"), "much"])
def test_weight_out_of_range(student_folder: Path, value: Any) -> None:
    with pytest.raises(UserError, match=r"^rationale_weight must be at least 0, got "):
        make(student_folder, rationale_weight=value)
