"""What an objective does before an optimizer step is counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import Objective, Step
from tests.modules.batches import RowsData, pad, random_rows
from tests.modules.running import Steps, difference, identical, make_trainer, plain_gradients, plain_terms
from tests.modules.test_resume import Shuffled
from tests.variants.fixed_text import FixedText, with_fixed_text

# the last of three windows has two micro-batches of three, the last of which has one row
ROWS = random_rows(15, seed=1, without_rationale=(0, 1, 5))
TASKS = ("label", "rationale")


def make(folder: Path, objective: Objective, **arguments: Any) -> Any:
    torch.manual_seed(7)
    return StepByStepModule(folder, from_scratch=True, learning_rate=1e-2, objectives=[objective], **arguments)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_prepared_targets_are_counted(student_folder: Path, accumulate: int) -> None:
    steps = Steps()
    module = make(student_folder, FixedText(weight=0.5, tasks=["rationale"]))
    data = RowsData(ROWS, 2, TASKS)
    make_trainer(accumulate_grad_batches=accumulate, max_epochs=2, callbacks=[steps]).fit(module, datamodule=data)
    rows, size = with_fixed_text(ROWS), 2 * accumulate
    windows = [rows[start : start + size] for start in range(0, len(rows), size)] * 2
    for found, logged, student, own in zip(steps.gradients, steps.logged, steps.students, windows, strict=True):
        assert difference(found, plain_gradients(student, own, {"label": 1.0, "rationale": 1.5})) < 1e-5
        if any("rationale" in row for row in own):
            expected = float(plain_terms(student, own, ["rationale"])["rationale"].detach())
            assert logged["train/fixedtext_loss"] == pytest.approx(expected, rel=1e-5)
            assert logged["train/rationale_loss"] == pytest.approx(expected, rel=1e-5)


class Draws(Objective):
    """Notes what it draws, and in which state the module is."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drawn: list[float] = []

    def prepare(self, window: Sequence[Step]) -> None:
        self.drawn.append(float(torch.rand(())))
        assert not torch.is_grad_enabled()
        assert not self.training
        assert all(not step._student.training for step in window)

    def counts(self, batch: Any) -> None:
        return None

    def forward(self, step: Step) -> Tensor:
        assert not step.student.states("label").requires_grad or step._student.training
        return step.student.loss("label") * 0


def run(folder: Path, steps: int, resume: Path | None = None, seed: int = 7) -> tuple[Any, list[float]]:
    objective = Draws()
    # the part of a run that is stopped does not know how long the whole is
    module = make(folder, objective, dropout=0.1, lr_schedule="constant")
    torch.manual_seed(seed)
    trainer = make_trainer(max_steps=steps, max_epochs=-1, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=Shuffled(ROWS, 2, TASKS), ckpt_path=resume, weights_only=True if resume else None)
    return trainer, objective.drawn


def test_random_numbers_are_a_function_of_the_step(student_folder: Path, tmp_path: Path) -> None:
    whole, drawn = run(student_folder, 6)
    assert len(set(drawn)) == len(drawn) == 6
    stopped, first = run(student_folder, 3)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, rest = run(student_folder, 6, tmp_path / "stopped.ckpt", seed=99)
    assert first + rest == drawn
    assert identical(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict())


def test_preparing_leaves_dropout_as_it_is(student_folder: Path) -> None:
    found = []
    for objective in (Draws(), None):
        torch.manual_seed(7)
        module = StepByStepModule(
            student_folder, from_scratch=True, learning_rate=1e-2, dropout=0.3, objectives=objective and [objective]
        )
        torch.manual_seed(7)
        make_trainer(max_steps=4).fit(module, datamodule=RowsData(ROWS, 2, TASKS))
        found.append(module.student.state_dict())
    assert identical(*found)


class OnPolicy(FixedText):
    """What the student itself writes, in place of the rationales."""

    def prepare(self, window: Sequence[Step]) -> None:
        for step in window:
            written = step.student.generate("rationale", max_new_tokens=4)
            step.batch["rationale"]["labels"] = pad([[*ids, 1] for ids in written], IGNORE_INDEX)


def test_the_students_own_samples_are_trained_on(student_folder: Path) -> None:
    seen: list[int] = []

    class Seen(StepByStepModule):
        def loss_terms(self, step: Step) -> dict[str, Tensor]:
            seen.append(step.batch["rationale"]["labels"].shape[1])
            return super().loss_terms(step)

    torch.manual_seed(7)
    module = Seen(student_folder, from_scratch=True, objectives=[OnPolicy(tasks=["rationale"])])
    make_trainer(max_steps=4).fit(module, datamodule=RowsData(random_rows(8, without_rationale=()), 2, TASKS))
    assert len(seen) == 4
    assert max(seen) <= 5
