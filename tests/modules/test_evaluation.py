"""From a student's answers to the metrics of an evaluation."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_distill.data import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Answer, AnswerKey, Split, answer_row, summarise, worst_group
from lit_distill.modules import DistillModule, SingleTaskModule, StandardModule, StepByStepModule
from lit_distill.objectives import Step
from lit_distill.students.seq2seq import Seq2SeqPass
from lit_distill.tasks import Row as TaskRow
from lit_distill.tasks import TeacherOutput
from tests.modules.batches import PADDING_ROW, Row, RowsData, random_rows
from tests.modules.running import make_trainer, plain_terms
from tests.students import WORDS

# the settings of all methods are the same, also of the one that has no rationales
pytestmark = pytest.mark.filterwarnings("ignore:evaluate_rationales. StandardModule writes no rationales")


def ids(text: str) -> list[int]:
    return [*(WORDS.index(word) for word in text.split()), 1]


# label and rationale of different lengths, answers that need the source
ITEMS = [
    ("cat red", "yes", "the cat is red because yes"),
    ("dog red", "no", "dog is no cat because no"),
    ("cat blue", "a b", "cat is blue because a b"),
    ("dog blue", "c", "dog blue c"),
    ("cat dog", "yes", "cat dog yes"),
]


def method_rows(module: DistillModule) -> list[Row]:
    rows: list[Row] = []
    for source, label, rationale in ITEMS:
        targets = {
            "label": label,
            "rationale": rationale,
            "rationale_label": f"{rationale} So the answer is {label}",
            "label_rationale": f"{label} Rationale: {rationale}",
        }
        rows.append({name: (ids(f"{task.prefix}{source}"), ids(targets[name])) for name, task in module.tasks.items()})
    return rows


class ItemData(RowsData):
    """The five items, with their closed choices."""

    def __init__(self, module: DistillModule, batch_size: int = 2, labels: Sequence[str | None] | None = None) -> None:
        super().__init__(method_rows(module), batch_size, module.tasks)
        self.labels = [item[1] for item in ITEMS] if labels is None else labels
        self.task = module.answer_task

    def _collate_evaluation(self, items: Any) -> Any:
        return super()._collate_evaluation([(i, {"label": row[self.task], **row}) for i, row in items])

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def answer_key(self, split: Split) -> AnswerKey:
        return item_key(self.labels)


def item_key(labels: Sequence[str | None], **changes: Any) -> AnswerKey:
    key = AnswerKey(
        ids=[f"row {i}" for i in range(len(ITEMS))],
        inputs=[source for source, _, _ in ITEMS],
        labels=labels,
        rationales=[rationale for _, _, rationale in ITEMS],
        metric="exact_match",
        label_set=None,
        choices=[("yes", "no", "a b"), ("yes", "no"), ("a b", "a"), ("c", "d"), ("yes", "no")],
        majority_label=None,
    )
    return dataclasses.replace(key, **changes)


@pytest.fixture(scope="module", params=["standard", "step_by_step", "rationale_first", "label_first"])
def overfitted(request: pytest.FixtureRequest, student_folder: Path) -> DistillModule:
    settings: dict[str, Any] = {
        "from_scratch": True, "learning_rate": 1e-2, "max_label_length": 6, "max_rationale_length": 12,
        "evaluate_rationales": True, "lr_schedule": "constant",
    }  # fmt: skip
    torch.manual_seed(7)
    module: DistillModule
    if request.param == "standard":
        module = StandardModule(student_folder, **settings)
    elif request.param == "step_by_step":
        module = StepByStepModule(student_folder, **settings)
    else:
        module = SingleTaskModule(student_folder, order=request.param, **settings)
    make_trainer(max_steps=100, max_epochs=-1).fit(module, datamodule=ItemData(module, batch_size=5))
    return module


def test_an_overfitted_student_answers_right(overfitted: DistillModule) -> None:
    trainer = make_trainer()
    data = ItemData(overfitted)
    (found,) = trainer.test(overfitted, datamodule=data, verbose=False)
    assert found["test/accuracy"] == 1.0
    assert found["test/accuracy_high"] == 1.0
    # Wilson by hand: n / (n + z**2) at all right, z = 1.96
    assert found["test/accuracy_low"] == pytest.approx(5 / (5 + 1.959964**2), rel=1e-5)
    if overfitted.answer_task == "label":
        assert found["test/scored_accuracy"] == 1.0
    if overfitted.rationale_task is not None:
        assert found["test/rouge_l"] == pytest.approx(1.0)
        assert found["test/rationale_ends_in_prediction"] == 1.0
    predictions: Any = trainer.predict(overfitted, datamodule=data)
    answers = [answer for batch in predictions for answer in batch]
    assert [answer.prediction for answer in answers] == [label for _, label, _ in ITEMS]
    if overfitted.rationale_task is not None:
        assert [answer.rationale for answer in answers] == [rationale for _, _, rationale in ITEMS]


def test_each_metric_has_its_interval_in_test_only(overfitted: DistillModule) -> None:
    expected = {"accuracy"}
    expected |= {"scored_accuracy"} if overfitted.answer_task == "label" else set()
    expected |= {"rouge_l", "rationale_ends_in_prediction"} if overfitted.rationale_task else set()
    losses = {"loss", *(f"{task}_loss" for task in overfitted.tasks)}
    data = ItemData(overfitted)
    (found,) = make_trainer().test(overfitted, datamodule=data, verbose=False)
    ends = {f"{name}_{end}" for name in expected for end in ("low", "high")}
    assert found.keys() == {f"test/{name}" for name in expected | ends | losses | {"tokens"}}
    (found,) = make_trainer(limit_val_batches=1.0).validate(overfitted, datamodule=data, verbose=False)
    assert found.keys() == {f"val/{name}" for name in expected | losses | {"tokens"}}


def test_rows_without_labels(overfitted: DistillModule) -> None:
    data = ItemData(overfitted, labels=[None, "no", None, "wrong", None])
    (found,) = make_trainer().test(overfitted, datamodule=data, verbose=False)
    assert found["test/accuracy"] == 0.5
    nothing = ItemData(overfitted, labels=[None] * 5)
    (found,) = make_trainer().test(overfitted, datamodule=nothing, verbose=False)
    assert "test/accuracy" not in found
    key = nothing.answer_key("test")
    row = answer_row(Answer(1, "no", "no"), key)
    assert row == {"id": "row 1", "input": "dog red", "label": None, "prediction": "no", "correct": None,
                   "rationale": None, "tokens": 0}  # fmt: skip


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_val_loss_is_the_token_mean_over_the_split(student_folder: Path, batch_size: int) -> None:
    rows = random_rows(7, seed=61, without_rationale=(1, 2))
    torch.manual_seed(7)
    module = StepByStepModule(student_folder, from_scratch=True, rationale_weight=0.3, max_rationale_length=3)
    (found,) = make_trainer(limit_val_batches=1.0).validate(
        module, datamodule=RowsData(rows, batch_size, module.tasks), verbose=False
    )
    with torch.no_grad():
        terms = {
            task: float(term)
            for task, term in plain_terms(cast(Any, module.student.model), rows, tuple(module.tasks)).items()
        }
    assert found["val/label_loss"] == pytest.approx(terms["label"], rel=1e-5)
    assert found["val/rationale_loss"] == pytest.approx(terms["rationale"], rel=1e-5)
    assert found["val/loss"] == pytest.approx(terms["label"] + 0.3 * terms["rationale"], rel=1e-5)


def test_a_split_without_rationales_has_no_rationale_loss(student_folder: Path) -> None:
    rows = random_rows(3, without_rationale=range(3))
    module = StepByStepModule(student_folder, from_scratch=True, max_rationale_length=3)
    data = RowsData(rows, 2, module.tasks)
    (found,) = make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert "val/rationale_loss" not in found
    assert found["val/loss"] == found["val/label_loss"] > 0
    assert module.evaluation is not None
    assert "rationale_loss" not in module.evaluation.metrics


def test_a_step_without_rationales_logs_no_rationale_loss(student_folder: Path, tmp_path: Path) -> None:
    # the second of three steps has no rationale, and the third has
    rows = random_rows(6, without_rationale=(2, 3))
    module = StepByStepModule(student_folder, from_scratch=True)
    logger = CSVLogger(tmp_path)
    make_trainer(logger=logger, log_every_n_steps=1).fit(module, datamodule=RowsData(rows, 2, module.tasks))
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [bool(row["train/rationale_loss"]) for row in found] == [True, False, True]
    assert found[1]["train/loss"] == found[1]["train/label_loss"]


# ------------------------------------------------------------------------------------------------ state


def test_a_sanity_check_leaves_no_trace(student_folder: Path) -> None:
    class AtStart(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert isinstance(pl_module, DistillModule)
            assert pl_module.evaluation is None
            assert trainer.callback_metrics == {}

    module = StandardModule(student_folder, from_scratch=True, max_label_length=2)
    data = ItemData(module)
    trainer = make_trainer(num_sanity_val_steps=2, limit_val_batches=1.0, callbacks=[AtStart()])
    trainer.fit(module, datamodule=data)
    assert module.evaluation is not None
    found = dict(module.evaluation.metrics)
    # a sanity check's batches would count twice in the first real evaluation
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert module.evaluation.metrics == pytest.approx(found)
    assert len(module.evaluation.samples) == 5


def test_an_evaluation_that_was_stopped_leaves_no_trace(student_folder: Path) -> None:
    class Stops(pl.Callback):
        def on_validation_batch_end(self, *rest: object) -> None:
            raise RuntimeError("stopped")

    module = StandardModule(student_folder, from_scratch=True, max_label_length=2)
    data = ItemData(module)
    with pytest.raises(RuntimeError, match="stopped"):
        make_trainer(limit_val_batches=1.0, callbacks=[Stops()]).validate(module, datamodule=data, verbose=False)
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert module.evaluation is not None
    found, samples = dict(module.evaluation.metrics), module.evaluation.samples
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert found == module.evaluation.metrics
    assert [sample.index for sample in samples] == [0, 1, 2, 3, 4]


def test_samples_have_rationales_and_the_others_do_not(student_folder: Path) -> None:
    torch.manual_seed(7)
    module = StepByStepModule(
        student_folder, from_scratch=True, num_samples=3, max_label_length=2, max_rationale_length=3
    )
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=ItemData(module), verbose=False)
    assert module.evaluation is not None
    assert [sample.index for sample in module.evaluation.samples] == [0, 1, 2]
    assert all(sample.rationale is not None for sample in module.evaluation.samples)
    assert [row["id"] for row in module.evaluation.sample_rows()] == ["row 0", "row 1", "row 2"]
    assert "rouge_l" not in module.evaluation.metrics


def test_samples_of_several_batches_are_generated_together(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[int]]] = []

    def spy(self: DistillModule, step: Step, task: str) -> list[str]:
        asked.append((task, step.batch[task]["index"].tolist()))
        return plain(self, step, task)

    torch.manual_seed(7)
    plain = DistillModule.generate_texts
    module = StepByStepModule(student_folder, from_scratch=True, num_samples=4, max_label_length=2)
    # every row its own batch; expected: what the rows' rationales are when each is generated alone
    data = ItemData(module, batch_size=1)
    batches = list(data.val_dataloader())
    with torch.no_grad():
        expected = [module.eval().generate_texts(module.step(batch), "rationale")[0] for batch in batches[:4]]
    monkeypatch.setattr(DistillModule, "generate_texts", spy)
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert [rows for task, rows in asked if task == "rationale"] == [[0, 1, 2, 3]]
    assert module.evaluation is not None
    assert [sample.rationale for sample in module.evaluation.samples] == expected


def test_bare_loaders_cannot_be_evaluated(student_folder: Path) -> None:
    module = StandardModule(student_folder, from_scratch=True)
    loader = ItemData(module).val_dataloader()
    with pytest.raises(UserError, match=r"^datamodule: evaluation needs the data's answers"):
        make_trainer(limit_val_batches=1.0).validate(module, loader, verbose=False)


# ------------------------------------------------------------------------------------------------ generation


class WithChoices(ItemData):
    choices = (("yes", "no", "a b", "cat dog red blue"), ("a", "b"), (), ("c d e", "d", "?"), ("no", "yes"))

    def answer_key(self, split: Split) -> AnswerKey:
        return item_key(self.labels, choices=list(self.choices))


@pytest.mark.parametrize("target", ["{label}", "answer is {label}", "{input} because {label}"])
def test_choices_are_scored_as_by_a_plain_loss_a_choice(student_folder: Path, target: str) -> None:
    torch.manual_seed(3)
    module = StandardModule(student_folder, from_scratch=True, tasks={"label": {"target": target}}).eval()
    # far from uniform, so that the likeliest choice is not the shortest each time
    with torch.no_grad():
        module.student.model.lm_head.weight.mul_(12)
    data = WithChoices(module, batch_size=5)
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        found = [
            answer.scored for answer in module.answers(module.step(batch), data.answer_key("val"), rationales=False)
        ]
        expected: list[str | None] = []
        for row, own in enumerate(data.choices):
            source = torch.tensor([data.rows[row]["label"][0]])
            scores = []
            for choice in own:
                labels = torch.tensor([ids(target.format(label=choice, input=ITEMS[row][0]))])
                scores.append(-float(module.student.model(input_ids=source, labels=labels).loss) * labels.shape[1])
            expected.append(own[scores.index(max(scores))] if own else None)
    assert found == expected
    assert len({own.index(choice) for own, choice in zip(data.choices, found, strict=True) if choice}) > 1


@pytest.mark.parametrize("fast", [True, False])
def test_generation_is_the_plain_greedy_loop(student_folder: Path, fast: bool) -> None:
    torch.manual_seed(5)
    module = StandardModule(student_folder, from_scratch=True, max_label_length=6, fast=fast).eval()
    with torch.no_grad():
        module.student.model.lm_head.weight.mul_(8)
        # so that some answers end early
        module.student.model.lm_head.weight[1] = module.student.model.lm_head.weight[4:9].sum(0)
    data = ItemData(module, batch_size=5)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        found = module.answers(module.step(batch), data.answer_key("val"), rationales=False)
        for row, answer in enumerate(found):
            source, written = torch.tensor([data.rows[row]["label"][0]]), [0]
            while len(written) < 7 and written[-1] != 1:
                logits = module.student.model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits
                written.append(int(logits[0, -1].argmax()))
            assert answer.text == " ".join(WORDS[i] for i in written if i > 2)
            assert answer.tokens == len(written) - 1
    assert len({answer.tokens for answer in found}) > 1


@pytest.mark.parametrize(
    ("limits", "given", "expected"),
    [
        ({"label": 19, "rationale": 100}, {}, {"label": 19, "rationale": 100}),
        ({"label": 19, "rationale": 100}, {"max_label_length": 64}, {"label": 64, "rationale": 100}),
        # neither trained here nor given: what was the default ever since
        ({}, {}, {"label": 64, "rationale": 256}),
        ({}, {"max_rationale_length": 7}, {"label": 64, "rationale": 7}),
    ],
)
def test_generated_lengths(
    student_folder: Path, limits: dict[str, int], given: dict[str, int], expected: dict[str, int]
) -> None:
    module = StepByStepModule(student_folder, from_scratch=True, **given)  # type: ignore[arg-type]
    module.on_load_checkpoint({"state_dict": {}, "lit_distill_target_limits": limits})
    assert {task: module.generation_settings(task)["max_new_tokens"] for task in module.tasks} == expected


def test_generated_lengths_of_one_target_with_both(student_folder: Path) -> None:
    module = SingleTaskModule(student_folder, from_scratch=True)
    assert module.generation_settings("rationale_label")["max_new_tokens"] == 64 + 256
    module.on_load_checkpoint({"state_dict": {}, "lit_distill_target_limits": {"rationale_label": 90}})
    assert module.generation_settings("rationale_label")["max_new_tokens"] == 90
    both = SingleTaskModule(student_folder, from_scratch=True, max_label_length=5, max_rationale_length=40)
    both.on_load_checkpoint({"state_dict": {}, "lit_distill_target_limits": {"rationale_label": 90}})
    assert both.generation_settings("rationale_label")["max_new_tokens"] == 45


def test_rows_that_pad_have_no_answer(student_folder: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True, max_label_length=2, max_rationale_length=2)
    data = ItemData(module, batch_size=5)
    batch = next(iter(data.val_dataloader()))
    for inputs in batch.values():
        inputs["index"][3:] = PADDING_ROW
    found = module.answers(module.step(batch), data.answer_key("val"), rationales=False)
    assert [answer.index for answer in found] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ the summary


def answers(predictions: Sequence[str], **fields: Sequence[str | None]) -> list[Answer]:
    return [
        Answer(i, text, text, **cast(Any, {name: values[i] for name, values in fields.items()}))
        for i, text in enumerate(predictions)
    ]


def test_summary_by_hand() -> None:
    key = item_key(["yes", "no", "yes", None, "no"], label_set=("yes", "no"))
    found = summarise(
        answers(["yes", "yes", "no", "yes", "no"], scored=["yes", "no", "yes", "yes", "yes"]),
        key,
        rationales=False,
        intervals=True,
    )
    assert found["accuracy"] == 0.5
    assert found["scored_accuracy"] == 0.75
    # yes: 1 right of 2 gold and 2 predicted, no likewise: F1 is 1/2 for both
    assert found["macro_f1"] == 0.5
    # Wilson's interval of 2 out of 4, by an independent calculator: 0.1500 to 0.8500
    assert found["accuracy_low"] == pytest.approx(0.1500, abs=5e-4)
    assert found["accuracy_high"] == pytest.approx(0.8500, abs=5e-4)
    assert 0 <= found["macro_f1_low"] <= 0.5 <= found["macro_f1_high"] <= 1
    assert found.keys() == {
        "tokens",
        *(f"{n}{e}" for n in ("accuracy", "scored_accuracy", "macro_f1") for e in ("", "_low", "_high")),
    }


def test_rationales_in_the_summary() -> None:
    key = item_key(["yes", "no", "a b", "c", "yes"], rationales=["the cat", "dog", None, "c", "x y"])
    written = ["the cat yes", "dog no", "red a b", None, "x z w yes ."]
    found = summarise(answers(["yes", "no", "a", "c", "yes"], rationale=written), key, rationales=True, intervals=False)
    # ROUGE-L's F by hand: 2 of 3 and 2 words, 1 of 2 and 1, 1 of 4 and 2; no reference and no text do not count
    assert found["rouge_l"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3 + 2 * 1 / 6) / 3)
    assert found["rationale_ends_in_prediction"] == 3 / 4
    assert found.keys() == {"accuracy", "rouge_l", "rationale_ends_in_prediction", "tokens"}


def test_groups_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score  # type: ignore[import-untyped]

    random, count = np.random.default_rng(3), 200
    labels = random.choice(["yes", "no", "maybe"], count, p=[0.5, 0.4, 0.1]).tolist()
    predictions = random.choice(["yes", "no", "maybe", "cat"], count, p=[0.5, 0.3, 0.1, 0.1]).tolist()
    # of one group no row is `maybe`, and three rows have no group or no label
    groups = [None, *random.choice(["a", "b", "c"], count - 1).tolist()]
    known = [(group, y, p) for group, y, p in zip(groups, labels, predictions, strict=True)][3:]
    known = [(group, "no" if group == "c" and y == "maybe" else y, p) for group, y, p in known]
    known = [(group, y, "no" if group == "c" and p == "maybe" else p) for group, y, p in known]
    key = item_key(
        [labels[0], None, None, *(y for _, y, _ in known)],
        groups=["a", "b", "c", *(group for group, _, _ in known)],
        label_set=("yes", "no", "maybe"),
    )
    key = dataclasses.replace(key, groups=[None, *cast(list[str], key.groups)[1:]])
    given = answers(["yes", "yes", "yes", *(p for _, _, p in known)])
    found = summarise(given, key, rationales=False, intervals=True)
    accuracies, scores = {}, []
    for name, present in {"a": ["yes", "no", "maybe"], "b": ["yes", "no", "maybe"], "c": ["yes", "no"]}.items():
        y, p = zip(*((y, p) for group, y, p in known if group == name), strict=True)
        accuracies[name] = accuracy_score(y, p)
        scores.append(f1_score(y, p, labels=present, average="macro", zero_division=0))
    assert len(set(accuracies.values())) == 3
    assert found["worst_group_accuracy"] == pytest.approx(min(accuracies.values()))
    assert worst_group(given, key) == pytest.approx(min(accuracies.items(), key=lambda one: one[1]))
    assert found["group_macro_f1"] == pytest.approx(np.mean(scores))
    rows = [answer_row(answer, key) for answer in given[:4]]
    assert [row.get("group") for row in rows] == [None, "b", "c", known[0][0]]


def test_without_groups_there_is_no_worst_one() -> None:
    key = item_key(["yes", "no", "yes", None, "no"], groups=[None] * 5, label_set=("yes", "no"))
    found = summarise(answers(["yes"] * 5), key, rationales=False, intervals=True)
    assert "worst_group_accuracy" not in found
    assert worst_group(answers(["yes"] * 5), key) is None
    # a label set is needed for the other
    key = item_key(["yes", "no", "yes", None, "no"], groups=["x"] * 5)
    assert summarise(answers(["yes"] * 5), key, rationales=False, intervals=False).keys() == {
        "accuracy",
        "worst_group_accuracy",
        "tokens",
    }


def test_tokens_in_the_summary() -> None:
    written = [dataclasses.replace(one, tokens=n) for one, n in zip(answers(["yes"] * 3), (1, 4, 5), strict=True)]
    # rows without a label count, too
    assert summarise(written, item_key([None, "no"] * 3), rationales=False, intervals=False)["tokens"] == 10 / 3


def test_an_empty_summary() -> None:
    key = item_key([None] * 5, label_set=("yes", "no"))
    assert summarise([], key, rationales=True, intervals=True) == {}
    assert summarise(answers(["yes"]), key, rationales=True, intervals=True) == {"tokens": 0}


def test_an_answer_after_a_rationale_follows_what_the_student_wrote(weights_folder: Path, here: Path) -> None:
    tasks = {"label": {"input": "{input} because {rationale}", "after": "rationale"}}
    module = StepByStepModule(str(weights_folder), tasks=tasks, num_samples=0)
    # the teacher's rationales are in val's sources, and what the student writes is another text
    rows = [TaskRow(f"{i}", f"cat {i} ?", "yes", ("yes", "no"), (TeacherOutput("the dog"),)) for i in range(5)]

    class Data(RationaleDataModule):
        name = "rows"

        def load_rows(self, split: str) -> list[TaskRow] | None:
            return rows if split == "val" else None

    read: dict[str, list[str]] = {"label": [], "rationale": []}
    scored: list[str] = []
    blue = cast(int, module.tokenizer.convert_tokens_to_ids("blue"))

    def recorded(step: Step, task: str, *rest: object) -> list[list[int]]:
        sources: list[list[int]] = step.batch[task]["input_ids"].tolist()
        read[task] += module.student.tokens.decode(sources)
        # the word and the row's number
        return [[blue, source[2], 1] for source in sources]

    module.generate_ids = recorded  # type: ignore[assignment, method-assign]
    score = Seq2SeqPass.score

    def recorded_score(self: Any, task: str, choices: Any) -> Any:
        scored.extend(module.student.tokens.decode(self.batch[task]["input_ids"].tolist()))
        return score(self, task, choices)

    data = Data(tokenizer=module.student.tokens, tasks=module.tasks, eval_batch_size=2, predict_split="val")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Seq2SeqPass, "score", recorded_score)
        answers = make_trainer(limit_predict_batches=2).predict(module, datamodule=data)
    assert read["rationale"] == [f"explain: cat {i} ?" for i in range(4)]
    assert read["label"] == scored == [f"predict: cat {i} ? because blue {i}" for i in range(4)]
    first = cast(list[list[Answer]], answers)[0][0]
    assert (first.prediction, first.rationale, first.tokens) == ("blue 0", "blue 0", 6)
    # samples of validation have the rationales of the answers, and none is written twice
    read["rationale"].clear()
    module.hparams["num_samples"] = 5
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data)
    assert sorted(read["rationale"]) == [f"explain: cat {i} ?" for i in range(5)]
