"""A user's own rows, from every kind of file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from transformers import PreTrainedTokenizerFast

from lit_distill.batch import IGNORE_INDEX
from lit_distill.data import JSONLDataModule
from lit_distill.data.sources import read_file
from lit_distill.errors import UserError
from tests.rows import make_row, write_rows

ROWS = [
    {"id": f"r{i}", "input": f"in {i}", "label": "b" if i % 2 else "a", "rationale": f"so {i}", "teacher_label": "a"}
    for i in range(12)
]


def as_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


def as_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


def as_json_lines(folder: Path) -> Path:
    """As some programs write it, with a byte order mark."""
    path = folder / "lines.json"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    lines = [",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


def as_parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def as_saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_dict(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "validation": rows.select([0]), "other": rows}).save_to_disk(folder / "dict")
    return folder / "dict"


WRITERS = [as_jsonl, as_json, as_json_lines, as_csv, as_parquet, as_saved, as_saved_dict]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file(write: Callable[[Path], Path], tmp_path: Path) -> None:
    rows = JSONLDataModule(train=write(tmp_path)).released("train")
    assert rows is not None
    assert rows == [
        make_row(
            row["id"], row["input"], row["label"], None, row["rationale"], row["teacher_label"], teacher="released"
        )
        for row in ROWS
    ]


def test_splits_of_a_saved_dict(tmp_path: Path) -> None:
    folder = as_saved_dict(tmp_path)
    module = JSONLDataModule(train=folder, val=folder, test=folder)
    assert module.answer_key("val").ids == ["r0"]
    with pytest.raises(UserError, match=r"test: .*dict holds train, validation, other, none of test"):
        module.released("test")


def test_what_write_examples_wrote(tmp_path: Path) -> None:
    examples = [make_row("x", "in", "a", ("a", "b"), "so", "b", teacher="released"), make_row("y", "in", None)]
    write_rows(tmp_path / "rows.jsonl", examples)
    rows = JSONLDataModule(train=tmp_path / "rows.jsonl").released("train")
    assert rows is not None
    assert rows == examples


def test_trained_and_evaluated(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    module = JSONLDataModule(
        train=as_jsonl(tmp_path),
        test=as_csv(tmp_path),
        tokenizer=tokenizer,
        tasks=("label", "rationale"),
        batch_size=20,
    )
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    (batch,) = module.train_dataloader()
    assert batch["rationale"]["labels"].shape[0] == 10  # of 12, two are val
    assert module.counts["train"]["rows"] == 10
    assert len(module.answer_key("val")) == 2
    assert sum(len(batch["label"]["index"]) for batch in module.test_dataloader()) == 12
    assert module.predict_split == "test"


def test_predict_without_labels(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "new.jsonl"
    path.write_text('{"input": "one"}\n{"input": "two"}\n')
    module = JSONLDataModule(predict=path, tokenizer=tokenizer, label_column="answer", rationale_column="why")
    module.prepare_data()
    module.setup("predict")
    (batch,) = module.predict_dataloader()
    assert batch["label"]["index"].tolist() == [0, 1]
    assert (batch["label"]["labels"] == IGNORE_INDEX).all()
    key = module.answer_key("predict")
    assert (key.ids, key.inputs, key.labels) == (["jsonl-predict-0", "jsonl-predict-1"], ["one", "two"], [None, None])
    assert key.majority_label is None
    with pytest.raises(UserError, match=r"^train: not given, so that there is no train split, and fit needs it"):
        module.setup("fit")
    with pytest.raises(UserError, match=r"^test: not given, so that there is no test split, and test needs it"):
        module.setup("test")


def test_columns_by_argument(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"n": 7, "q": "Why?", "ctx": "It is {so}.", "gold": "x", "why": " since ", "said": "y", "opts": ["x", "y"]}
    row |= {"region": 3}
    path.write_text(json.dumps(row))
    module = JSONLDataModule(
        test=path,
        train=path,
        id_column="n",
        input_template="{q}\n{ctx}",
        label_column="gold",
        rationale_column="why",
        teacher_label_column="said",
        choices_column="opts",
        group_column="region",
    )
    rows = module.released("train")
    assert rows is not None
    expected = make_row("7", "Why?\nIt is {so}.", "x", ("x", "y"), "since", "y", teacher="released")
    assert rows == [replace(expected, group="3")]
    assert module.answer_key("test").choices == [("x", "y")]
    assert module.answer_key("test").groups == ["3"]


@pytest.mark.parametrize(
    ("value", "label_set", "expected"),
    [
        (1, ["no", "yes"], "yes"),
        ("1", ["no", "yes"], "yes"),
        ("yes", ["no", "yes"], "yes"),
        (2, ["1", "2", "3"], "2"),  # a label itself, not a position
        (-1, ["no", "yes"], None),
        (1, None, "1"),
        (1.0, ["no", "yes"], "yes"),
        (float("nan"), None, None),
        ("", None, None),
        (None, None, None),
        (2.5, None, "2.5"),
    ],
)
def test_labels(value: Any, label_set: list[str] | None, expected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "x", "label": value}))
    rows = JSONLDataModule(train=path, label_set=label_set).released("train")
    assert rows is not None
    assert rows[0].label == expected


@pytest.mark.parametrize("told", ["", "{", "[]", '{"info": 3}', '{"info": {"features": {"a": {"_type": "No"}}}}'])
def test_parquet_with_what_other_tools_left_in_its_metadata(tmp_path: Path, told: str) -> None:
    path = as_parquet(tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"huggingface": told}), path)
    assert sum(map(len, read_file(path, "train").chunks())) == len(ROWS)


@pytest.mark.parametrize("write", ["parquet", "saved"])
def test_names_of_classes_are_taken_from_the_data(write: str, tmp_path: Path) -> None:
    features = datasets.Features(
        {"input": datasets.Value("string"), "label": datasets.ClassLabel(names=["con", "pro"])}
    )
    rows = datasets.Dataset.from_list([{"input": "x", "label": 1}, {"input": "y", "label": 0}], features=features)
    path = tmp_path / ("rows.parquet" if write == "parquet" else "saved")
    rows.to_parquet(path) if write == "parquet" else rows.save_to_disk(path)
    module = JSONLDataModule(test=path)
    key = module.answer_key("test")
    assert (key.labels, key.label_set, key.choices) == (["pro", "con"], ("con", "pro"), [("con", "pro")] * 2)


def test_a_relative_path_is_looked_up_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    as_jsonl(tmp_path / "data")
    module = JSONLDataModule(train="rows.jsonl", data_dir="../data")
    module.prepare_data()
    assert len(module.answer_key("train")) == 10
    (tmp_path / "here" / "rows.jsonl").write_text('{"input": "1", "label": "a"}\n{"input": "2", "label": "a"}')
    assert len(JSONLDataModule(train="rows.jsonl", data_dir="../data").answer_key("train")) == 1
    with pytest.raises(UserError, match=r"^test: there is no .*here.absent\.csv, nor 'absent\.csv' in .*data$"):
        JSONLDataModule(test="absent.csv", data_dir="../data").prepare_data()


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load(name: str, config: str | None = None, *, split: str) -> Any:
        asked.append((name, config, split))
        if split == "gone":
            raise ValueError('Unknown split "gone". Should be one of ["train"].\nMore.')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load)
    module = JSONLDataModule(hub="some/set", hub_config="v2", train="train[:50%]", test="validation")
    module.prepare_data()
    assert asked == [("some/set", "v2", "train[:50%]"), ("some/set", "v2", "validation")]
    assert len(module.answer_key("test")) == 12
    with pytest.raises(UserError, match=r"^hub: 'gone' of 'some/set' cannot be loaded \(Unknown split.*\)$"):
        JSONLDataModule(hub="some/set", test="gone").prepare_data()


def test_hub_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    as_jsonl(tmp_path / "set").rename(tmp_path / "set" / "train.jsonl")
    module = JSONLDataModule(hub=str(tmp_path / "set"), train="train")
    assert len(module.answer_key("train")) == 10
    with pytest.raises(UserError, match=r"^hub: 'nothing' of"):
        JSONLDataModule(hub=str(tmp_path / "set"), train="nothing").prepare_data()


@pytest.mark.parametrize("hub", ["", "/", "./"])
def test_a_hub_dataset_has_a_name(hub: str) -> None:
    with pytest.raises(UserError, match=r"^hub must be"):
        JSONLDataModule(hub=hub, train="train")


def test_hub_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^hub: 'train' of '.*absent' cannot be loaded"):
        JSONLDataModule(hub=str(tmp_path / "absent"), train="train").prepare_data()


def read_all(**arguments: Any) -> None:
    module = JSONLDataModule(**arguments)
    module.prepare_data()
    for split in module.splits:
        module.released(split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^train, val, test or predict must be given"),
        ({"train": "x.jsonl", "metric": "f1"}, "^metric must be one of exact_match, equation, got 'f1'"),
        (
            {"train": "x.jsonl", "label_set": "yes"},
            "^label_set must be a list of different texts, none of them empty, got 'yes'",
        ),
        (
            {"train": "x.jsonl", "label_set": ["a", "b", "a "]},
            "^label_set must be a list of different texts, none of them empty",
        ),
        ({"train": "x.jsonl", "label_set": ["a", ""]}, "^label_set must be a list of different texts"),
        ({"train": "x.jsonl", "outputs": ["program"]}, r"^outputs must map columns to kinds, got \['program'\]"),
        (
            {"train": "x.jsonl", "label_set": [0, 1]},
            r"^label_set must be a list of different texts, none of them empty, got \[0, 1\]",
        ),
        ({"train": "x.jsonl", "input_template": "no columns"}, "^input_template must name columns in braces"),
        ({"train": "x.jsonl", "input_template": "{a"}, "^input_template: expected '}' before end of string, in '{a'"),
        ({"train": "x.jsonl", "input_template": "{a.__class__}"}, "^input_template must name columns in braces"),
        ({"train": "x.jsonl", "input_template": "{}"}, "^input_template must name columns in braces"),
        (
            {"train": "x.jsonl", "input_template": "{a:>2000000000}"},
            "^input_template: {a} must stand without ':' and '!'",
        ),
        ({"train": "x.jsonl", "input_template": "{a!r}"}, "^input_template: {a} must stand without ':'"),
        ({"train": "x.jsonl", "input_template": "{a[0]}"}, "^input_template must name columns in braces"),
        ({"train": "x.jsonl", "input_template": 5}, "^input_template must be a text, got 5"),
        (
            {"train": "x.jsonl", "train_fraction": 1.5},
            r"^train_fraction must be in \(0, 1\] or a whole number above 1, got 1.5",
        ),
        ({"train": "x.txt"}, r"^train: .*x\.txt is none of \.jsonl, \.json, \.csv, \.parquet and no folder"),
        (
            {"train": "rows.jsonl", "input_column": "text"},
            "^train: no column 'text' in .*; there are input, label, l2$",
        ),
        (
            {"train": "rows.jsonl", "input_template": "{input} {b}"},
            "^train: no column 'b' in .*; there are input, label, l2$",
        ),
        ({"train": "rows.jsonl", "label_column": "gold"}, "^train: no column 'gold'"),
        ({"test": "rows.jsonl", "label_column": "gold"}, "^test: no column 'gold'"),
        ({"test": "rows.jsonl", "group_column": "region"}, "^test: no column 'region'"),
        ({"test": "rows.jsonl", "group_column": "l2"}, r"^.*rows\.jsonl:1: 'l2' must be a text, got \['x'\]"),
        ({"test": "rows.jsonl", "group_column": ""}, "^group_column must be a text, got ''"),
        ({"train": "rows.jsonl", "rationale_column": "why"}, "^train: no column 'why'"),
        ({"train": "rows.jsonl", "id_column": "nr"}, "^train: no column 'nr'"),
        ({"train": "rows.jsonl", "input_column": "l2"}, r"^.*rows\.jsonl:1: 'l2' must be a text, got \['x'\]"),
        (
            {"train": "rows.jsonl", "label_column": "l2"},
            r"^.*rows\.jsonl:1: a label must be a text or a number, got \['x'\]",
        ),
        ({"train": "rows.jsonl", "choices_column": "input"}, r"^.*rows\.jsonl:1: choices must be a list"),
        (
            {"train": "rows.jsonl", "label_set": ["a", "b"]},
            r"rows\.jsonl:1: the label 'l' is not in label_set \(",
        ),
        ({"train": "null.jsonl"}, r"^.*null\.jsonl:1: column 'input' is empty"),
        ({"train": "twice.jsonl"}, "^jsonl train: rows 0 and 1 share the id 'a'"),
        ({"train": "broken.jsonl"}, r"broken\.jsonl:1: not JSON"),
        ({"train": "keys.json"}, r"keys\.json: the key 'input' is there twice in one object"),
        ({"train": "keys.jsonl"}, r"keys\.jsonl:1: the key 'input' is there twice in one object"),
        ({"train": "deep.json"}, r"deep\.json: not JSON: nested too deep"),
        ({"train": "surrogate.json"}, r"surrogate\.json: not JSON: .*surrogates not allowed"),
        *(
            (
                {"train": f"empty{suffix}"},
                rf"^train: .*empty\{suffix} is empty; give one with rows, or leave train out",
            )
            for suffix in (".jsonl", ".json", ".csv", ".parquet")
        ),
        ({"test": "header.csv"}, r"^test: .*header\.csv is empty; give one with rows, or leave test out$"),
        (
            {"test": "choices.jsonl"},
            r"^jsonl test: the label of 2 of 3 rows is none of the row's choices \('jsonl-test-1' has 'B'",
        ),
        ({"train": "items.json"}, r"items\.json, item 1: not a JSON object but int"),
        ({"train": "ragged.csv"}, r"ragged\.csv:3: another number of cells than the 2 columns"),
        ({"train": "latin.csv"}, r"latin\.csv: not a CSV file in UTF-8"),
        ({"train": "bad.parquet"}, r"bad\.parquet: not a Parquet file"),
        ({"train": "folder"}, "^train: .*folder is no folder that save_to_disk wrote"),
        ({"test": "unlabelled.csv"}, "^test: no column 'label' in .*; there are input$"),
    ],
)
def test_what_is_not_allowed(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"input": "i", "label": "l", "l2": ["x"]}')
    (tmp_path / "null.jsonl").write_text('{"input": null}')
    (tmp_path / "twice.jsonl").write_text('{"input": "i", "id": "a"}\n{"input": "j", "id": "a"}')
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "keys.json").write_text('[{"input": "i", "input": "j"}]')
    (tmp_path / "keys.jsonl").write_text('{"input": "i", "input": "j"}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "surrogate.json").write_text('[{"input": "\\ud800"}]')
    for suffix in (".jsonl", ".csv"):
        (tmp_path / f"empty{suffix}").touch()
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "header.csv").write_text("input,label\n")
    datasets.Dataset.from_dict({"input": [], "label": []}).to_parquet(tmp_path / "empty.parquet")
    choice = '{"input": "%s", "label": "%s", "choices": ["no", "yes"]}\n'
    (tmp_path / "choices.jsonl").write_text(choice % ("a", "no") + choice % ("b", "B") + choice % ("c", "A"))
    (tmp_path / "items.json").write_text('[{"input": "i"}, 3]')
    (tmp_path / "ragged.csv").write_text("input,label\na,b\nc\n")
    (tmp_path / "latin.csv").write_bytes("input\nähm\n".encode("latin-1"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "unlabelled.csv").write_text("input\na\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        read_all(data_dir=tmp_path, **arguments)
    assert "\n" not in str(caught.value)


def test_rows_without_a_label_are_no_test(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("input,label\na,x\nb,\n")
    with pytest.raises(UserError, match=r"^test: 1 of 2 rows have no label, which test needs"):
        JSONLDataModule(test=path, tokenizer=tokenizer).setup("test")
    module = JSONLDataModule(test=path, tokenizer=tokenizer)
    module.setup("predict")
    assert module.answer_key("test").labels == ["x", None]


def test_choices_in_a_csv_cell(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('input,label,choices\n"a, b",x,"[""x"", ""y""]"\n')
    key = JSONLDataModule(test=path).answer_key("test")
    assert (key.inputs, key.choices) == (["a, b"], [("x", "y")])


def test_csv_columns_and_cells(tmp_path: Path) -> None:
    twice = tmp_path / "twice.csv"
    twice.write_text("input,label,label\na,x,y\n")
    with pytest.raises(UserError, match="a column is there twice: input, label, label"):
        JSONLDataModule(train=twice).released("train")
    long = tmp_path / "long.csv"
    long.write_text(f"input,label\n{'a' * 200_000},x\n")
    rows = JSONLDataModule(train=long).released("train")
    assert rows is not None
    assert len(rows[0].input) == 200_000


def labelled(tmp_path: Path, labels: list[str | None]) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"input": f"in {i}", "label": label, "rationale": "so"} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("tasks", [["label"], ["label", "rationale"], ["rationale_label"]])
def test_a_training_file_without_labels(tasks: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = labelled(tmp_path, [None] * 5)
    module = JSONLDataModule(train=path, val=labelled(tmp_path, [None] * 5), tokenizer=tokenizer, tasks=tasks)
    with pytest.raises(UserError, match=rf"^tasks: {tasks[0]} has no target in train: .*needs labels"):
        module.setup("fit")


def test_training_rows_without_a_label_are_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = labelled(tmp_path, ["a", "b", None, "a", None, "b"])
    test = tmp_path / "test.jsonl"
    test.write_text('{"input": "x", "label": "a"}')
    module = JSONLDataModule(train=path, val=test, tokenizer=tokenizer, tasks=["label", "rationale"], batch_size=6)
    module.setup("fit")
    assert "jsonl train: 2 of 6 rows have no label to train on" in caplog.text
    (batch,) = module.train_dataloader()
    assert [len(batch[task]["labels"]) for task in ("label", "rationale")] == [4, 6]
