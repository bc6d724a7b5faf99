"""Rows joined by id to what a teacher said of them, and trained on by its columns."""

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
from transformers import PreTrainedTokenizerFast

from lit_distill.annotation.record import Annotation, digest
from lit_distill.annotation.store import FILE, PARQUET, AnnotationStore
from lit_distill.batch import IGNORE_INDEX
from lit_distill.data import CQADataModule, JSONLDataModule, SVAMPDataModule, ToyDataModule
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.needs import check_split
from lit_distill.data.selection import teacher_counts
from lit_distill.data.store import CHUNK
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.tasks import Row
from tests.data.conftest import WriteCQA, WriteLines, cqa_output
from tests.rows import make_row

BOTH = ("label", "rationale")
Make = Callable[..., RationaleDataModule]
Say = Callable[..., Path]
Lines = Sequence[Mapping[str, Any]]


def said(row: str, sample: int = 0, label: str | None = "yes", **columns: Any) -> dict[str, Any]:
    """A line of a job that had not ended; without a label its text did not parse."""
    parsed = label is not None
    known = {
        "id": row,
        "split": "train",
        "sample": sample,
        "teacher": "T",
        "text": f"Said of {row}, {sample}: {label}",
        "rationale": f"R{sample} of {row}" if parsed else None,
        "label": label,
        "parsed": parsed,
        "prompt": "p",
        "settings": "s",
    } | columns
    return {key: value for key, value in known.items() if value is not None}


def failed(row: str, sample: int = 0) -> dict[str, Any]:
    return {"id": row, "split": "train", "sample": sample, "teacher": "T", "error": "timed out"}


@pytest.fixture
def say(tmp_path: Path, write_lines: WriteLines) -> Say:
    """Write the samples in a folder of their own."""

    def write(lines: Iterable[Mapping[str, Any]], name: str = FILE) -> Path:
        return write_lines(tmp_path / "said" / name, [dict(line) for line in lines]).parent

    return write


@pytest.fixture
def jsonl(tmp_path: Path, write_lines: WriteLines, say: Say) -> Make:
    """A module of the user's own rows a, b, c (gold: yes, no, yes) and x in test, with these samples."""
    train = write_lines(
        tmp_path / "train.jsonl",
        [
            {"id": row, "input": f"in {row}", "label": label}
            for row, label in zip("abc", ("yes", "no", "yes"), strict=True)
        ],
    )
    test = write_lines(tmp_path / "test.jsonl", [{"id": "x", "input": "in x", "label": "yes"}])

    def make(lines: Lines | Path, **arguments: Any) -> RationaleDataModule:
        path = lines if isinstance(lines, Path) else say(lines)
        defaults: dict[str, Any] = {"train": train, "val": train, "test": test, "tasks": BOTH, "rationales": path}
        return JSONLDataModule(**defaults | arguments)

    return make


def rows_of(module: RationaleDataModule, split: Split = "train") -> Sequence[Row]:
    rows = module.released(split)
    assert rows is not None
    return rows


def rationales(module: RationaleDataModule, split: Split = "train") -> dict[str, str | None]:
    """What each row would be trained on."""
    return {example.id: example.rationale for example in module.used_rows(split).rows}


def counted(module: RationaleDataModule, split: Split = "train") -> dict[str, int]:
    module.used_rows(split)
    counts = module.counts[split]
    assert counts["rows"] == counts["parsed"] + counts["unparsed"] + counts["no_output"]
    return {name: count for name, count in counts.items() if count}


def svamp(folder: Path, write_lines: WriteLines, count: int = 10) -> Path:
    rows = [{"input": f"How many are {i} and {i}?", "label": f"( {i}.0 + {i}.0 )"} for i in range(count)]
    write_lines(folder / "svamp" / "svamp_train.json", rows)
    return folder


def test_rows_and_samples_are_joined_by_id_not_by_place(tmp_path: Path, write_lines: WriteLines, say: Say) -> None:
    data = svamp(tmp_path, write_lines)
    lines = [
        said(f"svamp-train-{i}", label=f"({2 * i})", input=digest(f"How many are {i} and {i}?")) for i in range(10)
    ]
    random.Random(3).shuffle(lines)  # noqa: S311
    module = SVAMPDataModule(data_dir=data, tasks=BOTH, rationales=say(lines))
    assert [(row.id, row.input, row.rationale, row.teacher_label) for row in rows_of(module)] == [
        (f"svamp-train-{i}", f"How many are {i} and {i}?", f"R0 of svamp-train-{i}", f"({2 * i})") for i in range(10)
    ]
    # (0) of nought and nought included: by value
    assert counted(module)["teacher_correct"] == len(module.used_rows("train").rows) == 9


def test_samples_of_many_rows_in_any_order(jsonl: Make, say: Say, tmp_path: Path, write_lines: WriteLines) -> None:
    count = CHUNK + 500
    train = write_lines(
        tmp_path / "many.jsonl", [{"id": f"{i}", "input": f"in {i}", "label": "yes"} for i in range(count)]
    )
    lines = [said(f"{i}", sample, "no") for i in range(count) for sample in range(i % 3)]
    random.Random(4).shuffle(lines)  # noqa: S311
    for i, row in enumerate(rows_of(jsonl(say(lines), train=train))):
        assert [output.text for output in row.outputs] == [f"R{sample} of {i}" for sample in range(i % 3)]
        assert [output.columns["votes"] for output in row.outputs] == [i % 3] * (i % 3)


def test_val_that_is_taken_off_train_keeps_its_samples(write_cqa: WriteCQA, say: Say) -> None:
    lines = [said(f"q{i}", sample, label) for i in range(20) for sample, label in enumerate(("no", "yes"))]
    module = CQADataModule(data_dir=write_cqa(outputs=[]), rationales=say(lines))
    val, train = module.split_rows("val"), module.split_rows("train")
    assert val is not None
    assert train is not None
    assert (len(val), len(train)) == (2, 18)
    for rows in (val, train):
        for row in rows:
            assert (row.rationale, row.teacher_label) == (f"R0 of {row.id}", "no")
            assert [other.text for other in row.outputs[1:]] == [f"R1 of {row.id}"]
    assert module.answer_key("val").rationales == [f"R0 of {row.id}" for row in val]


def test_a_user_s_own_teacher_is_not_heard(tmp_path: Path, write_lines: WriteLines, say: Say) -> None:
    train = write_lines(
        tmp_path / "own.jsonl",
        [{"input": f"in {i}", "label": "yes", "rationale": "old", "teacher_label": "old"} for i in range(3)],
    )
    module = JSONLDataModule(train=train, val=train, tasks=BOTH, rationales=say([said("jsonl-train-1")]))
    assert rationales(module) == {"jsonl-train-0": None, "jsonl-train-1": "R0 of jsonl-train-1", "jsonl-train-2": None}
    assert counted(module) == {"rows": 3, "parsed": 1, "no_output": 2, "teacher_correct": 1, "used": 3}


def test_batches_hold_what_was_said(tokenizer: PreTrainedTokenizerFast, jsonl: Make) -> None:
    module = jsonl([said("b", label="no"), said("a")], tokenizer=tokenizer, batch_size=3)
    module.prepare_data()
    module.setup("fit")
    (batch,) = module.train_dataloader()
    written = [
        [code for code in row if code not in (0, 1, IGNORE_INDEX)] for row in batch["rationale"]["labels"].tolist()
    ]
    assert sorted("".join(map(chr, codes)) for codes in written) == ["R0 of a", "R0 of b"]
    assert len(batch["label"]["labels"]) == 3


def test_samples_of_other_splits_are_left_aside(jsonl: Make, caplog: pytest.LogCaptureFixture) -> None:
    module = jsonl([said("a"), said("b", split="test"), said("x", split="test"), said("x")])
    assert rationales(module) == {"a": "R0 of a", "b": None, "c": None}
    assert "1 samples in" in caplog.text
    caplog.clear()
    assert rationales(module, "test") == {"x": "R0 of x"}
    assert re.search(r"jsonl test: 1 samples in .*rationales\.jsonl are of rows that are not here", caplog.text)


def test_nothing_but_strange_ids_is_an_error(jsonl: Make) -> None:
    module = jsonl([said("zebra"), said("yak"), said("a", split="test")])
    with pytest.raises(
        UserError, match=r"^rationales: none of the 2 ids in .*rationales\.jsonl is one of train's rows$"
    ):
        module.released("train")


def test_a_sample_of_another_input_is_an_error(jsonl: Make) -> None:
    fine = said("a", input=digest("in a"))
    assert rationales(jsonl([fine]))["a"] == "R0 of a"
    with pytest.raises(UserError, match=r"rationales: .*: 'b' was asked with another input than the row has now"):
        jsonl([fine, said("b", input=digest("in  b"))]).released("train")


def test_every_row_is_accounted_for(jsonl: Make) -> None:
    # of a, what was asked again
    module = jsonl([failed("a"), said("a", label="no"), said("b", label=None), failed("c"), failed("b", 1)])
    assert counted(module) == {"rows": 3, "parsed": 1, "unparsed": 1, "no_output": 1, "used": 3}
    assert [row.id for row in rows_of(module) if row.outputs and row.rationale is None] == ["b"]
    assert rationales(module) == {"a": "R0 of a", "b": None, "c": None}


SEVERAL = [
    said("a", 1, "yes"),
    said("b", 2, "no"),
    said("a", 0, "no"),
    said("b", 0, None),
    said("a", 2, "yes"),
    said("c", 0, "no"),
    said("b", 1, "yes"),
]


def test_the_first_sample_stands_for_the_teacher(jsonl: Make) -> None:
    module = jsonl(SEVERAL)
    rows = rows_of(module)
    assert [(row.rationale, row.teacher_label) for row in rows] == [
        ("R0 of a", "no"),
        (None, None),
        ("R0 of c", "no"),
    ]
    assert {place: [other.text for other in row.outputs[1:]] for place, row in enumerate(rows) if row.outputs[1:]} == {
        0: ["R1 of a", "R2 of a"],
        1: ["R1 of b", "R2 of b"],
    }
    assert counted(module) == {"rows": 3, "parsed": 2, "unparsed": 1, "used": 3}


@pytest.mark.parametrize(
    ("rationale_filter", "trained_on", "filtered"),
    [
        ("none", {"a": "R0 of a", "b": "R1 of b", "c": "R0 of c"}, 0),
        ("label_agrees", {"a": "R1 of a", "b": "R2 of b", "c": None}, 1),
        ("sample >= 2", {"a": "R2 of a", "b": "R2 of b", "c": None}, 1),
        ("label == no", {"a": "R0 of a", "b": "R2 of b", "c": "R0 of c"}, 0),
        ("label == no and sample > 0", {"a": None, "b": "R2 of b", "c": None}, 2),
        ("in_majority and vote_share > 0.5", {"a": "R1 of a", "b": None, "c": "R0 of c"}, 1),
        ("votes > 1 and not in_majority", {"a": "R0 of a", "b": "R2 of b", "c": None}, 1),
        ("parsed", {"a": "R0 of a", "b": "R1 of b", "c": "R0 of c"}, 0),
        ("cost < 1", {"a": None, "b": None, "c": None}, 3),
    ],
)
def test_the_first_sample_that_is_kept_is_trained_on(
    rationale_filter: str, trained_on: dict[str, str | None], filtered: int, jsonl: Make
) -> None:
    module = jsonl(SEVERAL, rationale_filter=rationale_filter)
    assert rationales(module) == trained_on
    assert module.counts["train"]["rationale_filtered"] == filtered
    assert [example.label for example in module.used_rows("train").rows] == ["yes", "no", "yes"]


def test_the_teacher_s_label_is_that_of_the_sample(jsonl: Make) -> None:
    def labels(**arguments: Any) -> dict[str, str | None]:
        module = jsonl(SEVERAL, label_source="teacher", **arguments)
        return {example.id: example.label for example in module.used_rows("train").rows}

    assert labels() == {"a": "no", "b": "yes", "c": "no"}
    assert labels(rationale_filter="label_agrees") == {"a": "yes", "b": "no", "c": "no"}
    # no rationale of any is kept: the first label that there is
    assert labels(rationale_filter="cost < 1") == {"a": "no", "b": "yes", "c": "no"}
    assert jsonl(SEVERAL, label_source="teacher").answer_key("train").labels == ["yes", "no", "yes"]


def test_the_teacher_s_label_is_of_a_kind_that_answers(jsonl: Make) -> None:
    """Not the wrong answer that a counterfactual rationale argues for, though that one alone is kept."""
    lines = [said("a", 0, "no"), said("a", 0, "yes", kind="counterfactual"), said("b", 0, "no", kind="counterfactual")]

    def labels(**arguments: Any) -> dict[str, str | None]:
        module = jsonl([*lines, said("c", 0, "yes")], label_source="teacher", **arguments)
        return {example.id: example.label for example in module.used_rows("train").rows}

    assert labels() == {"a": "no", "c": "yes"}
    assert labels(rationale_filter="label == yes") == {"c": "yes"}
    assert labels(tasks={"label": {"kind": "counterfactual"}}) == {"a": "yes", "b": "no"}


def test_a_wrong_answer_by_design_is_no_fault_of_the_teacher(jsonl: Make) -> None:
    wrong, right = [said(row, 0, "maybe", kind="counterfactual") for row in "abc"], [said(row, 0) for row in "abc"]
    counts = teacher_counts(jsonl([*wrong, *right]).tally("train"))
    assert counts == teacher_counts(jsonl(right).tally("train"))
    assert counts["teacher_correct"] == 2


def test_several_teachers_stand_in_the_order_of_the_file(jsonl: Make, caplog: pytest.LogCaptureFixture) -> None:
    lines = [said("b", teacher="U"), said("a", 0, "no", teacher="T"), said("a", 1, teacher="U"), said("b", teacher="T")]
    module = jsonl(lines)
    assert [row.columns.get("teacher") for row in rows_of(module)] == ["U", "U", None]
    assert "samples of several teachers (U, T), the first of which comes first" in caplog.text
    caplog.clear()
    module = jsonl(lines, rationale_filter="teacher == T")
    assert rationales(module) == {"a": "R0 of a", "b": "R0 of b", "c": None}


def own_filter(example: Row) -> bool:
    """Keeps by whatever column it likes."""
    return example.columns is not None and bool(example.columns["score"] > 2)


@pytest.mark.parametrize("rationale_filter", [own_filter, f"{__name__}.own_filter", "score > 2"])
def test_a_user_s_own_columns_can_be_filtered_by(rationale_filter: Any, jsonl: Make) -> None:
    lines = [said("a", 0, score=1), said("a", 1, score=3), said("b", score=2.5), said("c", score=0)]
    module = jsonl(lines, rationale_filter=rationale_filter)
    assert rationales(module) == {"a": "R1 of a", "b": "R0 of b", "c": None}
    assert module.counts["train"]["rationale_filtered"] == 1


def test_splits_that_nothing_was_said_of_need_no_columns(tokenizer: PreTrainedTokenizerFast, jsonl: Make) -> None:
    lines = [said(row, score=3) for row in "abc"]
    module = jsonl(lines, rationale_filter="score > 2", tokenizer=tokenizer)
    module.setup("fit")
    module.setup("test")
    assert module.answer_key("test").rationales == [None]


def test_an_example_s_columns_are_the_line_s_but_for_its_texts(jsonl: Make) -> None:
    line = said("a", score=[1], agrees=True, key="ab", input=digest("in a"))
    (row, *_) = rows_of(jsonl([line]))
    known = {key: line[key] for key in line if key not in ("text", "rationale", "input", "key")}
    known |= {"kind": "rationale", "structured": False}
    votes = {"votes": 1, "majority_label": "yes", "vote_share": 1.0, "in_majority": True}
    assert row.columns == known | votes | {"distinct": True}
    assert (row.label, row.teacher_label) == ("yes", "yes")


@pytest.mark.parametrize("name", ["scroe", "text", "rationale", "key"])
def test_a_column_that_is_not_there_is_named(name: str, jsonl: Make) -> None:
    module = jsonl([said("a", score=3)], rationale_filter=f"score > 2 and {name}")
    with pytest.raises(
        UserError, match=rf"^rationale_filter: no column '{name}'; there are id, split, sample, .*, score"
    ):
        module.released("train")


def test_conditions_hold_for_released_outputs_too(write_cqa: WriteCQA) -> None:
    outputs = [cqa_output(i, "no" if i % 2 else "yes") for i in range(20)]
    module = CQADataModule(data_dir=write_cqa(outputs=outputs), tasks=BOTH, rationale_filter="agrees and length < 3")
    kept = [row.id for row in module.used_rows("train").rows if row.rationale is not None]
    assert kept
    assert all(int(name[1:]) % 2 == 0 for name in kept)
    assert module.used_rows("train").rows[0].columns["teacher"] == "released"


def test_released_outputs_and_folders_together(write_cqa: WriteCQA, say: Say, tmp_path: Path) -> None:
    first = say([said(f"q{i}", teacher="A", kind="program") for i in range(4)])
    second = write_lines_to(
        tmp_path / "second", [said(f"q{i}", sample, teacher="B") for i in (3, 4) for sample in (1, 0)]
    )
    module = CQADataModule(data_dir=write_cqa(test=None), rationales=[first, "released", second])
    rows = {row.id: [(o.teacher, o.kind, o.text) for o in row.outputs] for row in rows_of(module)}
    own = ("released", "rationale", "Because 3.")
    assert rows["q3"] == [
        ("A", "program", "R0 of q3"),
        own,
        ("B", "rationale", "R0 of q3"),
        ("B", "rationale", "R1 of q3"),
    ]
    assert [one[0] for one in rows["q4"]] == ["released", "B", "B"]
    assert [one[0] for one in rows["q9"]] == ["released"]
    assert module.hparams["rationales"] == [str(first), "released", str(second)]
    tasks = {"why": {"prefix": "a", "target": "{rationale}", "teacher": "B", "select": "vote"}}
    tasks |= {"code": {"prefix": "b", "target": "{rationale}", "kind": "program"}}
    chosen = CQADataModule(data_dir=write_cqa(test=None), rationales=[first, "released", second], tasks=tasks)
    by_task = {
        name: [chosen.targets("train", task, row) for row in rows_of(chosen)] for name, task in chosen.tasks.items()
    }
    assert [[target.text for target in found] for found in by_task["why"][2:6]] == [[], ["R0 of q3"], ["R0 of q4"], []]
    assert sum(map(len, by_task["code"])) == 4


def write_lines_to(folder: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    folder.mkdir()
    (folder / FILE).write_text("".join(json.dumps(dict(line)) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"kind": "proof"},
            "tasks: x has no target in train: .*needs teacher outputs of kind proof; .* rationale by .*; `lit-distill"
            " annotate --kind proof --prompt FILE --out FOLDER` makes them",
        ),
        # a shipped style
        ({"kind": "counterfactual"}, "tasks: x has .*; `lit-distill annotate --prompt counterfactual --out FOLDER`"),
        ({"teacher": "B"}, "tasks: x has no target in train: .*needs teacher outputs of kind rationale by B;"),
        (
            {"target": "{column}"},
            "tasks: x has no target in train: '{column}' .*needs teacher outputs of kind rationale;",
        ),
    ],
)
def test_a_task_without_outputs_is_named(task: dict[str, Any], message: str, write_cqa: WriteCQA) -> None:
    module = CQADataModule(data_dir=write_cqa(), tasks={"x": {"target": "{rationale}"} | task})
    with pytest.raises(UserError, match=message):
        check_split(module, "train", "fit")


def write_store(folder: Path, samples: Iterable[Annotation], *, ended: bool) -> None:
    """As a job writes it."""
    with AnnotationStore(folder) as store:
        for sample in samples:
            store.append(sample)
        if ended:
            store.finish(lambda found: None, str.__eq__)


@pytest.mark.parametrize("ended", [False, True])
def test_votes_are_there_whether_the_job_has_ended_or_not(ended: bool, tmp_path: Path, write_lines: WriteLines) -> None:
    data = svamp(tmp_path, write_lines)
    labels = ["(4)", "(2 + 2)", None, "(5)"]
    samples = [
        Annotation(
            "svamp-train-2",
            "train",
            sample,
            "T",
            text="said",
            rationale=None if label is None else "R",
            label=label,
            key=f"{sample:032x}",
        )
        for sample, label in enumerate(labels)
    ]
    if ended:
        module = SVAMPDataModule()
        with AnnotationStore(tmp_path / "out") as store:
            for sample in samples:
                store.append(sample)
            store.finish(lambda found: None, module.teacher_agrees)
    else:
        write_store(tmp_path / "out", samples, ended=False)
    rows = rows_of(SVAMPDataModule(data_dir=data, rationales=tmp_path / "out"))
    votes = [
        [(example.columns or {}).get(name) for name in ("votes", "majority_label", "vote_share", "in_majority")]
        for example in rows[2].outputs
    ]
    assert votes == [[4, "(4)", 0.5, inside] for inside in (True, True, None, False)]


@pytest.mark.parametrize("old", [{}, {"votes": 3, "majority_label": "no", "vote_share": 1.0, "in_majority": True}])
def test_distinct_right_answers_alone(old: dict[str, Any], jsonl: Make) -> None:
    """Also of a folder that was written before there was a column for it, whose votes stay."""
    texts = [("no", "1 + 1 = 2"), ("yes", "1 + 1 = 2."), ("yes", "so 1+1=2"), ("yes", "2 - 0 = 2"), ("yes", "2 it is")]
    lines = [said("a", i, label, rationale=text, agrees=label == "yes", **old) for i, (label, text) in enumerate(texts)]
    module = jsonl([*lines, said("b"), said("c")], rationale_filter="agrees and distinct")
    (row, *_) = module.used_rows("train").rows
    assert [output.text for output in row.outputs] == ["1 + 1 = 2.", "2 - 0 = 2", "2 it is"]
    assert {output.columns["votes"] for output in row.outputs} == {3 if old else 5}
    assert {output.columns["in_majority"] for output in row.outputs} == {True}


def test_votes_of_an_earlier_job_are_counted_anew(jsonl: Make) -> None:
    old = {"votes": 1, "majority_label": "no", "vote_share": 1.0, "in_majority": True}
    module = jsonl([said("a", 0, "no", **old), said("a", 1), said("a", 2)], rationale_filter="in_majority")
    assert rationales(module)["a"] == "R1 of a"
    (row, *_) = rows_of(module)
    assert row.columns is not None
    assert [row.columns[name] for name in old] == [3, "yes", 2 / 3, False]


def test_a_torn_line_is_left_aside_while_a_job_writes(jsonl: Make, say: Say) -> None:
    folder = say([said("a"), said("b")])
    path = folder / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert rationales(jsonl(folder)) == {"a": "R0 of a", "b": None, "c": None}
    assert path.read_bytes() == whole[:-20]


HAND_WRITTEN = [{"id": "b", "rationale": "By hand.", "label": "no"}, {"id": "a", "rationale": "Too.", "label": "no"}]


def test_a_file_written_by_hand_is_read(jsonl: Make) -> None:
    assert rationales(jsonl(HAND_WRITTEN)) == {"a": "Too.", "b": "By hand.", "c": None}
    module = jsonl(HAND_WRITTEN, rationale_filter="label_agrees")
    assert rationales(module) == {"a": None, "b": "By hand.", "c": None}
    assert counted(module)["teacher_correct"] == 1


def test_a_file_written_by_hand_says_nothing_of_test(
    tokenizer: PreTrainedTokenizerFast, jsonl: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # its samples name no split, and none of them is of a row of test
    module = jsonl(HAND_WRITTEN, tokenizer=tokenizer)
    module.setup("fit")
    module.setup("test")
    assert module.answer_key("test").rationales == [None]
    assert "not here" not in caplog.text


def test_a_file_of_labels_or_rationales_alone(jsonl: Make) -> None:
    module = jsonl([{"id": "a", "label": "yes"}, {"id": "b", "rationale": "Only."}])
    assert rationales(module) == {"a": None, "b": "Only.", "c": None}
    assert counted(module) == {"rows": 3, "parsed": 2, "no_output": 1, "teacher_correct": 1, "used": 3}


@pytest.mark.parametrize("by_file", [False, True])
def test_parquet_alone_is_read(by_file: bool, tmp_path: Path, jsonl: Make) -> None:
    folder = tmp_path / "out"
    samples = [Annotation(row, "train", text="x", rationale=f"R {row}", label="yes", cost=0.5) for row in "ba"]
    write_store(folder, samples, ended=True)
    (folder / FILE).unlink()
    module = jsonl(folder / PARQUET if by_file else folder, rationale_filter="cost < 1 and vote_share == 1")
    assert rationales(module) == {"a": "R a", "b": "R b", "c": None}


def test_a_user_s_own_parquet_is_read(tmp_path: Path, jsonl: Make) -> None:
    path = tmp_path / "mine.parquet"
    pd.DataFrame(
        {"id": ["c", "a"], "rationale": ["R c", "R a"], "label": ["yes", None], "length": [2, 2], "score": [None, 0.5]}
    ).to_parquet(path)
    assert rationales(jsonl(path, rationale_filter="score < 1")) == {"a": "R a", "b": None, "c": None}


@pytest.mark.parametrize("name", ["kept.parquet", "kept.jsonl"])
def test_a_file_that_went_through_pandas_is_read(name: str, tmp_path: Path, jsonl: Make) -> None:
    # which keeps whole numbers among gaps as 2.0
    samples = [
        Annotation("a", "train", text="x", rationale="R a", label="yes", length=2, output_tokens=9),
        Annotation("b", "train", error="timed out"),
    ]
    write_store(tmp_path / "out", samples, ended=True)
    frame = pd.read_parquet(tmp_path / "out" / PARQUET)
    path = tmp_path / name
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    assert rationales(jsonl(path, rationale_filter="length == 2 and votes == 1")) == {"a": "R a", "b": None, "c": None}


def test_a_file_of_any_name_is_read(jsonl: Make, say: Say) -> None:
    folder = say([said("a")], "mine.jsonl")
    assert rationales(jsonl(folder / "mine.jsonl"))["a"] == "R0 of a"
    with pytest.raises(
        UserError, match=r"^rationales: '.*said' holds neither rationales\.jsonl nor rationales\.parquet$"
    ):
        jsonl(folder).prepare_data()


def test_a_missing_file_is_said_before_anything_is_read(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"rationales": tmp_path / "none"}
    modules = [
        CQADataModule(data_dir=tmp_path, **arguments),
        ToyDataModule(**arguments),
        JSONLDataModule(train=tmp_path / "nor-this.jsonl", **arguments),
    ]
    for module in modules:
        with pytest.raises(UserError, match=r"^rationales: no file or folder '.*none'$"):
            module.prepare_data()
    with pytest.raises(UserError, match="no file or folder"):
        modules[1].released("train")
    with pytest.raises(UserError, match=r"^rationales: s3://b/x is at a URL, and has to be a local file or folder$"):
        ToyDataModule(rationales="s3://b/x")
    assert ToyDataModule(rationales=f"file://{tmp_path}").rationales == [tmp_path]


def test_a_file_of_another_kind_is_said(tmp_path: Path) -> None:
    path = tmp_path / "said.csv"
    path.write_text("id,label\n")
    with pytest.raises(UserError, match=r"^rationales: '.*said\.csv' ends neither in \.jsonl nor in \.parquet$"):
        ToyDataModule(rationales=path).prepare_data()


def test_a_damaged_line_is_named(jsonl: Make, say: Say) -> None:
    folder = say([said("a")])
    with (folder / FILE).open("a") as file:
        file.write('{"id": 3}\n')
    with pytest.raises(UserError, match=r"rationales\.jsonl:2: not a sample: id: Input should be a valid string"):
        jsonl(folder).released("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "tasks: rationale has no target in train: .*needs teacher outputs of kind rationale;"),
        (
            {"tasks": ["label"], "label_source": "teacher"},
            "tasks: label has no target in train: .*needs labels of the teacher;",
        ),
        ({"rationale_filter": "parsed"}, "rationale_filter: parsed leaves no rationale"),
    ],
)
def test_where_nothing_was_said_it_is_named(
    arguments: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, jsonl: Make
) -> None:
    module = jsonl([failed("a"), said("b", label=None)], tokenizer=tokenizer, **arguments)
    with pytest.raises(UserError, match=rf"^{message}"):
        module.setup("fit")


def alone(rows: Sequence[Row] | None) -> list[str]:
    assert rows is not None
    assert all(row.outputs == () for row in rows)
    return [row.id for row in rows]


def test_a_teacher_is_asked_about_the_whole_file(write_cqa: WriteCQA, say: Say) -> None:
    all_of_it = [f"q{i}" for i in range(20)]
    for outputs in (None, [], [cqa_output(0)]):
        data = write_cqa(outputs=outputs)
        for rationale_file in (None, say([said("q3")])):
            module = CQADataModule(data_dir=data, train_fraction=0.1, rationales=rationale_file)
            assert alone(module.rows_to_ask("train")) == all_of_it
            assert alone(module.rows_to_ask("test")) == ["q0", "q1", "q2", "q3"]
            assert module.rows_to_ask("val") is None  # it is taken off train
        for path in (data / "cqa" / "llm").iterdir():
            path.unlink()
    assert CQADataModule(data_dir=data / "none").rows_to_ask("train") is None


class Own(RationaleDataModule):
    """A dataset whose rows lie elsewhere."""

    name = "own"

    def load_rows(self, split: Split) -> list[Row] | None:
        if split == "test":
            return None
        return [make_row(f"{split}{i}", f"in {i}", "yes", None, "old", "old", {"x": 1}) for i in range(3)]


def test_a_dataset_that_loads_its_splits_itself_is_asked_about_and_joined(say: Say) -> None:
    module = Own(tasks=BOTH, rationales=say([said("train2")]))
    assert alone(module.rows_to_ask("train")) == ["train0", "train1", "train2"]
    assert module.rows_to_ask("test") is None
    assert rationales(module) == {"train0": None, "train1": None, "train2": "R0 of train2"}
    assert rationales(Own(tasks=BOTH)) == dict.fromkeys(("train0", "train1", "train2"), "old")


@pytest.mark.parametrize("as_text", [False, True])
def test_a_checkpoint_holds_the_path_as_plain_text(as_text: bool, write_cqa: WriteCQA, say: Say) -> None:
    folder = say([said(f"q{i}", score=i) for i in range(20)])
    given = str(folder) if as_text else folder
    module = CQADataModule(data_dir=write_cqa(outputs=[]), tasks=BOTH, rationales=given, rationale_filter="score > 3")
    assert type(module.hparams["rationales"]) is str
    assert (module.hparams["rationales"], module.hparams["rationale_filter"]) == (str(folder), "score > 3")
    assert json.loads(json.dumps(dict(module.hparams))) == dict(module.hparams)
    again = CQADataModule(**module.hparams)
    assert rationales(again) == rationales(module)
    assert again.majority_label == module.majority_label == "yes"
    assert again.describe()["rationales"] == str(folder)


def test_texts_alone_are_parsed_as_the_dataset_has_it(jsonl: Make) -> None:
    texts = {"a": "Well. So the answer is yes.", "b": "It is yes. So the answer is yes.", "c": "I cannot say."}
    data = jsonl([{"id": row, "text": text} for row, text in texts.items()])
    rows = data.released("train")
    assert rows is not None
    assert [(row.rationale, row.teacher_label) for row in rows] == [
        ("Well.", "yes"),
        ("It is yes.", "yes"),
        (None, None),
    ]
    assert len(rows[2].outputs) == 1
    known = [row.columns or {} for row in rows]
    assert [(c["parsed"], c["agrees"], c.get("contains_label"), c.get("length")) for c in known] == [
        (True, True, False, 1),
        (True, False, True, 3),
        (False, False, None, None),
    ]
    lines = [{"id": row, "text": text} for row, text in texts.items()]
    filtered = jsonl(lines, rationale_filter="agrees and not contains_label")
    assert [row.rationale for row in filtered.used_rows("train").rows] == ["Well.", None, None]


def test_a_torn_line_is_named(jsonl: Make, say: Say, caplog: pytest.LogCaptureFixture) -> None:
    folder = say([said("a"), said("b"), said("c")])
    path = folder / FILE
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    rows = jsonl(folder).released("train")
    assert f"jsonl train: {path}:3 is torn: its row may have no sample" in caplog.text
    assert rows is not None
    assert [row.rationale for row in rows] == ["R0 of a", "R0 of b", None]
    # elsewhere than at its end it is damage
    path.write_bytes(content.replace(b'"id"', b'"i', 1))
    with pytest.raises(UserError, match=re.escape(f"{path}:1: not JSON")):
        jsonl(folder).released("train")
