"""The symmetric KL of answers under two rationales, against loops over pairs, tokens and ids in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_distill.batch import PADDING_ROW, TaskBatch
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import AnswerConsistency
from tests.modules.batches import Row, collate
from tests.modules.running import check_same
from tests.runs import CONFIGS, metric_rows, refusal, run, run_folders, small_model, small_trainer, toy_data

# three rationales of row 4, one of row 0, two of row 9, two of row 2 with other labels, two that pad, two of row 7
INDEX = [4, 4, 4, 0, 9, 9, 2, 2, PADDING_ROW, PADDING_ROW, 7, 7]
TARGETS = [[6, 7, 1]] * 3 + [[6, 1]] + [[8, 1]] * 2 + [[8, 1], [9, 1]] + [[5, 1]] * 2 + [[5, 6, 7, 1]] * 2
PAIRS = [(0, 1), (1, 2), (4, 5), (10, 11)]
TOKENS = 3 + 3 + 2 + 4


def batch_of(rows: list[int], extra: int = 0) -> TaskBatch:
    sources = [[3, 5 + row % 3, *range(6, 8 + row % 5), 1] for row in range(len(INDEX))]
    made: list[Row] = [{"label": (sources[row], TARGETS[row]), "rationale": ([4, 6, 1], [7, 8, 1])} for row in rows]
    batch = collate(made, ("label", "rationale"), extra)
    batch["label"]["index"] = batch["rationale"]["index"] = torch.tensor([INDEX[row] for row in rows])
    return batch


WHOLE = list(range(len(INDEX)))


def make(student: Path, **arguments: Any) -> Any:
    torch.manual_seed(7)
    own = AnswerConsistency(**{"tasks": ["label"]} | arguments)
    # the fast path is for `check`
    return StepByStepModule(student, from_scratch=True, fast=False, objectives=[own]).double().eval()


def by_hand(module: Any) -> Tensor:
    """The sum over the tokens of all pairs."""
    student, total = module.step(batch_of(WHOLE)).student, torch.zeros((), dtype=torch.float64)
    logits, rows = student.logits("label"), student.rows("label")
    for first, second in PAIRS:
        for left, right in zip(logits[rows == first], logits[rows == second], strict=True):
            p, q = (one.exp() / one.exp().sum() for one in (left, right))
            total = total + 0.5 * (p * (p / q).log()).sum() + 0.5 * (q * (q / p).log()).sum()
    return total


@pytest.mark.parametrize("extra", [0, 3])
def test_value_and_gradient(either_family: Path, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = make(either_family), batch_of(WHOLE, extra)
    # of five tokens
    vocabulary = module.student.network.config.vocab_size
    monkeypatch.setattr("lit_distill.objectives.chunks.CHUNK_BYTES", 4 * 5 * vocabulary)
    assert module.term_counts(batch)["answer_consistency"] == TOKENS
    found, expected = module.loss_terms(module.step(batch))["answer_consistency"], by_hand(module) / TOKENS
    check_same(module, found, expected)


def test_the_same_rationale_twice_is_0(either_family: Path) -> None:
    module, batch = make(either_family), batch_of([0, 0, 4, 4])
    found = module.objectives[0](module.step(batch))
    assert module.term_counts(batch)["answer_consistency"] == 5
    assert float(found.detach()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows", [[], [0], [0, 4, 1], [6, 7], [8, 9]])
def test_without_a_pair_it_is_0(either_family: Path, rows: list[int]) -> None:
    module = make(either_family)
    whole: Any = batch_of(rows or [0])
    batch: Any = {task: {name: tensor[: len(rows)] for name, tensor in own.items()} for task, own in whole.items()}
    assert module.term_counts(batch)["answer_consistency"] == 0
    found = module.objectives[0](module.step(batch))
    assert float(found.detach()) == 0
    found.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.student.parameters())


def test_data_without_a_second_rationale_is_refused(
    student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = f"--config={CONFIGS / 'method' / 'answer_consistency.yaml'}"
    small = [*small_model(student_folder), overlay, *toy_data(), *small_trainer(1), "--test_after_fit=false"]
    line = refusal(capsys, "fit", *small)
    assert line.startswith(
        "objectives: answer_consistency: no row of train has two rationales for label; ask for several"
    )
    # there are, but one is drawn
    assert refusal(capsys, "fit", *small, "--data.variety=true", "--model.tasks.label.draws=1") == line
    run("fit", *small, "--data.variety=true")
    [folder] = run_folders()
    assert "train/answer_consistency_loss" in metric_rows(folder)[0]


def test_several_tasks_count_together(either_family: Path) -> None:
    module, batch = make(either_family, tasks=["label", "rationale"]), batch_of(WHOLE)
    # all rationale targets are the same, three tokens each
    assert module.term_counts(batch)["answer_consistency"] == TOKENS + 3 * 5
    found = module.objectives[0](module.step(batch))
    assert float(found.detach()) == pytest.approx(float(by_hand(module).detach()) / (TOKENS + 15), rel=1e-9)
