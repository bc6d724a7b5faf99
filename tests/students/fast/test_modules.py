"""The fast path as a module takes it: the same numbers, one encoding, and a student that stays Hugging Face's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, lengths_of
from lit_distill.losses import token_cross_entropy
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule
from lit_distill.modules.generation import generate_texts, score_choices
from lit_distill.students.fast.support import fits
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


def make(folder: Path, kind: type[DistillModule], *, fast: bool, **arguments: Any) -> Any:  # noqa: ANN401
    torch.manual_seed(7)
    return kind(folder, from_scratch=True, fast=fast, **arguments)


def batch_of(module: DistillModule) -> TaskBatch:
    tasks = module.active_tasks
    rows: list[Row] = ROWS if len(tasks) > 1 else [{tasks[0]: row["label"]} for row in ROWS]
    return collate(rows, tasks)


def step(module: DistillModule, batch: TaskBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    module.zero_grad()
    terms = module.loss_terms(batch)
    module.total_loss(terms).backward()
    return {name: float(term.detach()) for name, term in terms.items()}, gradients_of(module.student)


def check_both(folder: Path, kind: type[DistillModule], batch: TaskBatch | None = None, **arguments: Any) -> None:
    found = []
    for fast in (True, False):
        module = make(folder, kind, fast=fast, **arguments)
        own = batch_of(module) if batch is None else batch
        assert module.fast_path.applies([module._task_inputs(own, task) for task in module.active_tasks]) == fast
        found.append(step(module, own))
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
    step(module, batch_of(module))
    module = make(student_folder, kind, fast=False, **arguments)
    with pytest.raises(AssertionError, match="plain forward"):
        step(module, batch_of(module))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_training_is_the_same(student_folder: Path, activation_checkpointing: bool) -> None:
    students = []
    for fast in (True, False):
        module = make(
            student_folder, StepByStepModule, fast=fast, learning_rate=1e-2, optimizer="adafactor",
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        data = RowsData(random_rows(12, seed=3), 3, module.active_tasks)
        make_trainer(max_epochs=2).fit(module, datamodule=data)
        students.append({name: p.detach() for name, p in module.student.named_parameters()})
    # eight steps of rounding
    assert difference(*students) < 1e-4


@pytest.mark.parametrize("which", ["none", "missing", "ignored"])
@pytest.mark.parametrize("task", ["label", "rationale"])
def test_a_task_with_nothing_to_learn(student_folder: Path, which: str, task: str) -> None:
    batch = collate(ROWS, ("label", "rationale"))
    if which == "ignored":
        batch[task]["labels"].fill_(IGNORE_INDEX)
    elif which == "missing":
        del batch[task]
    else:
        for name in ("input_ids", "attention_mask", "labels"):
            batch[task][name] = batch[task][name][:0]
    check_both(student_folder, StepByStepModule, batch)


@pytest.mark.parametrize("kind", [StandardModule, StepByStepModule])
@pytest.mark.parametrize("which", ["ignored", "no rows", "no task"])
def test_a_batch_with_nothing_to_learn(student_folder: Path, kind: type[DistillModule], which: str) -> None:
    module = make(student_folder, kind, fast=True)
    batch = batch_of(module)
    for inputs in batch.values():
        if which == "ignored":
            inputs["labels"].fill_(IGNORE_INDEX)
        else:
            for name in ("input_ids", "attention_mask", "labels"):
                inputs[name] = inputs[name][:0]
    if which == "no task":
        batch.clear()
    terms, found = step(module, batch)
    assert terms == dict.fromkeys(module.active_tasks, 0.0)
    # each parameter has one, for sharded strategies and unused-parameter checks
    assert all(p.grad is not None for p in module.student.parameters())
    assert not any(bool(gradient.any()) for gradient in found.values())


@pytest.mark.parametrize("batch_of_task", ["label", "rationale"])
def test_one_task_alone(student_folder: Path, batch_of_task: str) -> None:
    losses = []
    for fast in (True, False):
        module = make(student_folder, StepByStepModule, fast=fast)
        losses.append(float(module.task_loss(batch_of(module), batch_of_task).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_batch_stays_as_it_is(student_folder: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    batch = batch_of(module)
    before = copy.deepcopy(batch)
    step(module, batch)
    for task, inputs in batch.items():
        assert inputs.keys() == before[task].keys()
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(inputs[name], before[task][name])


def test_left_padding_goes_the_plain_way(student_folder: Path) -> None:
    module = make(student_folder, StandardModule, fast=True)
    batch = batch_of(module)
    whole, _ = step(module, batch)
    inputs = batch["label"]
    for row, mask in enumerate(inputs["attention_mask"]):
        turn = int((mask == 0).sum())
        inputs["input_ids"][row] = inputs["input_ids"][row].roll(turn)
        inputs["attention_mask"][row] = mask.roll(turn)
    assert not module.fast_path.applies([inputs])
    found, _ = step(module, batch)
    # relative positions alone: the same loss, by the plain forward
    assert found == pytest.approx(whole, rel=1e-5)


# ------------------------------------------------------------------------------------------------ subclasses


class Warm(StepByStepModule):
    """Another temperature of the student."""

    def task_logits(self, batch: TaskBatch, task: str) -> tuple[Tensor, Tensor]:
        logits, labels = super().task_logits(batch, task)
        return logits / 2, labels


class Doubled(StepByStepModule):
    """Another loss of one task."""

    def task_loss(self, batch: TaskBatch, task: str) -> Tensor:
        return super().task_loss(batch, task) * (2 if task == "label" else 1)


class OwnTerms(StepByStepModule):
    """One more term, of the logits."""

    def loss_terms(self, batch: TaskBatch) -> dict[str, Tensor]:
        terms = super().loss_terms(batch)
        logits, _ = self.task_logits(batch, "label")
        return terms | {"size": logits.square().mean()}


@pytest.mark.parametrize("kind", [Warm, Doubled, OwnTerms])
def test_what_a_subclass_changes_is_honoured(student_folder: Path, kind: type[StepByStepModule]) -> None:
    check_both(student_folder, kind)


def test_the_subclasses_do_change_something(student_folder: Path) -> None:
    plain = make(student_folder, StepByStepModule, fast=False)
    batch = batch_of(plain)
    logits, labels = plain.task_logits(batch, "label")
    warm = make(student_folder, Warm, fast=True).loss_terms(batch)
    doubled = make(student_folder, Doubled, fast=True).loss_terms(batch)
    assert float(warm["label"].detach()) == pytest.approx(float(token_cross_entropy(logits / 2, labels).detach()))
    assert float(doubled["label"].detach()) == pytest.approx(
        2 * float(token_cross_entropy(logits, labels).detach()), rel=1e-5
    )


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
        def loss_terms(self, batch: TaskBatch) -> dict[str, Tensor]:
            return super().loss_terms(BATCHES[change](batch))

    found = []
    for fast in (True, False):
        module = evaluate(student_folder, Changed, fast=fast)
        if evaluation:
            data = LengthsData(module, batch_size=5)
            found.append(make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)[0])
        else:
            found.append(step(module, written(collate(random_rows(6, seed=21, without_rationale=()), module.tasks)))[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def written(batch: TaskBatch) -> TaskBatch:
    """With the lengths of its rows, as the collator writes them."""
    for inputs in batch.values():
        inputs["source_lengths"], inputs["target_lengths"] = lengths_of(inputs)
    return batch


class LengthsData(ItemData):
    def _collate_evaluation(self, items: Any) -> TaskBatch:  # noqa: ANN401
        return written(super()._collate_evaluation(items))


def test_lengths_cost_no_waiting_for_a_device(student_folder: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    batch = batch_of(module)
    # a device whose tensors cannot be read
    there = module._apply_batch_transfer_handler(batch, torch.device("meta"), 0)
    assert fits(list(there.values()))
    for task, inputs in batch.items():
        assert there[task]["labels"].is_meta
        assert lengths_of(there[task]) == lengths_of(inputs)


def test_a_transfer_of_ones_own_is_not_relied_on(student_folder: Path) -> None:
    class Own(StepByStepModule):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ANN401
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            return each(lambda inputs: {"labels": inputs["labels"] + 1})(moved)

    module = make(student_folder, Own, fast=True)
    there = module._apply_batch_transfer_handler(batch_of(module), torch.device("meta"), 0)
    with pytest.raises(NotImplementedError, match="meta"):
        lengths_of(there["label"])


class WithoutAdapter(StepByStepModule):
    """One more term, of the student that the adapter began with."""

    def loss_terms(self, batch: TaskBatch) -> dict[str, Tensor]:
        with torch.no_grad(), cast(Any, self.student).disable_adapter():
            before = self.task_loss(batch, "label")
        return super().loss_terms(batch) | {"before": before}


@pytest.mark.filterwarnings(
    # PEFT 0.21 asks transformers 5.23 by names that are going
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:`gradient_checkpointing:FutureWarning",
)
def test_a_method_that_switches_an_adapter_off(student_folder: Path) -> None:
    found = []
    for fast in (True, False):
        module = evaluate(student_folder, WithoutAdapter, fast=fast)
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q", "v", "wo"], init_lora_weights=False)
        module.student = get_peft_model(module.student, config)
        data = ItemData(module)
        found.append(make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["val/before_loss"] != pytest.approx(found[0]["val/label_loss"], rel=1e-3)


def test_a_method_that_turns_dropout_on_in_evaluation(student_folder: Path) -> None:
    class Sampled(StepByStepModule):
        def loss_terms(self, batch: TaskBatch) -> dict[str, Tensor]:
            terms = super().loss_terms(batch)
            encoder = self.student.encoder.train()
            spread = torch.stack([self.task_loss(batch, "label") for _ in range(8)]).std()
            encoder.eval()
            return terms | {"spread": spread}

    module = evaluate(student_folder, Sampled, fast=True, dropout=0.3)
    (found,) = make_trainer(limit_val_batches=1.0).validate(module, datamodule=ItemData(module), verbose=False)
    assert found["val/spread_loss"] > 1e-3


def test_shaped_scores_of_a_subclass(student_folder: Path) -> None:
    class Shaped(StandardModule):
        def shape_scores(self, task: str, scores: Tensor, step: int, rows: Tensor) -> Tensor:
            assert task == "label"
            return torch.stack([own.roll(int(row) * 5 + step) for own, row in zip(scores, rows, strict=True)])

    texts = []
    for fast in (True, False):
        module = make(student_folder, Shaped, fast=fast, max_label_length=7).eval()
        batch = batch_of(module)["label"]
        batch["index"] = torch.tensor([11, 3, 7, 2, 5, 0])
        texts.append([generate_texts(module, "label", batch), generate_texts(module, "label", batch, [4, 1])])
    assert texts[0] == texts[1]
    assert len(set(texts[0][0])) > 1


# ------------------------------------------------------------------------------------------------ the student


def test_the_student_stays_what_it_is(student_folder: Path, tmp_path: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True, learning_rate=1e-2)
    names = list(make(student_folder, StepByStepModule, fast=False).student.state_dict())
    make_trainer(max_steps=3).fit(module, datamodule=RowsData(ROWS, 2, module.active_tasks))
    student = module.student.eval()
    assert type(module.student) is T5ForConditionalGeneration
    assert list(student.state_dict()) == names
    inputs = batch_of(module)["label"]
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    student.save_pretrained(tmp_path)
    loaded: Any = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = loaded(**given, labels=inputs["labels"]).logits
        assert torch.equal(student(**given, labels=inputs["labels"]).logits, expected)
        assert torch.equal(student.generate(**given, max_new_tokens=5), loaded.generate(**given, max_new_tokens=5))
    terms = module.eval().loss_terms(batch_of(module))
    assert float(terms["label"].detach()) == pytest.approx(
        float(loaded(**given, labels=inputs["labels"]).loss.detach()), rel=1e-5
    )


def test_a_deep_copy_has_a_student_of_its_own(student_folder: Path) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    batch = batch_of(module)
    before, _ = step(module, batch)
    copied = copy.deepcopy(module)
    assert step(copied, batch)[0] == before
    with torch.no_grad():
        for parameter in copied.student.parameters():
            parameter.mul_(1.5)
    assert step(copied, batch)[0] != before
    assert step(module, batch)[0] == before


def test_a_reason_is_told_once(student_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make(student_folder, StepByStepModule, fast=True)
    handle = module.student.encoder.register_forward_hook(lambda *rest: None)
    with caplog.at_level("INFO"):
        for _ in range(3):
            step(module, batch_of(module))
    assert [record.message for record in caplog.records if "fast" in record.message] == ["fast: off, encoder has hooks"]
    handle.remove()
    assert module.fast_path.applies(list(batch_of(module).values()))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("fast:")]


def test_each_reason_is_told_once(student_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = make(student_folder, StepByStepModule, fast=True, max_label_length=2).eval()
    batch, left = batch_of(module), batch_of(module)
    left["label"]["attention_mask"] = left["label"]["attention_mask"].flip(1)
    with caplog.at_level("INFO"):
        for _ in range(2):
            for one in (batch, left):
                module.loss_terms(one)
            module.student.generation_config.no_repeat_ngram_size = 2
            generate_texts(module, "label", batch["label"])
            module.student.generation_config.no_repeat_ngram_size = None
            generate_texts(module, "label", batch["label"])
            module.hparams["compile"] = True
            module.fast_path.applies([batch["label"]])
            module.hparams["compile"] = False
    assert told(caplog) == [
        "fast: off for a batch, it has padding before a source's end, or a row without a source",
        "fast: off for generation, the generation settings have no_repeat_ngram_size",
        "fast: off in training, compile stands in its place",
    ]


def test_logits_of_a_methods_own_are_a_reason(student_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        for fast in (True, False):
            module = make(student_folder, Warm, fast=fast)
            step(module, batch_of(module))
    assert told(caplog) == ["fast: off for losses, Warm has a task_logits of its own"]


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(folder: Path, kind: type[DistillModule], *, fast: bool, **arguments: Any) -> Any:  # noqa: ANN401
    module = make(
        folder, kind, fast=fast, max_label_length=5, max_rationale_length=12, evaluate_rationales=True, **arguments
    )
    with torch.no_grad():
        # far from uniform
        module.student.lm_head.weight.mul_(8)
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
    first: Any = module.student.get_submodule("encoder.block.0.layer.0.SelfAttention.q")
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self is first:
            seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert len(seen) == -(-len(ITEMS) // batch_size), "once a batch"
    assert sum(seen) == sum(len(source) for row in data.rows for source, _ in row.values())


def test_a_shared_encoding_is_let_go(student_folder: Path) -> None:
    module = evaluate(student_folder, StepByStepModule, fast=True).eval()
    batch = next(iter(ItemData(module).val_dataloader()))
    with torch.no_grad():
        with module.fast_path.sharing(batch):
            inside = module.task_losses(batch, module.active_tasks)
            alone = module.task_loss(batch, "rationale")
            # backwards, and a task that is not of the batch
            turned = module.task_losses(batch, module.active_tasks[::-1])
        with torch.no_grad():
            for parameter in module.student.encoder.parameters():
                parameter.mul_(1.5)
        outside = module.task_losses(batch, module.active_tasks)
    assert float(alone) == pytest.approx(float(inside["rationale"]), rel=1e-5)
    for task in module.active_tasks:
        assert float(turned[task]) == pytest.approx(float(inside[task]), rel=1e-5)
        assert float(outside[task]) != pytest.approx(float(inside[task]), rel=1e-5)


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


def test_choices(student_folder: Path) -> None:
    found = []
    choices = [("yes", "no", "a b", "cat dog red blue"), ("a", "b"), (), ("c d e", "d", "?"), ("no", "yes")]
    for fast in (True, False):
        module = evaluate(student_folder, StepByStepModule, fast=fast).eval()
        batch = next(iter(ItemData(module, batch_size=5).val_dataloader()))
        with torch.no_grad():
            found.append(score_choices(module, batch["label"], choices))
            with module.fast_path.sharing(batch):
                assert score_choices(module, batch["label"], choices) == found[-1]
    assert found[0] == found[1]


def test_while_training_generation_goes_the_plain_way(student_folder: Path) -> None:
    module = make(student_folder, StandardModule, fast=True, dropout=0.3, max_label_length=4)
    inputs = batch_of(module)["label"]
    assert not module.fast_path.decodes([inputs])
    assert module.eval().fast_path.decodes([inputs])


def test_beams_go_the_plain_way(student_folder: Path) -> None:
    texts = []
    for fast in (True, False):
        module = evaluate(student_folder, StandardModule, fast=fast, num_beams=3).eval()
        texts.append(generate_texts(module, "label", batch_of(module)["label"]))
    assert texts[0] == texts[1]


def test_settings_beyond_greedy_go_the_plain_way(student_folder: Path) -> None:
    texts = []
    for fast in (True, False):
        module = evaluate(student_folder, StepByStepModule, fast=fast).eval()
        module.student.generation_config.no_repeat_ngram_size = 1
        texts.append(generate_texts(module, "rationale", batch_of(module)["rationale"]))
    assert texts[0] == texts[1]
    assert all(len(set(text.split())) == len(text.split()) for text in texts[0])


class Sharing(pl.Callback):
    """What is shared while nothing is evaluated."""

    def __init__(self) -> None:
        self.found: list[object] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: object) -> None:
        assert isinstance(pl_module, DistillModule)
        self.found.append(pl_module.fast_path._shared)


def test_nothing_is_shared_between_batches(student_folder: Path) -> None:
    module = evaluate(student_folder, StepByStepModule, fast=True)
    seen = Sharing()
    trainer = make_trainer(limit_val_batches=1.0, callbacks=[seen])
    trainer.validate(module, datamodule=ItemData(module), verbose=False)
    assert seen.found == [None] * 3
