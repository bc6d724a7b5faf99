"""Losses that are wrong fail, each for its own reason; those that are right pass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_distill.batch import TaskBatch, sum_rows
from lit_distill.checking import Checker, Finding, Precision, pick_rows
from lit_distill.errors import UserError
from lit_distill.modules import DistillModule, StepByStepModule
from lit_distill.objectives import ForwardKL, Objective, Step, divergence
from lit_distill.students import Student
from lit_distill.teachers.models import TeacherModel, Teachers
from tests.modules.batches import RowsData, collate, random_rows
from tests.students import make_causal_folder
from tests.variants.hidden import HiddenMatch
from tests.variants.kl import KL
from tests.variants.smoothed import SmoothedModule

ROWS = random_rows(8, seed=5, without_rationale=(3, 6))


def findings(
    folder: Path,
    *objectives: Objective,
    kind: type[DistillModule] = StepByStepModule,
    teacher: Path | None = None,
    precision: Precision = "float64",
    **arguments: Any,
) -> list[Finding]:
    torch.manual_seed(7)
    teachers = {"big": TeacherModel(str(teacher))} if teacher else None
    settings: dict[str, Any] = {"from_scratch": True, "objectives": list(objectives), "teachers": teachers} | arguments
    module = kind(folder, **settings)
    batch = collate(ROWS, module.tasks)
    return list(Checker(module, RowsData(ROWS, 8, module.tasks), batch, precision).run())


def failed(found: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.found for finding in found if finding.passed is False}


MICRO_BATCHES = {
    "micro-batches of 4 and 4 rows", "micro-batches of 5 and 3 rows", "the same, as a short last step of 4",
}  # fmt: skip


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_right_losses_pass(student_folder: Path, teacher_folder: Path, precision: Precision) -> None:
    wide = HiddenMatch(teacher="big", student_width=16, teacher_width=24)
    objectives = ForwardKL(teacher="big"), wide
    found = findings(student_folder, *objectives, teacher=teacher_folder, precision=precision, dropout=0.3)
    assert not failed(found)
    assert {finding.check for finding in found} == MICRO_BATCHES | {
        "more padding", "smaller chunks of logits", "rows in another order", "teacher", "student = teacher",
        "no targets", "a logit of -inf", "weight of label alone", "weight of rationale alone", "weight of kl alone",
        "weight of hiddenmatch alone",
    }  # fmt: skip
    if precision == "float64":
        # far from the tolerance
        assert max(finding.difference or 0 for finding in found) < 1e-13


def test_the_fast_path_is_checked_in_float64(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_distill.students.fast import functions

    seen = []
    original = functions._TokenLosses.forward

    def forward(ctx: Any, states: Tensor, *rest: Any) -> Tensor:
        losses = original(ctx, states, *rest)
        seen.append((states.dtype, losses.dtype))
        return losses

    monkeypatch.setattr(functions._TokenLosses, "forward", staticmethod(forward))
    assert not failed(findings(student_folder))
    assert set(seen) == {(torch.float64, torch.float64)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_only_student_with_an_adapter(tmp_path: Path, kind: str) -> None:
    folder = make_causal_folder(tmp_path / kind, kind)
    assert not failed(findings(folder, adapter={"r": 2, "dropout": 0.1}))


class Wrong(Objective):
    """The tasks' cross-entropy, one way or another."""

    def losses(self, step: Step) -> Tensor:
        return torch.cat([step.student.token_losses(task) for task in self.about(step.batch)])


class MeanOverRows(Wrong):
    def forward(self, step: Step) -> Tensor:
        number = max(sum(len(step.batch[task]["labels"]) for task in self.about(step.batch)), 1)
        return self.losses(step).sum() / number


class DividedTwice(Wrong):
    def forward(self, step: Step) -> Tensor:
        losses = self.losses(step)
        return losses.sum() / max(len(losses), 1) ** 2


class CountsPadding(Wrong):
    def forward(self, step: Step) -> Tensor:
        return self.losses(step).sum() / sum(step.batch[task]["labels"].numel() for task in self.about(step.batch))


class OrderMatters(Wrong):
    def forward(self, step: Step) -> Tensor:
        losses = self.losses(step)
        return (losses * torch.linspace(0, 1, len(losses), dtype=losses.dtype)).sum() / max(len(losses), 1)


class Detached(Wrong):
    def forward(self, step: Step) -> Tensor:
        losses = self.losses(step)
        return losses.sum().detach() / max(len(losses), 1)


class Idle(Wrong):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.unused = nn.Linear(2, 2)

    def forward(self, step: Step) -> Tensor:
        losses = self.losses(step)
        return losses.sum() / max(len(losses), 1) + 0 * self.unused.weight.sum() + 0 * self.unused.bias.sum()


class IntoTeacher(Objective):
    model: Student

    def setup(self, student: Student, teachers: Teachers) -> None:
        # no submodule, or it would be trained
        self.__dict__["model"] = teachers.loaded("big")[0]

    def forward(self, step: Step) -> Tensor:
        theirs = self.model(step.batch)
        distances = [
            (step.student.logits(task) - theirs.logits(task)[:, :64]).square().mean(-1)
            for task in self.about(step.batch)
        ]
        losses = torch.cat(distances)
        return losses.sum() / max(len(losses), 1)


class TrainsTeacher(IntoTeacher):
    def setup(self, student: Student, teachers: Teachers) -> None:
        self.model = teachers.loaded("big")[0].train()


class NeverZero(Objective):
    """The cross-entropy of two distributions, which is their entropy where they are equal."""

    zero_at_teacher = True

    def forward(self, step: Step) -> Tensor:
        def cross(student: Tensor, teacher: Tensor) -> Tensor:
            return -(teacher.softmax(-1) * student.log_softmax(-1).clamp(min=-100)).sum(-1)

        return divergence(cross, step.student, step.teacher("big"), self.about(step.batch))


class WithoutWeights(StepByStepModule):
    def total_loss(self, terms: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (MeanOverRows(), dict.fromkeys(MICRO_BATCHES, "meanoverrows, gradient changed")),
        (DividedTwice(), dict.fromkeys(MICRO_BATCHES, "dividedtwice, gradient changed")),
        (OrderMatters(), {"rows in another order": "ordermatters, gradient changed"}),
        (Detached(), {"weight of detached alone": "detached does not move the student"}),
        (Idle(), {"weight of idle alone": "no gradient in objectives.0.unused.weight, objectives.0.unused.bias"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_loss(student_folder: Path, objective: Objective, expected: Mapping[str, str]) -> None:
    found = failed(findings(student_folder, objective))
    assert {check: told for check, told in found.items() if check in expected} == expected
    if not isinstance(objective, OrderMatters):
        # what depends on the order depends on the split, too
        assert found.keys() == expected.keys()


def test_padding_that_is_counted(student_folder: Path) -> None:
    found = failed(findings(student_folder, CountsPadding()))
    assert found["more padding"] == "countspadding, gradient changed"
    assert found.keys() <= MICRO_BATCHES | {"more padding"}


def test_a_gradient_into_the_teacher(student_folder: Path, teacher_folder: Path) -> None:
    found = failed(findings(student_folder, IntoTeacher(), teacher=teacher_folder))
    assert found["teacher"] == "a gradient flows into the teacher"
    found = failed(findings(student_folder, TrainsTeacher(), teacher=teacher_folder))
    assert "the optimizer has the teacher's weights" in found["teacher"]
    assert "training mode" in found["teacher"]


def test_a_term_that_is_not_zero_where_it_says_so(student_folder: Path, teacher_folder: Path) -> None:
    found = failed(findings(student_folder, NeverZero(), teacher=teacher_folder))
    assert found.keys() == {"student = teacher"}
    assert found["student = teacher"].startswith("neverzero is ")


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_teacher_that_is_the_student_has_no_gradient_to_check(weights_folder: Path, precision: Precision) -> None:
    found = findings(weights_folder, ForwardKL(), teacher=weights_folder, precision=precision, from_scratch=False)
    assert not failed(found)
    assert Finding("weight of kl alone", None, "no gradient: the student is its teacher") in found


def test_a_loss_that_is_nan_at_minus_infinity(student_folder: Path, teacher_folder: Path) -> None:
    found = failed(findings(student_folder, KL(teacher="big"), teacher=teacher_folder))
    assert found == {"a logit of -inf": "kl is nan"}


class NaNWithoutTargets(Wrong):
    def forward(self, step: Step) -> Tensor:
        return self.losses(step).mean()


def test_a_loss_that_is_nan_without_targets(student_folder: Path) -> None:
    assert failed(findings(student_folder, NaNWithoutTargets())) == {"no targets": "nanwithouttargets is nan"}


def test_a_weight_that_does_nothing(student_folder: Path) -> None:
    found = failed(findings(student_folder, kind=WithoutWeights, rationale_weight=0.5))
    assert found == {f"weight of {task} alone": "the weight does nothing" for task in ("label", "rationale")}


def test_a_subclass_is_checked_by_its_own_terms(student_folder: Path) -> None:
    found = findings(student_folder, kind=SmoothedModule)
    assert not failed(found)
    told = {finding.check: finding.found for finding in found if finding.passed is None}
    # it does not say what it is a mean over
    assert told == dict.fromkeys(MICRO_BATCHES, "entropy: plain mean over micro-batches")


class InBatch(Wrong):
    of_whole_batch = True

    def forward(self, step: Step) -> Tensor:
        losses, rows = step.student.token_losses("label"), step.student.rows("label")
        return sum_rows(losses, rows, len(step.batch["label"]["labels"])).logsumexp(0)

    def counts(self, batch: TaskBatch) -> int:
        return len(batch["label"]["labels"])


def test_what_depends_on_the_whole_batch_is_told(student_folder: Path) -> None:
    found = findings(student_folder, InBatch())
    assert not failed(found)
    told = {finding.check: finding.found for finding in found if finding.passed is None}
    assert told == dict.fromkeys(MICRO_BATCHES, "inbatch: depends on its micro-batch")


class NoTerms(StepByStepModule):
    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        return {}


def test_a_module_without_terms_is_refused(student_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^NoTerms: loss_terms gives no terms, so there is nothing to check$"):
        findings(student_folder, kind=NoTerms)


def test_rows_are_short_and_of_different_lengths() -> None:
    rows = random_rows(64, seed=1)
    batch = pick_rows(RowsData(rows, 16, ("label",)).train_dataloader(), 8)
    lengths = (batch["label"]["labels"] != -100).sum(dim=1)
    assert len(lengths) == 8
    assert len(set(lengths.tolist())) > 1
    assert batch["label"]["input_ids"].shape[1] == int(batch["label"]["attention_mask"].sum(dim=1).max())
