"""Learning rates, parameter groups and steps against other implementations of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import get_scheduler
from transformers.optimization import Adafactor

from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.modules.optimization import OptimizerName, clip_in_step, parameter_groups
from lit_distill.modules.weighting import LEARNING_RATE
from tests.modules.batches import RowsData, random_rows
from tests.modules.running import Steps, make_trainer

ROWS = random_rows(14, seed=41)


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self.found.append(optimizer.param_groups[0]["lr"])


def fit(folder: Path, *callbacks: pl.Callback, **arguments: Any) -> StepByStepModule:
    torch.manual_seed(7)
    module = StepByStepModule(folder, from_scratch=True, **arguments)
    # seven micro-batches an epoch, four optimizer steps
    make_trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=list(callbacks)).fit(
        module, datamodule=RowsData(ROWS, 2, module.tasks)
    )
    return module


def expected_rates(schedule: str, warmup: int, steps: int = 12) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 5, 12])
def test_linear_schedule_a_step(student_folder: Path, warmup: int) -> None:
    rates = Rates()
    fit(student_folder, rates, learning_rate=3e-3, warmup_steps=warmup)
    assert rates.found == pytest.approx(expected_rates("linear", warmup), rel=1e-9)


@pytest.mark.parametrize("warmup", [0, 4])
def test_constant_schedule(student_folder: Path, warmup: int) -> None:
    rates = Rates()
    fit(student_folder, rates, learning_rate=3e-3, warmup_steps=warmup, lr_schedule="constant")
    assert rates.found == pytest.approx(expected_rates("constant_with_warmup", warmup), rel=1e-9)


def test_matrices_decay_and_vectors_do_not(student_folder: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True)
    groups = parameter_groups(module, 0.1)
    named = dict(module.named_parameters())
    norms = {id(parameter) for name, parameter in named.items() if "layer_norm" in name}
    assert len(norms) == 12
    assert {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups} == {
        0.1: {id(parameter) for parameter in named.values()} - norms,
        0.0: norms,
    }


def test_frozen_parameters_are_left_out(student_folder: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True)
    module.student.model.encoder.requires_grad_(False)
    optimized = sum(len(group["params"]) for group in parameter_groups(module, 0.1))
    assert optimized == sum(parameter.requires_grad for parameter in module.parameters())


def test_one_adamw_step_is_the_formula(student_folder: Path) -> None:
    rate, decay = 1e-2, 0.1
    steps = Steps()
    torch.manual_seed(7)
    module = StepByStepModule(student_folder, from_scratch=True, learning_rate=rate, weight_decay=decay)
    make_trainer(max_steps=1, callbacks=[steps]).fit(module, datamodule=RowsData(ROWS[:2], 2, module.tasks))
    before = dict(steps.students[0].named_parameters())
    for name, parameter in module.student.model.named_parameters():
        g, p = steps.gradients[0][name].double(), before[name].detach().double()
        m, v = 0.1 * g / (1 - 0.9), 0.001 * g * g / (1 - 0.999)
        expected = p * (1 - rate * (decay if p.ndim > 1 else 0)) - rate * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "scaled"), [("adafactor", False), ("adafactor_scaled", True)])
def test_adafactor_steps_as_hugging_faces(student_folder: Path, name: OptimizerName, scaled: bool) -> None:
    steps = Steps()
    module = fit(student_folder, steps, learning_rate=1e-2, optimizer=name, lr_schedule="constant")
    student = steps.students[0]
    optimizer = Adafactor(student.parameters(), lr=1e-2, scale_parameter=scaled, relative_step=False)
    for gradients in steps.gradients:
        for key, parameter in student.named_parameters():
            parameter.grad = gradients[key]
        optimizer.step()
    for (key, found), expected in zip(module.student.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=key)


def test_scaled_steps_are_relative_to_the_parameter(student_folder: Path) -> None:
    """The first step of Adafactor is the sign of the gradient, where it is not factored: the rate times the scale."""
    steps = Steps()
    settings: dict[str, Any] = {"learning_rate": 1e-3, "optimizer": "adafactor_scaled", "lr_schedule": "constant"}
    module = StepByStepModule(student_folder, from_scratch=True, **settings)
    make_trainer(max_steps=1, callbacks=[steps]).fit(module, datamodule=RowsData(ROWS[:2], 2, module.tasks))
    before = dict(steps.students[0].named_parameters())
    norms = {key: after for key, after in module.student.model.named_parameters() if after.ndim == 1}
    assert norms
    for key, after in norms.items():
        scale = before[key].detach().square().mean().sqrt().clamp(min=1e-3)
        moved = (after - before[key]).detach().abs() / (1e-3 * scale)
        assert float(moved.max()) < 1.01, key
        assert float(moved.max()) > 0.5, key


def test_what_begins_at_0_has_no_scaled_steps(student_folder: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "optimizer": "adafactor_scaled", "lr_schedule": "constant"}
    module = StepByStepModule(student_folder, from_scratch=True, weighting="uncertainty", **settings)
    make_trainer(max_steps=1).fit(module, datamodule=RowsData(ROWS[:2], 2, module.tasks))
    [weights] = [value for name, value in module.named_parameters() if name.startswith("weighting.")]
    assert weights.detach().abs().min() > 0.5 * LEARNING_RATE
    with pytest.raises(UserError, match="adafactor_scaled hardly moves an adapter"):
        StepByStepModule(student_folder, from_scratch=True, adapter={"r": 2}, **settings)


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("learning_rate", 0, "above 0"),
        ("learning_rate", -1e-3, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("warmup_steps", -1, "an integer at least 0"),
        ("dropout", 1.0, "at least 0 and below 1"),
        ("dropout", -0.1, "at least 0 and below 1"),
        ("max_label_length", 0, "an integer at least 1 and below 10001"),
        ("max_rationale_length", 0, "an integer at least 1 and below 10001"),
        ("num_beams", 0, "an integer at least 1 and below 101"),
        ("num_samples", -1, "an integer at least 0"),
        ("effective_batch_size", 0, "an integer at least 1"),
        ("learning_rate", float("inf"), "above 0"),
        ("num_beams", 1.5, "an integer at least 1 and below 101"),
        ("num_beams", True, "an integer at least 1 and below 101"),
    ],
)
def test_arguments_out_of_range(student_folder: Path, argument: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        StepByStepModule(student_folder, from_scratch=True, **{argument: value})
    assert str(error.value) == f"{argument} must be {allowed}, got {value!r}"


def clip(optimizer: Optimizer, max_norm: float) -> bool:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return clip_in_step(optimizer, max_norm, torch.nn.utils.get_total_norm(gradients))


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_within_the_step_is_torch_clipping(max_norm: float) -> None:
    found = []
    for within in (True, False):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(37, 5)), torch.nn.Parameter(torch.randn(11))]
        frozen = torch.nn.Parameter(torch.randn(3))
        optimizer = torch.optim.AdamW([*parameters, frozen], lr=1e-2, fused=True)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if within:
                assert clip(optimizer, max_norm)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
        found.append([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_optimizers_clip_by_themselves(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    assert not clip(torch.optim.AdamW([parameter]), 1.0)
    assert not clip(torch.optim.SGD([parameter]), 1.0)
    # the kernel divides by float32 alone
    assert clip(torch.optim.AdamW([parameter], fused=True), 1.0) == (dtype == torch.float32)


class PlainlyClipped(StepByStepModule):
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        assert gradient_clip_val is not None
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_clipped_run_in_any_precision(student_folder: Path, precision: Any) -> None:
    weights = []
    for kind in (StepByStepModule, PlainlyClipped):
        torch.manual_seed(7)
        module = kind(student_folder, from_scratch=True, learning_rate=1e-2)
        make_trainer(max_steps=4, precision=precision, gradient_clip_val=0.05).fit(
            module, datamodule=RowsData(ROWS, 2, module.tasks)
        )
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    # the two take the norms of parameters in another order
    tolerance = 1e-5 if precision == "32-true" else 1e-12
    torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)


class Casts(TorchDispatchMode):
    """Counts matrices that are cast to bfloat16, by shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::copy_", "aten::_to_copy") and out.dtype == torch.bfloat16:
            self.found[tuple(out.shape)] += 1
        return out


def test_autocast_casts_weights_once_an_optimizer_step(student_folder: Path) -> None:
    torch.manual_seed(7)
    module = StepByStepModule(student_folder, from_scratch=True, fast="packed")
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=2, precision="bf16-mixed")
    with Casts() as casts:
        trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    # seven micro-batches
    assert trainer.global_step == 4
    head: torch.Tensor = module.student.model.lm_head.weight
    assert casts.found[tuple(head.shape)] == 4


class ClippedAtFirst(StepByStepModule):
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.trainer.global_step < 2:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class Norms(pl.Callback):
    """Of the gradients that the optimizer has stepped with."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.found.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_a_run_that_stops_clipping(student_folder: Path) -> None:
    module, norms = ClippedAtFirst(student_folder, from_scratch=True, learning_rate=1e-3), Norms()
    make_trainer(max_steps=4, gradient_clip_val=1e-3, callbacks=[norms]).fit(
        module, datamodule=RowsData(ROWS, 2, module.tasks)
    )
    assert max(norms.found[:2]) < 1.1e-3 < 0.1 < min(norms.found[2:])


class OwnOptimizer(StepByStepModule):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW([{"params": list(self.parameters()), "name": "all"}], lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        pass


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_an_optimizer_and_a_schedule_of_a_users_class_resume(student_folder: Path, tmp_path: Path) -> None:
    weights = []
    for resumed in (None, tmp_path / "half.ckpt"):
        torch.manual_seed(7)
        module = OwnOptimizer(student_folder, from_scratch=True)
        for steps, path in ((2, None), (4, resumed)) if resumed else ((4, None),):
            trainer = make_trainer(max_steps=steps, gradient_clip_val=0.1)
            trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks), ckpt_path=path, weights_only=True)
            if resumed:
                trainer.save_checkpoint(resumed)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert weights[0].equal(weights[1])


def test_lightning_finds_a_learning_rate(here: Path, student_folder: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True)
    tuner = Tuner(make_trainer(max_steps=20))
    found = tuner.lr_find(module, datamodule=RowsData(ROWS, 2, module.tasks), num_training=5, early_stop_threshold=None)
    assert found is not None
    assert len(found.results["lr"]) == 5
