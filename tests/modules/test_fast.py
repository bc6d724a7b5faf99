"""A module on the fast path and off it: the same numbers, one encoding, and a student that stays Hugging Face's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, sources_of, take, targets_of
from lit_distill.data.toy import ToyDataModule
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule
from lit_distill.objectives import Step
from lit_distill.students.fast import products
from lit_distill.students.fast.support import fits
from lit_distill.students.seq2seq import PackedPass
from tests.modules.batches import Row, RowsData, collate, random_rows
from tests.modules.running import difference, gradients_of, make_trainer
from tests.modules.test_evaluation import ITEMS, ItemData

# the settings of all methods are the same, also of the one that has no rationales
pytestmark = pytest.mark.filterwarnings("ignore:evaluate_rationales. StandardModule writes no rationales")

ROWS = random_rows(6, seed=21, without_rationale=(2,))
KINDS: list[tuple[type[DistillModule], dict[str, Any]]] = [
    (StandardModule, {}),
    (StepByStepModule, {"rationale_weight": 0.7}),
    (SingleTaskModule, {"order": "rationale_first"}),
    (SingleTaskModule, {"order": "label_first"}),
]


def make(folder: Path, kind: type[DistillModule], *, fast: bool, **arguments: Any) -> Any:
    torch.manual_seed(7)
    return kind(folder, from_scratch=True, fast=fast, **arguments)


def batch_of(module: DistillModule) -> TaskBatch:
    tasks = list(module.tasks)
    rows: list[Row] = ROWS if len(tasks) > 1 else [{tasks[0]: row["label"]} for row in ROWS]
    return collate(rows, tasks)


def train(module: DistillModule, batch: TaskBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    module.zero_grad()
    terms = module.loss_terms(module.step(batch))
    module.total_loss(terms).backward()
    return {name: float(term.detach()) for name, term in terms.items()}, gradients_of(module.student.model)


def is_fast(module: DistillModule, batch: TaskBatch) -> bool:
    return isinstance(module.step(batch).student, PackedPass)


def check_both(folder: Path, kind: type[DistillModule], batch: TaskBatch | None = None, **arguments: Any) -> None:
    found = []
    for fast in (True, False):
        module = make(folder, kind, fast=fast, **arguments)
        own = batch_of(module) if batch is None else batch
        assert is_fast(module, own) == fast
        found.append(train(module, own))
    (ours, left), (plain, right) = found
    assert ours == pytest.approx(plain, rel=1e-5)
    assert difference(left, right) < 1e-5


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's own forward is not to be called."""

    def refuse(*rest: object, **more: object) -> None:
        raise AssertionError("the plain forward was called")

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", refuse)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("kind", "arguments"), KINDS)
def test_terms_and_gradients(student_folder: Path, kind: type[DistillModule], arguments: dict[str, Any]) -> None:
    check_both(student_folder, kind, **arguments)


@pytest.mark.parametrize(("kind", "arguments"), KINDS)
@pytest.mark.usefixtures("no_forward")
def test_it_is_taken(student_folder: Path, kind: type[DistillModule], arguments: dict[str, Any]) -> None:
    module = make(student_folder, kind, fast=True, **arguments)
    train(module, batch_of(module))
    module = make(student_folder, kind, fast=False, **arguments)
    with pytest.raises(AssertionError, match="plain forward"):
        train(module, batch_of(module))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_training_is_the_same(student_folder: Path, activation_checkpointing: bool) -> None:
    students = []
    for fast in (True, False):
        module = make(
            student_folder, StepByStepModule, fast=fast, learning_rate=1e-2, optimizer="adafactor",
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        data = RowsData(random_rows(12, seed=3), 3, module.tasks)
        make_trainer(max_epochs=2).fit(module, datamodule=data)
        students.append({name: p.detach() for name, p in module.student.model.named_parameters()})
    # eight steps of rounding
    assert difference(*students) < 1e-4


def without_targets(batch: TaskBatch, task: str, which: str) -> None:
    if which == "ignored":
        batch[task]["labels"].fill_(IGNORE_INDEX)
    else:
        batch[task] = take(batch[task], [])


@pytest.mark.parametrize("which", ["ignored", "no rows"])
@pytest.mark.parametrize("task", ["label", "rationale"])
def test_a_task_with_nothing_to_learn(student_folder: Path, which: str, task: str) -> None:
    batch = collate(ROWS, ("label", "rationale"))
    without_targets(batch, task, which)
    check_both(student_folder, StepByStepModule, batch)


@pytest.mark.parametrize("kind", [StandardModule, StepByStepModule])
@pytest.mark.parametrize("which", ["ignored", "no rows"])
def test_a_batch_with_nothing_to_learn(student_folder: Path, kind: type[DistillModule], which: str) -> None:
    module = make(student_folder, kind, fast=True)
    batch = batch_of(module)
    for task in module.tasks:
        without_targets(batch, task, which)
    terms, found = train(module, batch)
    assert terms == dict.fromkeys(module.tasks, 0.0)
    # each parameter has one, for sharded strategies and unused-parameter checks
    assert all(p.grad is not None for p in module.student.model.parameters())
    assert not any(bool(gradient.any()) for gradient in found.values())


def test_the_batch_stays_as_it_is(student_folder: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    batch = batch_of(module)
    before = copy.deepcopy(batch)
    train(module, batch)
    for task, inputs in batch.items():
        assert inputs.keys() == before[task].keys()
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(inputs[name], before[task][name])


def test_left_padding_goes_the_plain_way(student_folder: Path) -> None:
    module = make(student_folder, StandardModule, fast=True)
    batch = batch_of(module)
    whole, _ = train(module, batch)
    inputs = batch["label"]
    for row, mask in enumerate(inputs["attention_mask"]):
        turn = int((mask == 0).sum())
        inputs["input_ids"][row] = inputs["input_ids"][row].roll(turn)
        inputs["attention_mask"][row] = mask.roll(turn)
    assert not is_fast(module, batch)
    found, _ = train(module, batch)
    # relative positions alone: the same loss, by the plain forward
    assert found == pytest.approx(whole, rel=1e-5)


# ------------------------------------------------------------------------------------------------ subclasses


class OwnTerms(StepByStepModule):
    """Terms of the logits, and of a step of its own."""

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        turned = self.step({task: each_row_again(inputs) for task, inputs in step.batch.items()})
        own = {"size": step.student.logits("label").square().mean(), "twice": turned.student.loss("rationale")}
        return super().loss_terms(step) | own


def each_row_again(inputs: TaskInputs) -> TaskInputs:
    return take(inputs, [row for row in range(len(inputs["labels"])) for _ in range(2)])


def test_what_a_subclass_adds(student_folder: Path) -> None:
    check_both(student_folder, OwnTerms)
    module = make(student_folder, OwnTerms, fast=True)
    terms, _ = train(module, batch_of(module))
    assert terms["twice"] == pytest.approx(terms["rationale"], rel=1e-5)


def change_in_place(batch: TaskBatch) -> TaskBatch:
    for inputs in batch.values():
        inputs["labels"][0] = IGNORE_INDEX
        inputs["attention_mask"][1, -1] = 0
    return batch


def each(change: Callable[[TaskInputs], dict[str, Tensor]]) -> Callable[[TaskBatch], TaskBatch]:
    """A batch with some tensors of each task changed, and the lengths that were written down as they were."""
    return lambda batch: {task: cast(TaskInputs, {**inputs, **change(inputs)}) for task, inputs in batch.items()}


def tensors(change: Callable[[Tensor], Tensor]) -> Callable[[TaskInputs], dict[str, Tensor]]:
    return lambda inputs: {name: change(x) for name, x in inputs.items() if isinstance(x, Tensor)}


def masked(inputs: TaskInputs) -> dict[str, Tensor]:
    kept = torch.rand(inputs["attention_mask"].shape, generator=torch.Generator().manual_seed(3)) > 0.3
    kept[:, 0] = True
    return {"attention_mask": inputs["attention_mask"] * kept}


BATCHES: dict[str, Callable[[TaskBatch], TaskBatch]] = {
    "zeros in the mask": each(masked),
    "a shorter mask": each(
        lambda t: {"attention_mask": t["attention_mask"] * (torch.arange(t["attention_mask"].shape[1]) < 3)}
    ),
    "other labels": lambda batch: batch | {"label": {**batch["label"], "labels": batch["rationale"]["labels"]}},
    "shorter labels": each(
        lambda t: {"labels": t["labels"].where(torch.arange(t["labels"].shape[1]) < 1, IGNORE_INDEX)}
    ),
    "fewer columns": each(lambda t: {"input_ids": t["input_ids"][:, :4], "attention_mask": t["attention_mask"][:, :4]}),
    "fewer rows": each(tensors(lambda x: x[:3])),
    "other rows": each(tensors(lambda x: x.flip(0))),
    "in place": change_in_place,
}


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("change", BATCHES)
def test_a_batch_that_a_method_changes(student_folder: Path, change: str, evaluation: bool) -> None:
    class Changed(StepByStepModule):
        def loss_terms(self, step: Step) -> dict[str, Tensor]:
            return super().loss_terms(self.step(BATCHES[change](step.batch)))

    found = []
    for fast in (True, False):
        module = evaluate(student_folder, Changed, fast=fast)
        if evaluation:
            data = ItemData(module, batch_size=5)
            found.append(make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)[0])
        else:
            found.append(train(module, (collate(random_rows(6, seed=21, without_rationale=()), module.tasks)))[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_lengths_cost_no_waiting_for_a_device(student_folder: Path) -> None:
    batch = batch_of(make(student_folder, StepByStepModule, fast=True))
    # a device whose tensors cannot be read
    there = ToyDataModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert fits(list(there.values()))
    for task, inputs in batch.items():
        assert there[task]["labels"].is_meta
        assert (sources_of(there[task]), targets_of(there[task])) == (sources_of(inputs), targets_of(inputs))


def test_processed_logits_of_a_subclass(student_folder: Path) -> None:
    class Rolled(StandardModule):
        def process_logits(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
            assert task == "label"
            return torch.stack([own.roll(int(row) * 5 + step) for own, row in zip(scores, rows, strict=True)])

    texts = []
    for fast in (True, False):
        module = make(student_folder, Rolled, fast=fast, max_label_length=7).eval()
        batch = batch_of(module)
        batch["label"]["index"] = torch.tensor([11, 3, 7, 2, 5, 0])
        texts.append(module.generate_texts(module.step(batch), "label"))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


# ------------------------------------------------------------------------------------------------ the student


def test_the_student_stays_what_it_is(student_folder: Path, tmp_path: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True, learning_rate=1e-2)
    names = list(make(student_folder, StepByStepModule, fast=False).student.model.state_dict())
    make_trainer(max_steps=3).fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    student: Any = module.student.model.eval()
    assert type(module.student.model) is T5ForConditionalGeneration
    assert list(student.state_dict()) == names
    inputs = batch_of(module)["label"]
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    student.save_pretrained(tmp_path)
    loaded: Any = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = loaded(**given, labels=inputs["labels"]).logits
        assert torch.equal(student(**given, labels=inputs["labels"]).logits, expected)
        assert torch.equal(student.generate(**given, max_new_tokens=5), loaded.generate(**given, max_new_tokens=5))
    terms = module.eval().loss_terms(module.step(batch_of(module)))
    assert float(terms["label"].detach()) == pytest.approx(
        float(loaded(**given, labels=inputs["labels"]).loss.detach()), rel=1e-5
    )


def test_a_deep_copy_has_a_student_of_its_own(student_folder: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    batch = batch_of(module)
    before, _ = train(module, batch)
    copied = copy.deepcopy(module)
    assert train(copied, batch)[0] == before
    with torch.no_grad():
        for parameter in copied.student.model.parameters():
            parameter.mul_(1.5)
    assert train(copied, batch)[0] != before
    assert train(module, batch)[0] == before


def test_a_reason_is_told_once(student_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    handle = module.student.model.encoder.register_forward_hook(lambda *rest: None)
    with caplog.at_level("INFO"):
        for _ in range(3):
            train(module, batch_of(module))
    assert [record.message for record in caplog.records if "fast" in record.message] == ["fast: off, encoder has hooks"]
    handle.remove()
    assert is_fast(module, batch_of(module))


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(folder: Path, kind: type[DistillModule], *, fast: bool, **arguments: Any) -> Any:
    module = make(
        folder, kind, fast=fast, max_label_length=5, max_rationale_length=12, evaluate_rationales=True, **arguments
    )
    with torch.no_grad():
        # far from uniform
        module.student.model.lm_head.weight.mul_(8)
    return module


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize(("kind", "arguments"), KINDS)
def test_evaluation(
    student_folder: Path, kind: type[DistillModule], arguments: dict[str, Any], batch_size: int
) -> None:
    metrics: list[dict[str, float]] = []
    answers = []
    for fast in (True, False):
        module = evaluate(student_folder, kind, fast=fast, **arguments)
        data = ItemData(module, batch_size=batch_size)
        trainer = make_trainer(limit_val_batches=1.0)
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
        metrics.append(dict(found))
        predicted: Any = trainer.predict(module, datamodule=data)
        answers.append([answer for batch in predicted for answer in batch])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(ITEMS)


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.usefixtures("no_forward")
def test_evaluation_encodes_each_row_once(
    student_folder: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = evaluate(student_folder, StepByStepModule, fast=True)
    data = ItemData(module, batch_size=batch_size)
    seen: list[int] = []
    first: Any = module.student.model.get_submodule("encoder.block.0.layer.0.SelfAttention.q")
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self is first:
            seen.append(len(x))
        return original(self, x)

    # so that each layer is called
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert len(seen) == -(-len(ITEMS) // batch_size), "once a batch"
    assert sum(seen) == sum(len(source) for row in data.rows for source, _ in row.values())


def test_rows_without_any_target_in_evaluation(student_folder: Path) -> None:
    metrics = []
    for fast in (True, False):
        module = evaluate(student_folder, StepByStepModule, fast=fast)
        data = ItemData(module, batch_size=1, labels=[None, "no", None, "c", None])
        for row in (0, 2):
            data.rows[row]["rationale"] = (data.rows[row]["rationale"][0], [IGNORE_INDEX])
            data.rows[row]["label"] = (data.rows[row]["label"][0], [IGNORE_INDEX])
        (found,) = make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
        metrics.append(dict(found))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
