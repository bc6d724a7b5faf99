"""The methods of several rationales, teachers and answers that are tasks: their losses against a plain reading."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lit_distill.data import RationaleDataModule
from lit_distill.modules import StepByStepModule
from lit_distill.tasks import Row, TeacherOutput
from tests.runs import CONFIGS

ROWS = [
    Row(
        "0",
        "cat is red ?",
        "yes",
        outputs=(
            TeacherOutput("the cat is red because a", "yes", "released"),
            TeacherOutput("red is the cat", "no", "released"),
            TeacherOutput("because red", "yes", "TEACHER"),
            TeacherOutput("a = 1 + 2", None, "released", "program"),
            TeacherOutput("the cat is blue", "no", "released", "counterfactual"),
        ),
    ),
    Row(
        "1",
        "dog is blue ?",
        "no",
        outputs=(
            TeacherOutput("the dog is red . so no", "no", "released"),
            TeacherOutput("b = 3", None, "released", "program"),
            TeacherOutput(
                "the dog is blue",
                "wrong",
                "released",
                "self_evaluation",
                {"given_rationale": "the dog is red", "given_label": "no"},
            ),
        ),
    ),
    # without any output it keeps its label
    Row("2", "dog is red ?", "yes"),
]

Texts = list[tuple[str, str]]
"""Sources and targets of a task, written by hand."""

LABELS: Texts = [(f"predict: {row.input}", str(row.label)) for row in ROWS]
ALL: Texts = [
    ("explain: cat is red ?", "the cat is red because a"),
    ("explain: cat is red ?", "red is the cat"),
    ("explain: cat is red ?", "because red"),
    ("explain: dog is blue ?", "the dog is red . so no"),
]
FIRST: Texts = [ALL[0], ALL[3]]

EXPECTED: dict[str, dict[str, tuple[float, Texts]]] = {
    # Mind's Mirror: all samples of a row
    "several_rationales": {"label": (1.0, LABELS), "rationale": (1.0, ALL)},
    # TinyLLM: label + sum over teachers of w_m rationale_m
    "several_teachers": {
        "label": (1.0, LABELS),
        "rationale": (1.0, FIRST),
        "second": (1.0, [("explain again: cat is red ?", "because red")]),
    },
    # Mixed Distillation: programs beside rationales
    "mixed": {
        "label": (1.0, LABELS),
        "rationale": (1.0, FIRST),
        "program": (1.0, [("program: cat is red ?", "a = 1 + 2"), ("program: dog is blue ?", "b = 3")]),
    },
    # CasCoD: (1 - a) L(r | x) + a L(y | x, r)
    "cascade": {
        "label": (
            0.5,
            [
                ("predict: cat is red ? the cat is red because a", "yes"),
                ("predict: dog is blue ? the dog is red . so no", "no"),
            ],
        ),
        "rationale": (0.5, FIRST),
    },
    # SCOTT: the wrong answer, given what argues for it
    "counterfactual": {
        "label": (1.0, LABELS),
        "rationale": (1.0, FIRST),
        "counterfactual": (1.0, [("counterfactual: cat is red ? the cat is blue", "no")]),
    },
    # Mind's Mirror: what is right or wrong with an answer, given that
    "self_evaluation": {
        "label": (1.0, LABELS),
        "rationale": (1.0, FIRST),
        "self_evaluation": (
            1.0,
            [("evaluate: dog is blue ? the dog is red no", "the dog is blue So the solution is wrong.")],
        ),
    },
    # LMCor: the label, given all that the teacher said
    "correct": {
        "label": (
            1.0,
            [
                (
                    "predict: cat is red ? (1) the cat is red because a So the answer is yes"
                    " (2) red is the cat So the answer is no (3) because red So the answer is yes",
                    "yes",
                ),
                ("predict: dog is blue ? (1) the dog is red . so no So the answer is no", "no"),
            ],
        ),
        "rationale": (1.0, FIRST),
    },
}


def overlay(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())["model"]["init_args"]
    return found


def expected_loss(network: Any, tokenizer: Any, weighted: dict[str, tuple[float, Texts]]) -> Tensor:
    """The weighted sum of the tasks' mean cross-entropies, one row and one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, texts in weighted.values():
        losses = []
        for source, target in texts:
            ids, labels = (torch.tensor([tokenizer(text).input_ids]) for text in (source, target))
            (logits,) = network(input_ids=ids, labels=labels).logits
            losses += [F.cross_entropy(own, label) for own, label in zip(logits, labels[0], strict=True)]
        if losses:
            total = total + weight * torch.stack(losses).sum() / len(losses)
    return total


class Outputs(RationaleDataModule):
    """The rows above."""

    name = "outputs"

    def load_rows(self, split: str) -> list[Row] | None:
        return ROWS if split in ("train", "val") else None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", EXPECTED)
def test_the_loss_is_the_papers(name: str, weights_folder: Path) -> None:
    settings = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())["model"]["init_args"]
    module = StepByStepModule(str(weights_folder), tasks=settings["tasks"]).double().eval()
    data = Outputs(tokenizer=module.student.tokens, tasks=module.tasks)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    found = module.total_loss(module.loss_terms(module.step(batch)))
    network = copy.deepcopy(module.student.network)
    expected = expected_loss(network, module.tokenizer, EXPECTED[name])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found.backward()
    expected.backward()
    for own, other in zip(module.student.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-7)
