"""Shared weights: gradients and losses against a smaller model that stands alone."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.batch import TaskBatch, join, pad_rows
from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import Objective, Step
from lit_distill.searching.shared import SuperStudent
from lit_distill.searching.space import Shape, part_of
from lit_distill.shrinking.shrink import shrink
from tests.students import make_causal_folder, make_student_folder

BATCH: TaskBatch = {
    "label": pad_rows([[3, 17, 1], [3, 18, 19, 1]], [[7, 1], [8, 1]]),
    "rationale": pad_rows([[4, 17, 1]], [[9, 10, 11, 1]]),
}
SHAPES: dict[str, Shape] = {
    "t5": {"encoder_layers": 1, "decoder_layers": 2, "d_model": 12, "d_ff": 20, "heads": 1},
    "llama": {"decoder_layers": 1, "d_model": 12, "d_ff": 20, "heads": 2},
}


@pytest.fixture(params=SHAPES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(kind: str, tmp_path: Path) -> StepByStepModule:
    torch.manual_seed(0)
    folder = make_student_folder(tmp_path) if kind == "t5" else make_causal_folder(tmp_path)
    return StepByStepModule(folder, from_scratch=True, learning_rate=1e-2)


def own_loss(network: Any, task: str) -> Tensor:
    """Transformers' own mean loss of a task, in float64."""
    inputs, network = BATCH[task], network.double()
    if network.config.is_encoder_decoder:
        logits = network(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"]
        )
        return F.cross_entropy(logits.logits.flatten(0, 1), inputs["labels"].flatten())
    losses = []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        prompt, target = ids[mask.bool()], labels[labels >= 0]
        logits = network(input_ids=torch.cat([prompt, target])[None]).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(losses).mean()


def test_a_parts_gradient_is_that_of_a_model_alone(module: StepByStepModule, kind: str) -> None:
    shared, shape = SuperStudent(module), SHAPES[kind]
    alone: Any = shrink(*part_of(module.student, shape))
    expected = own_loss(alone, "label") + own_loss(alone, "rationale")
    expected.backward()
    loss = shared.loss(shape, BATCH)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    loss.backward()
    assert module.student is shared.whole
    whole: Any = shared.whole.network
    units = ("encoder.block.0.layer.1.DenseReluDense.wo", (slice(12), slice(20))) if kind == "t5" else (
        "model.layers.0.mlp.down_proj", (slice(12), slice(20)))  # fmt: skip
    weight, own = (model.get_submodule(units[0]).weight.grad for model in (whole, alone))
    torch.testing.assert_close(weight[units[1]].double(), own, rtol=0, atol=1e-6)
    # what is no part of it has none
    assert weight.count_nonzero() == weight[units[1]].count_nonzero()
    embedded = whole.get_input_embeddings().weight.grad
    torch.testing.assert_close(embedded[:, :12].double(), alone.get_input_embeddings().weight.grad, rtol=0, atol=1e-6)
    gone = whole.get_submodule("encoder.block.1" if kind == "t5" else "model.layers.1")
    assert all(parameter.grad is None for parameter in gone.parameters())


def test_micro_batches_of_a_step_count_by_their_targets(module: StepByStepModule, kind: str) -> None:
    rows = [([4, 17, 1], [9, 10, 11, 1]), ([4, 18, 1], [12, 1])]
    window: list[TaskBatch] = [{"label": BATCH["label"], "rationale": pad_rows([one], [two])} for one, two in rows]
    whole: TaskBatch = {
        "label": join([BATCH["label"], BATCH["label"]]), "rationale": join([one["rationale"] for one in window]),
    }  # fmt: skip
    shared, shape = SuperStudent(module), SHAPES[kind]
    shares = shared._shares(window)
    found = sum(float(shared.loss(shape, *one).detach()) for one in zip(window, shares, strict=True))
    assert found == pytest.approx(float(shared.loss(shape, whole).detach()), abs=1e-5)
    plain = sum(float(shared.loss(shape, one).detach()) for one in window) / 2
    assert abs(plain - found) > 1e-3


def windows() -> Iterator[list[TaskBatch]]:
    return repeat([BATCH])


def train(shared: SuperStudent, kind: str, steps: int) -> list[str]:
    told: list[str] = []
    large = SHAPES[kind] | {"d_model": 16, "d_ff": 32}
    shapes = [large, SHAPES[kind], SHAPES[kind] | {"d_ff": 24}, SHAPES[kind] | {"d_model": 16}]
    shared.train(
        steps, windows(), shapes, 0, clip=1.0, autocast=nullcontext, advance=lambda number, note: told.append(note)
    )
    return told


def test_training_lowers_the_loss_of_parts_and_is_repeatable(module: StepByStepModule, kind: str) -> None:
    shared, start = SuperStudent(module), {k: v.clone() for k, v in module.state_dict().items()}
    before = shared.validation_loss(SHAPES[kind], [BATCH])
    told = train(shared, kind, 4)
    after = shared.validation_loss(SHAPES[kind], [BATCH, BATCH])
    assert after < before
    alone: Any = shrink(*part_of(module.student, SHAPES[kind]))
    expected = own_loss(alone, "label") + own_loss(alone, "rationale")
    assert after == pytest.approx(float(expected.detach()), abs=1e-5)
    module.load_state_dict(start)
    assert train(SuperStudent(module), kind, 4) == told
    assert shared.validation_loss(SHAPES[kind], [BATCH, BATCH]) == after


class _Own(Objective):
    """An objective that notes the student it is set up for."""

    widths: list[int] = []  # noqa: RUF012 - shared by copies

    def setup(self, student: Any, teachers: Any) -> None:
        self.widths.append(student.width)

    def forward(self, step: Step) -> Tensor:
        return step.student.states("label").square().mean()


class _Projected(_Own):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight_of_its_own = torch.nn.Parameter(torch.ones(2))


class _Prepares(_Own):
    def prepare(self, window: Any) -> None:
        pass


def test_objectives_are_those_of_the_part(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path)
    module = StepByStepModule(folder, from_scratch=True, objectives=[_Own(name="own", weight=0.5)])
    plain = StepByStepModule(folder, from_scratch=True)
    plain.student.load_state_dict(module.student.state_dict())
    loss, without = (float(SuperStudent(one).loss(SHAPES["t5"], BATCH).detach()) for one in (module, plain))
    assert loss > without
    assert _Own.widths == [12]


@pytest.mark.parametrize(
    ("objective", "message"),
    [(_Projected, "objectives: own has weights of its own"), (_Prepares, "objectives: own changes batches")],
)
def test_what_is_refused(objective: Any, message: str, tmp_path: Path) -> None:
    module = StepByStepModule(make_student_folder(tmp_path), from_scratch=True, objectives=[objective(name="own")])
    with pytest.raises(UserError, match=message):
        SuperStudent(module)


def test_weights_of_terms_are_fixed(tmp_path: Path) -> None:
    folder = make_student_folder(tmp_path)
    with pytest.raises(UserError, match=r"^weighting"):
        SuperStudent(StepByStepModule(folder, from_scratch=True, weighting="uncertainty"))
    with pytest.raises(UserError, match=r"^adapter"):
        SuperStudent(StepByStepModule(folder, from_scratch=True, adapter={"r": 2}))
