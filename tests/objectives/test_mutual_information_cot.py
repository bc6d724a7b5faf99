"""The cross-entropy of a row's two predictions, against loops over rows, tokens and ids in float64."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskBatch, take
from lit_distill.errors import UserError
from lit_distill.modules import StandardModule, StepByStepModule
from lit_distill.objectives import MutualInformationCoT
from tests.modules.batches import RowsData, collate, random_rows
from tests.modules.running import check_same, make_trainer
from tests.students import make_causal_folder

ROWS = random_rows(5, seed=3, without_rationale=(2,))
TASKS = ("label", "rationale")


def numbered(rows: Any = ROWS, extra: int = 0) -> TaskBatch:
    """As the data gives it: the rationale task lacks a row, and so has other positions than the label task."""
    batch = collate(rows, TASKS, extra)
    for task in TASKS:
        batch[task]["index"] = torch.tensor([7 + i for i, row in enumerate(rows) if task in row])
    return batch


def make(student: Path, **arguments: Any) -> Any:
    torch.manual_seed(7)
    own = MutualInformationCoT(**arguments)
    # the fast path is for `check`
    return StepByStepModule(student, from_scratch=True, fast=False, objectives=[own]).double().eval()


def largest(logits: Tensor) -> list[Tensor]:
    """Of each id the largest probability over tokens ``(tokens, ids)``."""
    found = []
    for column in zip(*(row.exp() / row.exp().sum() for row in logits), strict=True):
        found.append(max(column, key=Tensor.item))
    return found


def by_hand(module: Any, batch: TaskBatch) -> Tensor:
    """The mean over the rows that have both."""
    step, values = module.step(batch), []
    for index in (7, 8, 10, 11):
        own: dict[str, list[Tensor]] = {}
        for task in TASKS:
            row = batch[task]["index"].tolist().index(index)
            own[task] = largest(step.student.logits(task)[step.student.rows(task) == row])
        p, q = ([one / sum(own[task]) for one in own[task]] for task in TASKS)
        values.append(-torch.stack([a.detach() * b.log() for a, b in zip(p, q, strict=True)]).sum())
    return torch.stack(values).mean()


def check(module: Any, batch: TaskBatch, expected: Tensor) -> None:
    step = module.step(batch)
    module.objectives[0].prepare([step])
    step = module.step(step.batch)
    found = module.loss_terms(step)["mi_cot"]
    assert module.term_counts(step.batch)["mi_cot"] == 4
    check_same(module, found, expected)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("extra", [0, 4])
def test_value_and_gradient(either_family: Path, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(either_family)
    # of ten tokens
    vocabulary = module.student.network.config.vocab_size
    monkeypatch.setattr("lit_distill.objectives.chunks.CHUNK_BYTES", 4 * 10 * vocabulary)
    check(module, numbered(extra=extra), by_hand(module, numbered()))


def as_published(module: Any, batch: TaskBatch) -> Tensor:
    """By Hugging Face's own padded forward over the rows that have both, the positions after a target included."""
    maxima = []
    for task in TASKS:
        rows = [row for row, index in enumerate(batch[task]["index"].tolist()) if index != 9]
        inputs: dict[str, Any] = {k: v for k, v in take(batch[task], rows).items() if k != "index"}
        logits = module.student.model(**inputs).logits
        maxima.append([largest(row) for row in logits])
    values = []
    for p, q in zip(*maxima, strict=True):
        whole = torch.stack([one.exp() for one in q]).sum()
        values.append(-torch.stack([a.detach() * (b.exp() / whole).log() for a, b in zip(p, q, strict=True)]).sum())
    return torch.stack(values).mean()


def test_the_published_term(student_folder: Path) -> None:
    values = set()
    for extra in (0, 3):
        module = make(student_folder, published=True)
        expected = as_published(module, numbered(extra=extra))
        check(module, numbered(extra=extra), expected)
        values.add(round(float(expected.detach()), 9))
    assert len(values) == 2, "it depends on the padding"


def test_the_published_term_of_a_decoder_only_student(tmp_path: Path) -> None:
    module = make(make_causal_folder(tmp_path), published=True)
    step = module.step(numbered())
    module.objectives[0].prepare([step])
    student = module.step(step.batch).student
    term, own = module.objectives[0](module.step(step.batch)), []
    for task in TASKS:
        width = step.batch[task]["labels"].shape[1]
        own.append([largest(row) for row in student.logits(f"mi_cot:{task}").unflatten(0, (-1, width))])
    pairs = [(own[0][a], torch.stack(own[1][b])) for a, b in ((0, 0), (1, 1), (3, 2), (4, 3))]
    expected = torch.stack([-(torch.stack(p) * q.log_softmax(0)).sum() for p, q in pairs]).mean()
    assert float(term.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)


def test_several_rationales_of_a_row_each_count(either_family: Path) -> None:
    module, batch = make(either_family), numbered()
    twice: TaskBatch = {"label": batch["label"], "rationale": take(batch["rationale"], [0, 0, 1, 2, 3])}
    one, two = (
        module.objectives[0](module.step({"label": batch["label"], "rationale": take(batch["rationale"], rows)}))
        for rows in ([0], [1, 2, 3])
    )
    assert module.term_counts(twice)["mi_cot"] == 5
    found = module.objectives[0](module.step(twice))
    assert float(found.detach()) == pytest.approx(float((2 * one + 3 * two).detach()) / 5, rel=1e-10)


def test_nothing_to_compare_is_0(either_family: Path) -> None:
    batch = numbered()
    batch["rationale"]["labels"].fill_(IGNORE_INDEX)
    for module in (make(either_family), make(either_family, published=True)):
        assert module.term_counts(batch)["mi_cot"] == 0
        assert float(module.loss_terms(module.step(batch))["mi_cot"]) == 0
    # in evaluation nothing is prepared
    assert make(either_family, published=True).term_counts(numbered())["mi_cot"] == 0


def test_it_needs_two_tasks(student_folder: Path) -> None:
    torch.set_default_dtype(torch.float32)
    module: Any = StandardModule(student_folder, from_scratch=True, objectives=[MutualInformationCoT()])
    with pytest.raises(UserError) as error:
        make_trainer().fit(module, datamodule=RowsData(ROWS, 2, ("label",)))
    told = "objectives: mi_cot: it needs two tasks, as tasks: [label, rationale]; got ['label']"
    assert str(error.value) == told
    module = StepByStepModule(student_folder, from_scratch=True, objectives=[MutualInformationCoT()])
    module.student.sharded = True
    with pytest.raises(UserError, match=r"^objectives: mi_cot: the head is applied to some rows at a time, which"):
        module.objectives[0].setup(module.student, module.teachers)


def test_equal_predictions_have_their_entropy(student_folder: Path) -> None:
    module = make(student_folder)
    # the same row in both tasks, of one token
    batch = collate([{task: ([3, 5, 1], [6]) for task in TASKS}], TASKS)
    for task in TASKS:
        batch[task]["index"] = torch.tensor([0])
    step = module.step(batch)
    p = step.student.logits("label")[0].softmax(0)
    entropy = -math.fsum((p * p.log()).tolist())
    assert float(module.objectives[0](step).detach()) == pytest.approx(entropy, rel=1e-10)
