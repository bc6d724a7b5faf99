"""Floors: what a bag of words gets on the rows of a run."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_distill.data import CQADataModule, ESNLIDataModule, JSONLDataModule, floor
from lit_distill.data.floor import floors
from lit_distill.data.paper import NLI_LABELS
from tests.data.conftest import WriteCQA, WriteLines

WORDS = ("a", "dog", "sleeps", "on", "grass", "nobody", "outside", "man")


def sentence(draw: np.random.Generator) -> str:
    return " ".join(draw.choice(WORDS, 4))


def nli(draw: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Rows whose label the premise decides."""
    pairs = [(sentence(draw), sentence(draw)) for _ in range(count)]
    return [{"premise": one, "hypothesis": two, "label": one.count("dog") % 3} for one, two in pairs]


def esnli(folder: Path, splits: dict[str, list[dict[str, Any]]], **settings: Any) -> ESNLIDataModule:
    (folder / "esnli").mkdir(exist_ok=True)
    for word, rows in splits.items():
        (folder / "esnli" / f"esnli_{word}.json").write_text("\n".join(map(json.dumps, rows)))
    return ESNLIDataModule(data_dir=folder, **settings)


def everything(data: Any) -> dict[str, float]:
    return floors(data, {"test": range(len(data.used_rows("test").rows))})["test"]


def features(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))]


def softmax_regression(known: list[tuple[str, int]], asked: list[str]) -> np.ndarray[Any, Any]:
    """Answers of the minimum of the mean cross-entropy plus |W|^2 / (2 C n) at C = 0.1, by plain gradient descent."""
    column = {word: number for number, word in enumerate(dict.fromkeys(w for text, _ in known for w in features(text)))}

    def matrix(texts: list[str]) -> np.ndarray[Any, Any]:
        found = np.zeros((len(texts), len(column) + 1))
        found[:, -1] = 1
        for row, text in enumerate(texts):
            for word in features(text):
                if word in column:
                    found[row, column[word]] += 1
        return found

    x, y, n = matrix([text for text, _ in known]), np.eye(3)[[label for _, label in known]], len(known)
    weights = np.zeros((x.shape[1], 3))
    decay = np.full((x.shape[1], 1), 1 / (0.1 * n))
    decay[-1] = 0  # the intercept has no penalty
    for _ in range(4000):
        scores = np.exp(x @ weights)
        weights -= 0.1 * (x.T @ (scores / scores.sum(1, keepdims=True) - y) / n + decay * weights)
    answers: np.ndarray[Any, Any] = (matrix(asked) @ weights).argmax(1)
    return answers


def test_it_is_the_accuracy_of_a_plain_softmax_regression(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    train, test = nli(draw, 60), nli(draw, 200)
    found = everything(esnli(tmp_path, {"train": train, "test": test}))
    gold = np.array([row["label"] for row in test])
    for name, text in (
        ("words", lambda row: f"{row['premise']} {row['hypothesis']}"),
        ("second_part_words", lambda row: row["hypothesis"]),
    ):
        answers = softmax_regression([(text(row), row["label"]) for row in train], [text(row) for row in test])
        # a row that lies on the border of two labels may fall to either side
        assert found[name] == pytest.approx((answers == gold).mean(), abs=0.011)
    assert found["words"] > found["second_part_words"] + 0.05


def test_the_second_part_is_read_alone(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    rows = [row | {"hypothesis": f"{NLI_LABELS[n % 3]} it is", "label": n % 3} for n, row in enumerate(nli(draw, 60))]
    found = everything(esnli(tmp_path, {"train": rows[:30], "test": rows[30:]}))
    assert found["second_part_words"] == 1


def test_only_the_rows_asked_for_are_answered_and_those_of_train_are_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [{"premise": "p", "hypothesis": f"word{n % 2}", "label": n % 2} for n in range(40)]
    test = [{"premise": "p", "hypothesis": f"word{n % 2}", "label": 0} for n in range(4)]
    data = esnli(tmp_path, {"train": train, "test": test})
    assert floors(data, {"test": [0, 2]})["test"]["words"] == 1
    assert floors(data, {"test": [1]})["test"]["words"] == 0
    assert everything(data)["words"] == 0.5
    # evenly spaced rows have both labels, the first ten one
    monkeypatch.setattr(floor, "TRAIN_ROWS", 10)
    assert everything(esnli(tmp_path, {"train": sorted(train, key=lambda row: row["label"])}))["words"] == 0.5


def test_it_learns_the_labels_that_the_student_learns(tmp_path: Path) -> None:
    train = [{"premise": "p", "hypothesis": f"word{n % 2}", "label": n % 2} for n in range(40)]
    test = [{"premise": "p", "hypothesis": "word0", "label": 0}]
    (tmp_path / "esnli" / "llm").mkdir(parents=True)
    outputs = [f"So.\nAnswer: {NLI_LABELS[1 - n % 2]}" for n in range(40)]
    (tmp_path / "esnli" / "llm" / "train_CoT_0.json").write_text(json.dumps(outputs))
    assert everything(esnli(tmp_path, {"train": train, "test": test}))["words"] == 1
    assert everything(esnli(tmp_path, {}, label_source="teacher"))["words"] == 0


def test_where_there_is_none(tmp_path: Path, write_cqa: WriteCQA, write_lines: WriteLines) -> None:
    # each row has its own choices
    assert everything(CQADataModule(data_dir=write_cqa(train=20, test=4))) == {}
    same = [{"premise": "p", "hypothesis": "h", "label": 0}] * 4
    assert everything(esnli(tmp_path, {"train": same, "test": same})) == {}
    silent = [{"premise": "?", "hypothesis": "!", "label": n % 2} for n in range(4)]
    assert everything(esnli(tmp_path, {"train": silent, "test": silent})) == {}
    assert floors(esnli(tmp_path, {"train": nli(np.random.default_rng(2), 9)}), {"test": []})["test"] == {}


def test_inputs_of_one_part_and_rows_without_a_label(tmp_path: Path, write_lines: WriteLines) -> None:
    rows: list[dict[str, Any]] = [{"input": f"word{n % 2} {n}", "label": "ab"[n % 2]} for n in range(20)]
    for split, some in (("train", rows), ("test", [*rows, {"input": "word0", "label": None}])):
        write_lines(tmp_path / f"{split}.jsonl", some)
    files = [str(tmp_path / f"{split}.jsonl") for split in ("train", "test")]
    assert everything(JSONLDataModule(train=files[0], test=files[1], label_set=["a", "b"])) == {"words": 1.0}


def test_words_keep_their_combining_marks(tmp_path: Path, write_lines: WriteLines) -> None:
    # the same letters, with other vowel signs
    kinds = {"कि": "a", "की": "b"}
    rows = [{"input": word, "label": label} for word, label in kinds.items()] * 10
    file = str(write_lines(tmp_path / "rows.jsonl", rows))
    assert everything(JSONLDataModule(train=file, val=file, test=file, label_set=["a", "b"])) == {"words": 1.0}
