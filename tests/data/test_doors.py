"""What tasks and rows are for, shown without a line of the package changed: the overlays, on a user's own data."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_distill.batch import IGNORE_INDEX, TaskBatch
from lit_distill.data import JSONLDataModule
from lit_distill.data.batches import EpochSampler
from lit_distill.errors import UserError
from lit_distill.tasks import tasks_from
from tests.data.conftest import WriteLines
from tests.runs import CONFIGS, metric_rows, run, run_folders

ROWS = 12
PAIR = ["label", "rationale"]


def overlay(name: str) -> dict[str, Any]:
    """The tasks of an overlay."""
    found: dict[str, Any] = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())["model"]["init_args"][
        "tasks"
    ]
    return found


def texts(batch: TaskBatch, task: str) -> list[str]:
    """The targets of a task as text: the tokens are character codes."""
    rows = batch[task]["labels"].tolist()
    return ["".join(chr(token) for token in row if token not in (1, IGNORE_INDEX)) for row in rows]


def test_chain_of_thought_and_program(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    lines = [
        {"input": f"{i} plus 2 ?", "label": f"( {i} + 2 )", "rationale": f"add {i}", "code": f"x = {i}\nx + 2"}
        for i in range(ROWS)
    ]
    train = write_lines(tmp_path / "train.jsonl", lines)
    tasks = {"label": {"prefix": "predict: "}, "rationale": {"prefix": "explain: "}, **overlay("mixed")}
    module = JSONLDataModule(
        train=train, val=train, outputs={"code": "program"}, metric="equation", tokenizer=tokenizer, tasks=tasks
    )
    module.setup("fit")
    batch = next(iter(module.val_dataloader()))
    by_row = dict(zip(batch["program"]["index"].tolist(), texts(batch, "program"), strict=True))
    assert by_row == {i: f"x = {i}\nx + 2" for i in range(ROWS)}
    assert sorted(texts(batch, "rationale")) == sorted(f"add {i}" for i in range(ROWS))
    # the answer in a program is its value, which the metric takes for the equation's
    said = module.tasks["program"].read(by_row[3])
    assert said.label == "5"
    assert module.teacher_agrees(str(said.label), "( 3 + 2 )")
    assert module.tasks["program"].read("import os").label is None


def test_seven_styles(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines) -> None:
    styles = overlay("styles")
    assert len(styles) == 7
    # the last row was not asked about in all styles
    lines = [
        {
            "input": f"in {i}",
            "label": "yes",
            **{f"in_{style}": f"{style} {i}" for style in list(styles)[: 7 if i < 3 else 2]},
        }
        for i in range(4)
    ]
    train = write_lines(tmp_path / "train.jsonl", lines)
    module = JSONLDataModule(
        train=train,
        val=train,
        outputs={f"in_{style}": style for style in styles},
        tokenizer=tokenizer,
        tasks={"label": {"prefix": "predict: "}, **styles},
    )
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert sorted(texts(batch, "knowledge")) == [f"knowledge {i}" for i in range(4)]
    assert sorted(texts(batch, "question")) == [f"question {i}" for i in range(3)]
    assert list(batch) == ["label", *styles]
    assert len(tasks_from(styles)) == len({task.prefix for task in tasks_from(styles).values()}) == 7


def test_answers_hold_the_rationales_that_the_task_is_trained_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    lines = [{"input": f"in {i}", "label": "yes", "code": f"c {i}", "why": [f"w {i}", "-"]} for i in range(4)]
    train = write_lines(tmp_path / "train.jsonl", lines)
    module = JSONLDataModule(
        train=train, val=train, outputs={"code": "program", "why": "rationale"}, tokenizer=tokenizer, tasks=PAIR
    )
    assert module.answer_key("val").rationales == [f"w {i}" for i in range(4)]


@pytest.mark.parametrize(
    ("task", "needs"),
    [
        ({"select": "vote"}, "select: vote"),
        ({"target": "{sure}: {rationale}"}, "{sure}"),
    ],
)
def test_outputs_that_lack_what_a_task_needs(
    task: dict[str, Any], needs: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    train = write_lines(tmp_path / "t.jsonl", [{"input": "in", "label": "yes", "rationale": "why"}])
    tasks = {"label": {}, "q": {"prefix": "q: ", "target": "{rationale}", **task}}
    with pytest.raises(
        UserError, match=f"^tasks: q has no target in train: .*{needs}.* needs teacher outputs of kind rationale;"
    ):
        JSONLDataModule(train=train, val=train, tokenizer=tokenizer, tasks=tasks).setup("fit")


def sampled(
    tokenizer: PreTrainedTokenizerFast, folder: Path, write_lines: WriteLines, **arguments: Any
) -> JSONLDataModule:
    """Rows of five samples each."""
    lines = [{"input": f"in {i}", "label": "yes", "rationale": [f"{i}:{k}" for k in range(5)]} for i in range(ROWS)]
    train = write_lines(folder / "train.jsonl", lines)
    arguments = {"tasks": PAIR, "select": "sample"} | arguments
    module = JSONLDataModule(train=train, val=train, tokenizer=tokenizer, batch_size=4, **arguments)
    module.setup("fit")
    return module


def seen(loader: DataLoader[Any], epoch: int) -> list[list[str]]:
    """The samples of each batch of an epoch."""
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    return [texts(batch, "rationale") for batch in loader]


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"batching": "by_length"}])
def test_five_samples_a_row(
    arguments: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    module = sampled(tokenizer, tmp_path, write_lines, **arguments)
    loader = module.train_dataloader()
    epochs = [seen(loader, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(int(text.partition(":")[0]) for batch in epoch for text in batch) == list(range(ROWS))
    drawn = [sorted(text for batch in epoch for text in batch) for epoch in epochs]
    assert all(one != other for i, one in enumerate(drawn) for other in drawn[:i])
    # the same again, and the same after a stop in the middle of an epoch
    again = sampled(tokenizer, tmp_path, write_lines).train_dataloader() if not arguments else module.train_dataloader()
    assert seen(again, 2) == epochs[2]
    resumed: Any = module.train_dataloader()
    resumed.load_state_dict({"epoch": 2, "batches": 2})
    assert [texts(batch, "rationale") for batch in resumed] == epochs[2][2:]
    # evaluation does not draw
    val = [text for batch in module.val_dataloader() for text in texts(batch, "rationale")]
    assert all(text.endswith(":0") for text in val)
    other_seed = sampled(tokenizer, tmp_path, write_lines, seed=1).train_dataloader()
    assert sorted(text for batch in seen(other_seed, 0) for text in batch) != drawn[0]


def test_two_ranks_draw_as_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines) -> None:
    module = sampled(tokenizer, tmp_path, write_lines)
    alone = sorted(text for batch in seen(module.train_dataloader(), 3) for text in batch)
    rows = module.train_dataloader().dataset
    both = []
    for rank in range(2):
        sampler = EpochSampler(rows, 2, rank, seed=module.seed)
        sampler.set_epoch(3)
        loader = DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=module.train_dataloader().collate_fn)
        both += [text for batch in loader for text in texts(batch, "rationale")]
    assert sorted(both) == alone


def test_they_train(
    student_folder: Path, tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        {"id": f"r{i}", "input": f"{i}", "label": f"{i}", "rationale": [f"{i}", "0"], "code": f"{i}"} for i in range(6)
    ]
    train = write_lines(tmp_path / "train.jsonl", lines)
    config = {
        "model": {
            "class_path": "StepByStepModule",
            "init_args": {
                "student": str(student_folder),
                "from_scratch": True,
                "tasks": overlay("mixed"),
            },
        },
        "data": {
            "class_path": "JSONLDataModule",
            "init_args": dict.fromkeys(("train", "val", "test"), str(train))
            | {"outputs": {"code": "program"}, "batch_size": 3, "select": "sample"},
        },
        "trainer": {"max_steps": 4, "accelerator": "cpu"},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    run("fit", "--config", "config.yaml")
    (folder,) = run_folders()
    losses = [row for row in metric_rows(folder) if row.get("val/program_loss")]
    assert losses


def test_rows_without_a_label_have_their_teacher_s_text_in_the_input(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    rows = [{"input": f"in {i}", "label": "yes", "rationale": f"why {i}"} for i in range(3)]
    asked = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    module = JSONLDataModule(
        train=write_lines(tmp_path / "train.jsonl", rows),
        predict=write_lines(tmp_path / "asked.jsonl", asked),
        tokenizer=tokenizer,
        tasks={"label": {"input": "{input}: {rationale}"}},
    )
    module.setup("predict")
    sources = next(iter(module.predict_dataloader()))["label"]["input_ids"].tolist()
    assert sorted(tokenizer.batch_decode(sources, skip_special_tokens=True)) == [f"in {i}: why {i}" for i in range(3)]


def test_a_row_that_occurs_often_has_no_rationale_of_its_own(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    rows = [{"id": str(i), "input": f"in {i}", "label": "yes", "rationale": f"why {i}"} for i in range(20)]
    weights = [{"id": str(i), "weight": 20 if i == 3 else 1} for i in range(20)]
    module = JSONLDataModule(
        train=write_lines(tmp_path / "train.jsonl", rows),
        tokenizer=tokenizer,
        tasks=PAIR,
        row_weights=write_lines(tmp_path / "weights.jsonl", weights),
        rationale_pairing="shuffled",
    )
    assert all(row.input[3:] != str(row.rationale)[4:] for row in module.used_rows("train").rows)


def test_other_draws_have_other_lengths(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    lines = [{"input": "in", "label": "yes", "rationale": ["so", "why"]} for _ in range(3)]
    train, found = write_lines(tmp_path / "train.jsonl", lines), []
    for draws in (1, 2):
        tasks = {"rationale": {"select": "sample", "draws": draws}, "label": {"prefix": "predict: "}}
        module = JSONLDataModule(train=train, val=train, tokenizer=tokenizer, tasks=tasks)
        module.setup("fit")
        found.append(module.tokenized("train").lengths(evaluation=False)[0])
    # the source "in" with each of the samples, one of which is the longer one
    assert found[1] - found[0] == len("in") + 1 + len("so") + 1
