"""The gradient of an optimizer step is that of the loss over all its rows, however they are padded and split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lit_distill.batch import TaskBatch
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule
from lit_distill.modules.window import Counts, Window
from lit_distill.objectives import Step
from tests.modules.batches import Row, RowsData, collate, random_rows
from tests.modules.running import Gradients, Steps, difference, gradients_of, make_trainer, plain_gradients, plain_terms

BATCH = 2
WEIGHT = 0.7


def make_module(folder: Path, kind: type[DistillModule] = StepByStepModule, **arguments: Any) -> Any:
    torch.manual_seed(7)
    return kind(folder, from_scratch=True, learning_rate=1e-2, **arguments)


def train(module: DistillModule, rows: list[Row], accumulate: int, epochs: int = 1, **settings: Any) -> Steps:
    steps = Steps()
    data = RowsData(rows, settings.pop("batch_size", BATCH), module.tasks)
    trainer = make_trainer(max_epochs=epochs, accumulate_grad_batches=accumulate, callbacks=[steps], **settings)
    trainer.fit(module, datamodule=data)
    return steps


def windows(rows: list[Row], accumulate: int, epochs: int = 1) -> list[list[Row]]:
    """The rows of each optimizer step of an unshuffled run."""
    size = BATCH * accumulate
    return [rows[start : start + size] for start in range(0, len(rows), size)] * epochs


def differences(steps: Steps, expected_rows: list[list[Row]], weights: Mapping[str, float]) -> list[float]:
    return [
        difference(found, plain_gradients(student, rows, weights))
        for found, student, rows in zip(steps.gradients, steps.students, expected_rows, strict=True)
    ]


TASKS = ("label", "rationale")
STEP_BY_STEP = {"label": 1.0, "rationale": WEIGHT}
# 15 rows are 7 micro-batches of two and one of one: windows of 2 and of 4 end even, of 3 with one of two, of 5 with
# one of three; rows 0 and 1 are a micro-batch without any rationale
RAGGED = {"number": 15, "seed": 1, "without_rationale": (0, 1, 5)}


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
def test_micro_batches_have_the_gradient_of_the_whole_step(student_folder: Path, accumulate: int) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    steps = train(make_module(student_folder, rationale_weight=WEIGHT), rows, accumulate, epochs=2)
    found = differences(steps, windows(rows, accumulate, epochs=2), STEP_BY_STEP)
    assert max(found) < 1e-5


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_without_the_correction_the_gradient_is_another(
    student_folder: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistillModule, "term_counts", lambda self, batch: {})
    monkeypatch.setattr(DistillModule, "window_weights", lambda self, window: {"": torch.tensor(1.0)})
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    steps = train(make_module(student_folder, rationale_weight=WEIGHT), rows, accumulate, epochs=2)
    assert min(differences(steps, windows(rows, accumulate, epochs=2), STEP_BY_STEP)) > 1e-3


@pytest.mark.parametrize(
    ("divisor", "wrong_steps"),
    [
        # every window divided by the whole factor: wrong in the short one only
        ("full_window", [False, False, True]),
        # micro-batches weighed by their rows, not their tokens: wrong everywhere
        ("rows", [True, True, True]),
    ],
)
def test_nearly_right_corrections_are_seen(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, divisor: str, wrong_steps: list[bool]
) -> None:
    right = DistillModule.window_weights

    def full_window(self: DistillModule, window: Window) -> dict[str, Tensor]:
        return {name: weight * len(window.counts) / 3 for name, weight in right(self, window).items()}

    if divisor == "full_window":
        monkeypatch.setattr(DistillModule, "window_weights", full_window)
    else:
        monkeypatch.setattr(
            DistillModule,
            "term_counts",
            lambda self, batch: {task: len(inputs["labels"]) for task, inputs in batch.items()},
        )
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    steps = train(make_module(student_folder, rationale_weight=WEIGHT), rows, accumulate=3)
    found = differences(steps, windows(rows, 3), STEP_BY_STEP)
    assert [value > 1e-3 for value in found] == wrong_steps


def test_a_window_whose_micro_batches_all_lack_rationales(student_folder: Path) -> None:
    rows = random_rows(10, seed=2, without_rationale=(0, 1, 2, 3, 9))
    steps = train(make_module(student_folder, rationale_weight=WEIGHT), rows, accumulate=2)
    assert max(differences(steps, windows(rows, 2), STEP_BY_STEP)) < 1e-5
    assert "rationale" not in rows[0], "the first window has none"
    alone = plain_gradients(steps.students[0], rows[:4], {"label": 1.0})
    assert difference(steps.gradients[0], alone) < 1e-5


def test_no_rationale_anywhere_trains_on_the_labels(student_folder: Path) -> None:
    rows = random_rows(7, seed=3, without_rationale=range(7))
    steps = train(make_module(student_folder), rows, accumulate=2)
    assert max(differences(steps, windows(rows, 2), {"label": 1.0})) < 1e-5


@pytest.mark.parametrize("kind", [StandardModule, SingleTaskModule])
def test_other_methods_have_the_gradient_of_the_whole_step(student_folder: Path, kind: type[DistillModule]) -> None:
    module = make_module(student_folder, kind)
    (task,) = module.tasks
    rows: list[Row] = [{task: row["label"]} for row in random_rows(11, seed=4)]
    steps = train(module, rows, accumulate=3)
    assert max(differences(steps, windows(rows, 3), {task: 1.0})) < 1e-5


def test_a_step_over_one_large_batch_is_the_same(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    split = train(make_module(student_folder), rows, accumulate=3)
    whole = train(make_module(student_folder), rows, accumulate=1, batch_size=3 * BATCH)
    assert len(split.gradients) == len(whole.gradients) == 3
    assert difference(split.gradients[0], whole.gradients[0]) < 1e-5


def test_limited_batches_end_an_epoch_early(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    steps = train(make_module(student_folder), rows, accumulate=3, epochs=2, limit_train_batches=5)
    assert max(differences(steps, windows(rows[:10], 3, epochs=2), {"label": 1.0, "rationale": 1.0})) < 1e-5


def test_padding_does_not_change_the_gradient(student_folder: Path) -> None:
    module = make_module(student_folder, rationale_weight=WEIGHT)
    rows = random_rows(5, seed=5)
    found: list[Gradients] = []
    for extra in (0, 9):
        module.zero_grad()
        module.total_loss(module.loss_terms(module.step(collate(rows, module.tasks, extra=extra)))).backward()
        found.append(gradients_of(module.student.model))
    assert difference(found[1], found[0]) < 1e-5
    assert difference(found[1], plain_gradients(module.student.model, rows, STEP_BY_STEP)) < 1e-5


def test_logged_training_losses_are_those_of_the_whole_step(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    steps = train(make_module(student_folder, rationale_weight=WEIGHT), rows, accumulate=3)
    for logged, student, own in zip(steps.logged, steps.students, windows(rows, 3), strict=True):
        terms = {task: float(term.detach()) for task, term in plain_terms(student, own, TASKS).items()}
        assert logged["train/label_loss"] == pytest.approx(terms["label"], rel=1e-5)
        assert logged["train/rationale_loss"] == pytest.approx(terms["rationale"], rel=1e-5)
        assert logged["train/loss"] == pytest.approx(terms["label"] + WEIGHT * terms["rationale"], rel=1e-5)


class WithLogitSize(StepByStepModule):
    """A variant with a term that is not a task's."""

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        return super().loss_terms(step) | {"size": logit_size(self.student.model, step.batch)}


class WithCountedSize(WithLogitSize):
    """The same, which declares that its term is a mean over rows."""

    def term_counts(self, batch: TaskBatch) -> Counts:
        return {**super().term_counts(batch), "size": len(batch["label"]["labels"])}


def logit_size(student: torch.nn.Module, batch: TaskBatch) -> Tensor:
    """The mean over rows of the squared logits at the first target position."""
    inputs = batch["label"]
    start = torch.zeros(len(inputs["labels"]), 1, dtype=torch.long)
    logits = student(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], decoder_input_ids=start
    ).logits
    return logits.square().mean(dim=(1, 2)).mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [WithLogitSize, WithCountedSize])
def test_other_terms_are_averaged_plainly_unless_counted(student_folder: Path, kind: type[DistillModule]) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    # the last micro-batch has one row, and its window two micro-batches of three
    steps = train(make_module(student_folder, kind), rows, accumulate=3)
    for found, logged, student, own in zip(
        steps.gradients, steps.logged, steps.students, windows(rows, 3), strict=True
    ):
        parts = [own[start : start + BATCH] for start in range(0, len(own), BATCH)]
        student.zero_grad()
        terms = plain_terms(student, own, TASKS)
        sizes = [logit_size(student, collate(part, ("label",))) for part in parts]
        shares = [len(part) / len(own) if kind is WithCountedSize else 1 / len(parts) for part in parts]
        size = sum((share * value for share, value in zip(shares, sizes, strict=True)), torch.zeros(()))
        (terms["label"] + terms["rationale"] + size).backward()
        assert difference(found, gradients_of(student)) < 1e-5
        assert logged["train/size_loss"] == pytest.approx(float(size.detach()), rel=1e-5)


def test_each_parameter_has_a_gradient_without_rationales(student_folder: Path) -> None:
    """A rank without rationales would else wait for ever for the others under DDP."""
    module = make_module(student_folder)
    rows = random_rows(3, without_rationale=range(3))
    module.loss_terms(module.step(collate(rows, TASKS)))["rationale"].backward()
    missing = [name for name, parameter in module.student.model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(not gradient.any() for gradient in gradients_of(module.student.model).values())


def test_activation_checkpointing_has_the_same_gradients(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    plain = train(make_module(student_folder), rows, accumulate=3)
    module = make_module(student_folder, activation_checkpointing=True)
    calls: list[str] = []
    for block in module.student.model.encoder.block:
        # on the way in: the second pass stops where it has all that the backward pass asks for
        block.layer[0].register_forward_pre_hook(lambda *_: calls.append("forward"))
    recomputed = train(module, rows, accumulate=3)
    for left, right in zip(recomputed.gradients, plain.gradients, strict=True):
        assert difference(left, right) < 1e-6
    # two blocks, eight micro-batches: each forward once more in the backward pass
    assert len(calls) == 2 * 2 * 8


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("combined", [False, True])
def test_bare_loaders_are_read_ahead_too(student_folder: Path, combined: bool) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    module = make_module(student_folder, rationale_weight=WEIGHT)
    steps = Steps()
    loader: Any = RowsData(rows, BATCH, module.tasks).train_dataloader()
    if combined:
        loader = CombinedLoader(loader, "min_size")
    make_trainer(accumulate_grad_batches=3, callbacks=[steps]).fit(module, loader)
    assert max(differences(steps, windows(rows, 3), STEP_BY_STEP)) < 1e-5


def test_a_training_step_without_a_trainer_is_the_plain_loss(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    module = make_module(student_folder, rationale_weight=WEIGHT)
    batch = next(iter(RowsData(rows, BATCH, module.tasks).train_dataloader()))
    assert module.training_step(batch, 0).equal(module.total_loss(module.loss_terms(module.step(batch))))


def test_a_second_fit_of_the_same_module(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    module = make_module(student_folder, rationale_weight=WEIGHT)
    train(module, rows, accumulate=2)
    steps = train(module, rows, accumulate=3)
    assert max(differences(steps, windows(rows, 3), STEP_BY_STEP)) < 1e-5


def test_loading_a_mid_epoch_checkpoint_starts_a_new_run_at_its_first_batch(
    student_folder: Path, tmp_path: Path
) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]
    module = make_module(student_folder, rationale_weight=WEIGHT)
    trainer = make_trainer(accumulate_grad_batches=2, max_steps=2)
    trainer.fit(module, datamodule=RowsData(rows, BATCH, module.tasks))
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    loaded = StepByStepModule.load_from_checkpoint(tmp_path / "middle.ckpt")
    steps = train(loaded, rows, accumulate=3)
    assert max(differences(steps, windows(rows, 3), STEP_BY_STEP)) < 1e-5


def test_gradient_clipping_sees_the_whole_steps_gradient(student_folder: Path) -> None:
    rows = random_rows(**RAGGED)  # type: ignore[arg-type]

    class Norms(pl.Callback):
        norms: list[float] = []  # noqa: RUF012 - one instance

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: object) -> None:
            if trainer.global_step > len(self.norms):
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    steps = Steps()
    norms = Norms()
    module = make_module(student_folder, rationale_weight=WEIGHT)
    make_trainer(accumulate_grad_batches=3, callbacks=[steps, norms], gradient_clip_val=0.01).fit(
        module, datamodule=RowsData(rows, BATCH, module.tasks)
    )
    # `Steps` reads before the clipping, so these are still whole
    assert max(differences(steps, windows(rows, 3), STEP_BY_STEP)) < 1e-5
    assert len(norms.norms) == len(steps.gradients)
    assert max(norms.norms) <= 0.01 + 1e-6


def test_a_steps_gradients_are_gone_in_the_next_forward_pass(student_folder: Path) -> None:
    class Watching(StepByStepModule):
        def loss_terms(self, step: Step) -> dict[str, Tensor]:
            seen.append(any(parameter.grad is not None for parameter in self.parameters()))
            return super().loss_terms(step)

    seen: list[bool] = []
    train(make_module(student_folder, Watching), random_rows(8, seed=2), accumulate=2)
    # those of a step's own micro-batches add up
    assert seen == [False, True, False, True]
