"""How ``fit`` ends: one test of the best checkpoint, the saved student, the table."""

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lit_distill.commands.report import metrics_table, report
from lit_distill.evaluation.answers import Answer, AnswerKey, Evaluation, chance_level
from lit_distill.modules import StepByStepModule
from tests.runs import (
    metric_rows,
    run,
    run_folders,
    small_model,
    small_toy,
    small_trainer,
    toy_data,
    write_lines,
)
from tests.students import make_student_folder

pytestmark = pytest.mark.usefixtures("here")


def judged(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> list[str]:
    """Make the evaluations' accuracies these, in order; returns a list that the tested splits are added to."""
    given = iter(accuracies)
    tested: list[str] = []

    def summarise(answers: object, key: object, *, rationales: bool, intervals: bool) -> dict[str, float]:
        # intervals are asked for on test only
        if not intervals:
            return {"accuracy": next(given)}
        tested.append("test")
        return {"accuracy": 0.625, "accuracy_low": 0.25, "accuracy_high": 0.875}

    monkeypatch.setattr("lit_distill.modules.evaluating.summarise", summarise)
    return tested


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("student.model."): weight for name, weight in state.items()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fit_tests_and_saves_the_best_not_the_last(
    tied: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = make_student_folder(here / "student", tie_word_embeddings=tied)
    tested = judged(monkeypatch, [0.25, 0.75, 0.5])
    run("fit", small_toy(student, steps=3), "--model.learning_rate=0.05")
    [folder] = run_folders()
    shutil.rmtree(student)

    assert tested == ["test"]
    rows = metric_rows(folder)
    assert [row["val/accuracy"] for row in rows if "val/accuracy" in row] == ["0.25", "0.75", "0.5"]
    [row] = [row for row in rows if "test/accuracy" in row]
    best = folder / "checkpoints" / "best-step2.ckpt"
    assert {path.name for path in best.parent.iterdir()} == {best.name, "last.ckpt"}
    # the loss is that of the best's weights, whatever the accuracy is said to be
    assert float(row["test/loss"]) == pytest.approx(plain_test_loss(best), rel=1e-4)

    saved: Any = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    module: Any = StepByStepModule.load_from_checkpoint(best)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "student")
    inputs = tokenizer(["predict: cat dog ?", "explain: red blue a b"], padding=True, return_tensors="pt")
    starts = torch.tensor([[0, 17, 18], [0, 3, 4]])
    with torch.no_grad():
        logits = saved.eval()(**inputs, decoder_input_ids=starts).logits
        expected = module.student.model.eval()(**inputs, decoder_input_ids=starts).logits
    assert torch.equal(logits, expected)
    kept, last = weights(best), weights(folder / "checkpoints" / "last.ckpt")
    assert torch.equal(saved.shared.weight, kept["shared.weight"])
    assert torch.equal(saved.lm_head.weight, kept["lm_head.weight"])
    assert not torch.equal(last["shared.weight"], kept["shared.weight"])
    assert torch.equal(kept["shared.weight"], kept["lm_head.weight"]) == tied

    config = json.loads((folder / "student" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["prefix"] == "predict: "
    assert config["task_specific_params"] == {
        "label": {"prefix": "predict: ", "max_new_tokens": 3, "num_beams": 1},
        "rationale": {"prefix": "explain: ", "max_new_tokens": 4, "num_beams": 1},
    }
    generation = json.loads((folder / "student" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 3
    assert not generation.get("do_sample", False)

    card = (folder / "student" / "README.md").read_text()
    for part in (
        "# student trained on toy with StepByStep",
        "| accuracy | 0.6250 | 0.2500 to 0.8750 |",
        "| rationale_weight | 1.0 |",
    ):
        assert part in card
    for part in (
        "| rationale_weight | 1.0 |",
        "| label_source | gold |",
        "| splits.train.used | 12 |",
        "| learning_rate | 0.0500 |",
    ):
        assert part in card
    run_the_cards_code(card, folder / "student", monkeypatch)

    out = capsys.readouterr().out
    assert f"  {folder / 'student'}\n" in out
    assert re.search(r"accuracy\s.*0\.625.*0\.250 to 0\.875", out)
    assert "sample 3 of test" in out
    assert "sample 4" not in out
    # four choices, all of them equally likely
    assert re.search(r"chance: a uniform guess\s.*0\.250", out)


def plain_test_loss(checkpoint: Path) -> float:
    """The two cross-entropies over all test rows, each a mean over all its tokens, from a plain forward pass a row."""
    from lit_distill.data.toy import toy_example

    module: Any = StepByStepModule.load_from_checkpoint(checkpoint)
    model, tokenizer = module.student.model.eval(), module.tokenizer
    sums = {"label": [0.0, 0], "rationale": [0.0, 0]}
    for position in range(5):
        row = toy_example(0, "test", position)
        for task, prefix, target in (("label", "predict: ", row.label), ("rationale", "explain: ", row.rationale)):
            labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                loss = model(**tokenizer(prefix + row.input, return_tensors="pt"), labels=labels).loss
            sums[task][0] += loss.item() * labels.numel()
            sums[task][1] += labels.numel()
    return sum(total / count for total, count in sums.values())


def run_the_cards_code(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's five lines run in its folder."""
    found = re.search(r"```python\n(.+?)```", card, re.DOTALL)
    assert found is not None
    code = found.group(1)
    assert len(code.splitlines()) <= 5
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "card", "exec"), {})  # noqa: S102 - our own card


def test_without_a_test_the_best_is_saved_all_the_same(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = judged(monkeypatch, [0.5, 0.25])
    run("fit", small_toy(student_folder), "--test_after_fit=false", "--checkpoint.dirpath=mine/checkpoints")
    assert not tested
    assert not [row for row in metric_rows(run_folders()[0]) if "test/accuracy" in row]
    # a folder of one's own
    folder = Path("mine")
    assert (folder / "config.yaml").is_file()
    saved = load_file(folder / "student" / "model.safetensors")
    best = weights(folder / "checkpoints" / "best-step1.ckpt")
    assert torch.equal(saved["lm_head.weight"], best["lm_head.weight"])
    assert "## Metrics" not in (folder / "student" / "README.md").read_text()
    out = capsys.readouterr().out
    assert "val (4 rows)" in out
    assert "test (" not in out


def test_a_fast_run_leaves_nothing(here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", small_toy(student_folder), "--trainer.fast_dev_run=true", "--baseline_after_fit=true")
    assert not list(here.rglob("*.ckpt"))
    assert not list(here.rglob("student"))
    assert not list(here.rglob("metrics.csv"))
    assert "test (4 of 5 rows)" in capsys.readouterr().out


def test_generated_lengths_come_from_the_training_targets(
    here: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "--model=StepByStepModule", f"--model.student={student_folder}", "--model.from_scratch=true", *toy_data(),
        *small_trainer(1),
    ]  # fmt: skip
    run("fit", arguments, "--data.max_target_length=20")
    # a label is a word and the end: 2 + 1 + 4; a rationale 16 words and the end, 17 + 8 + 4, but no target is above 20
    [folder] = run_folders()
    assert json.loads((folder / "student" / "generation_config.json").read_text())["max_new_tokens"] == 7
    asked: list[dict[str, int]] = []
    plain = StepByStepModule.generation_settings

    def spy(self: StepByStepModule, task: str) -> dict[str, int]:
        asked.append({task: plain(self, task)["max_new_tokens"]})
        return plain(self, task)

    monkeypatch.setattr(StepByStepModule, "generation_settings", spy)
    [best] = (folder / "checkpoints").glob("best*.ckpt")
    exported = ["--model.from_scratch=false", f"--model.student={folder / 'student'}"]
    # of the checkpoint, whatever data it is tested on; as they are given
    for more, label, rationale in (
        ([f"--ckpt_path={best}", "--data.max_target_length=5"], 7, 20),
        ([*exported, "--model.max_label_length=64", "--model.max_rationale_length=3"], 64, 3),
        (["--trainer.max_steps=2", f"--ckpt_path={best}", "--data.max_target_length=6"], 7, 20),
    ):
        asked.clear()
        run("fit" if "--trainer.max_steps=2" in more else "test", arguments, more)
        assert {"label": label} in asked
        assert {"rationale": rationale} in asked
        assert all(found in ({"label": label}, {"rationale": rationale}) for found in asked)


def test_without_checkpoints_the_last_weights_are_tested(here: Path, student_folder: Path) -> None:
    run("fit", small_toy(student_folder), "--trainer.enable_checkpointing=false")
    [folder] = run_folders()
    assert not list(here.rglob("*.ckpt"))
    assert not list(here.rglob("student"))
    rows = metric_rows(folder)
    assert sum("test/accuracy" in row for row in rows) == 1


def test_a_checkpoint_is_evaluated_without_its_original_student(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = make_student_folder(here / "student")
    arguments = small_toy(student)
    run("fit", arguments)
    [folder] = run_folders()
    shutil.rmtree(student)
    best = next((folder / "checkpoints").glob("best-step*.ckpt"))
    for command, split in (("validate", "val"), ("test", "test")):
        # val's is the row of the step that the best checkpoint was written at
        step = int(best.stem.removeprefix("best-step")) - 1
        rows = [row for row in metric_rows(folder) if f"{split}/loss" in row]
        wanted = rows[0] if split == "test" else next(row for row in rows if int(row["step"]) == step)
        capsys.readouterr()
        run(command, arguments, f"--ckpt_path={best}")
        [again] = [row for row in metric_rows(run_folders()[-1]) if f"{split}/loss" in row]
        for name in (f"{split}/loss", f"{split}/accuracy", f"{split}/label_loss"):
            assert float(again[name]) == pytest.approx(float(wanted[name]), rel=1e-6)
        assert f"{split} (" in capsys.readouterr().out


def answer_key(labels: list[str | None], choices: list[tuple[str, ...]] | None, majority: str | None) -> AnswerKey:
    texts = [str(number) for number in range(len(labels))]
    return AnswerKey(
        ids=texts, inputs=texts, labels=labels, rationales=[None] * len(labels), metric="exact_match", label_set=None,
        choices=choices,
        majority_label=majority,
    )  # fmt: skip


def evaluation(key: AnswerKey, rows: Sequence[int] | None = None, **metrics: float) -> Evaluation:
    own = range(len(key)) if rows is None else rows
    return Evaluation("test", metrics, [], key, [Answer(row, "", "") for row in own])


def test_chance_is_the_better_of_two_and_of_the_rows_that_were_evaluated() -> None:
    key = answer_key(["a", "b", "a", None], [("a", "b"), ("a", "b", "c", "d"), ("a", "b"), ("a", "b")], "a")
    # the row without a label has no part in an accuracy
    assert chance_level(key, range(4)) == ("always 'a'", 2 / 3)
    assert chance_level(key, [1]) == ("a uniform guess", 1 / 4)
    assert chance_level(key, [0, 1]) == ("always 'a'", 1 / 2)
    # as in 24 of CQA's test rows
    twice = answer_key(["a", "b"], [("a", "a", "b", "c"), ("a", "a", "b", "c")], None)
    assert chance_level(twice, range(2)) == ("a uniform guess", (2 / 4 + 1 / 4) / 2)
    rare = answer_key(["a", "b"], [("a", "b"), ("a", "b", "c", "d")], "zebra")
    assert chance_level(rare, range(2)) == ("a uniform guess", (1 / 2 + 1 / 4) / 2)
    assert chance_level(answer_key(["a"], None, None), [0]) is None
    assert chance_level(answer_key([], [], "a"), []) is None
    assert chance_level(answer_key([None], None, "a"), [0]) is None


def test_the_table_says_how_many_rows_were_evaluated() -> None:
    key = answer_key(["a", "b", "a"], None, "b")
    assert metrics_table(evaluation(key), None).title == "test (3 rows)"
    table = metrics_table(evaluation(key, [0, 2], accuracy=0.5), None)
    assert table.title == "test (2 of 3 rows)"
    assert list(table.columns[0].cells) == ["accuracy", "chance: always 'b'"]
    assert list(table.columns[1].cells) == ["0.500", "0.000"]


def test_the_table_shows_floors_and_a_line_tells_who_is_below(capsys: pytest.CaptureFixture[str]) -> None:
    floors = {"words": 0.25, "second_part_words": 0.75}
    table = metrics_table(evaluation(answer_key(["a"], None, None), accuracy=0.5), None, floors)
    rows = [list(column.cells) for column in table.columns]
    assert rows[0] == ["accuracy", "floor: words of the input", "floor: words of its second part"]
    assert rows[1] == ["0.500", "0.250", "0.750"]
    for accuracy, told in ((0.5, True), (0.75, False)):
        tested = evaluation(answer_key(["a"], None, None), accuracy=accuracy)
        report(SimpleNamespace(evaluation=tested), floors=floors)  # type: ignore[arg-type]  # all that it reads
        out = " ".join(capsys.readouterr().out.split())
        assert ("accuracy 0.500 is below the floor, 0.750: nothing was learned" in out) == told


def test_without_a_test_the_saved_student_stands_beside_that_of_the_last_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = dataclasses.replace(evaluation(answer_key(["a"], None, None), accuracy=0.5), split="val")
    module: Any = SimpleNamespace(evaluation=last)
    for accuracy, told in ((0.7, True), (0.8, False)):
        report(module, floors={"words": 0.75}, best={"val/accuracy": accuracy, "step": 10})
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"accuracy of the saved student (step 10) {accuracy:.3f}" in out
        assert ("is below the floor" in out) == told
    # the saved student is the one that was tested
    module.evaluation = dataclasses.replace(last, split="test")
    report(module, best={"val/accuracy": 0.7, "step": 10})
    assert "saved" not in capsys.readouterr().out


def test_the_table_names_the_worst_group() -> None:
    key = dataclasses.replace(answer_key(["a", "b", "", "c"], None, None), groups=["x", "[y]", "x", "[y]"])
    table = metrics_table(evaluation(key, worst_group_accuracy=0.0), None)
    # the answers are empty: right in one of two rows of x, and in none of [y]
    assert list(table.columns[0].cells) == ["worst group accuracy (\\[y])"]


def test_the_table_shows_intervals_once_and_the_baseline_beside() -> None:
    metrics = {"loss": 1.25, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "own_loss": 2.0}
    baseline = {"test/accuracy": 0.3, "test/accuracy_low": 0.2, "test/accuracy_high": 0.45}
    table = metrics_table(Evaluation("test", metrics, [], answer_key(["a", "b"], None, None)), baseline)
    console = Console(width=120, record=True, quiet=True)
    console.print(table)
    cells = [list(column.cells) for column in table.columns]
    assert [list(row) for row in zip(*cells, strict=True)] == [
        ["accuracy", "0.500", "0.400 to 0.600"],
        ["loss", "1.250", ""],
        ["own loss", "2.000", ""],
        ["accuracy of the label-only baseline", "0.300", "0.200 to 0.450"],
    ]


def test_samples_that_look_like_markup_are_printed_as_they_are(
    here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input": f"[/red] {i} [bold]", "label": "[/cat]"} for i in range(12)]
    write_lines(here / "mine.jsonl", rows)
    data = ["--data=JSONLDataModule", "--data.train=mine.jsonl", "--data.test=mine.jsonl", "--data.batch_size=4"]
    run("fit", small_model(student_folder, "StandardModule"), data, small_trainer(1))
    assert "[/red] 0 [bold]" in capsys.readouterr().out
