"""Damaged files are named, with the line."""

import json
from pathlib import Path

import pytest

from lit_distill.data import ANLIDataModule, CQADataModule, ESNLIDataModule, SVAMPDataModule
from lit_distill.data.outputs import read_released
from lit_distill.errors import UserError
from tests.data.conftest import WriteCQA, cqa_output, cqa_rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": ', r"cqa_train\.json:2: not JSON"),
        (b"[1]", r"cqa_train\.json:2: not a JSON object but list"),
        (b'{"id": "\xff"}', r"cqa_train\.json:2: not JSON: 'utf-8' codec"),
        (
            b'{"id": "x", "choices": ["a"], "answer": "a"}',
            r"cqa_train\.json:2: no key 'question'; there are id, choices",
        ),
        (
            b'{"id": "x", "question": "q", "choices": "ab", "answer": "a"}',
            r"cqa_train\.json:2: 'choices' must be a list",
        ),
        (
            b'{"id": "x", "question": 3, "choices": ["a"], "answer": "a"}',
            r"cqa_train\.json:2: 'question' must be a string",
        ),
        (b'{"id": "x", "id": "y"}', r"cqa_train\.json:2: the key 'id' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', r"cqa_train\.json:2: the key 'b' is there twice"),
        (
            b'{"id": "x", "question": "q", "choices": ["a", "b"], "answer": "c"}',
            r"cqa train: the label of 1 of 3 rows is none of the row's choices \('x' has 'c' of a, b\)",
        ),
        (b'{"id": "q0", "question": "q", "choices": ["a"], "answer": "a"}', r"rows 0 and 1 share the id 'q0'"),
    ],
)
def test_a_bad_row(line: bytes, message: str, write_cqa: WriteCQA) -> None:
    data = write_cqa(train=3)
    path = data / "cqa" / "cqa_train.json"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[2]]))
    with pytest.raises(UserError, match=message):
        CQADataModule(data_dir=data).released("train")


def test_an_empty_file(write_cqa: WriteCQA) -> None:
    data = write_cqa(train=3)
    (data / "cqa" / "cqa_test.json").write_text("\n\n")
    with pytest.raises(UserError, match=r"^test: .*cqa_test\.json is empty; give a file with rows, or remove it$"):
        CQADataModule(data_dir=data).released("test")


@pytest.mark.parametrize("label", [3, -1, "neutral", True, 1.0, None])
def test_a_label_that_is_no_number_of_nli(label: object, tmp_path: Path) -> None:
    (tmp_path / "esnli").mkdir()
    row = {"premise": "p", "hypothesis": "h", "label": label}
    (tmp_path / "esnli" / "esnli_test.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"esnli_test\.json:1: 'label' must be 0, 1 or 2, got"):
        ESNLIDataModule(data_dir=tmp_path).released("test")


def test_rows_of_each_dataset(tmp_path: Path) -> None:
    (tmp_path / "anli2").mkdir()
    (tmp_path / "svamp").mkdir()
    nli = [{"uid": f"u{label}", "premise": "P.", "hypothesis": "H.", "label": label} for label in (0, 1, 2)]
    (tmp_path / "anli2" / "anli2_valid.json").write_text("\n".join(map(json.dumps, nli)))
    (tmp_path / "svamp" / "svamp_test.json").write_text('{"input": "B\\nQ?", "label": "( 1.0 + 2.0 )"}\n\n')
    rows = ANLIDataModule(round=2, data_dir=tmp_path).released("val")
    assert rows is not None
    assert [(row.id, row.input, row.label) for row in rows] == [
        ("u0", "P.</s>H.", "entailment"),
        ("u1", "P.</s>H.", "neutral"),
        ("u2", "P.</s>H.", "contradiction"),
    ]
    rows = SVAMPDataModule(data_dir=tmp_path).released("test")
    assert rows is not None
    assert [(row.id, row.input, row.label) for row in rows] == [("svamp-test-0", "B\nQ?", "( 1.0 + 2.0 )")]
    cqa = CQADataModule().read_row(cqa_rows(1)[0])
    assert (cqa.input, cqa.label, cqa.choices) == ("Q0?\nAnswer Choices:\n(a) yes\n(b) no", "yes", ("yes", "no"))


def test_chunks_are_joined_by_their_number(write_cqa: WriteCQA) -> None:
    # 23 outputs in chunks of 2 are the files 0 to 11; by name, 10 would come before 2
    rows = CQADataModule(data_dir=write_cqa(train=23, chunk=2)).released("train")
    assert rows is not None
    assert [row.rationale for row in rows] == [f"Because {i}." for i in range(23)]


def test_a_missing_chunk(write_cqa: WriteCQA) -> None:
    data = write_cqa(train=23, chunk=2)
    (data / "cqa" / "llm" / "train_CoT_3.json").unlink()
    with pytest.raises(UserError, match=r"train_CoT_3\.json is missing, but train_CoT_4\.json is there"):
        CQADataModule(data_dir=data).released("train")


@pytest.mark.parametrize(("count", "admitted"), [(4, False), (6, True)])
def test_as_many_outputs_as_rows(count: int, admitted: bool, write_cqa: WriteCQA) -> None:
    data = write_cqa(train=5, outputs=[cqa_output(i) for i in range(count)], chunk=3)
    message = rf"train: .*cqa_train\.json has 5 rows, .*train_CoT_\*\.json have {count} outputs"
    with pytest.raises(UserError, match=message):
        CQADataModule(data_dir=data).released("train")
    lenient = CQADataModule(data_dir=data, allow_extra_outputs=True)
    if not admitted:
        with pytest.raises(UserError, match=message):
            lenient.released("train")
        return
    rows = lenient.released("train")
    assert rows is not None
    assert [row.rationale for row in rows] == [f"Because {i}." for i in range(5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", r"x_CoT_0\.json: not JSON"),
        (b'\n\n["\xe4"]', r"x_CoT_0\.json: not JSON: 'utf-8' codec"),
        (b'{"a": 1}', r"x_CoT_0\.json: not a JSON list"),
        (b'["a", null]', r"x_CoT_0\.json: output 1 is not a string but NoneType"),
    ],
)
def test_a_bad_chunk(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x_CoT_0.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_released(tmp_path, "x"))


def test_no_outputs_are_no_files(tmp_path: Path) -> None:
    assert list(read_released(tmp_path / "absent", "train")) == []
    (tmp_path / "train_CoT_0.json.bak").touch()
    (tmp_path / "other_CoT_0.json").touch()
    assert list(read_released(tmp_path, "train")) == []
