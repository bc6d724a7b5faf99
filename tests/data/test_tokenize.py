"""Tokens by hand (ids are character codes), and the cache."""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import PreTrainedTokenizerFast

from lit_distill.data import tokenize
from lit_distill.data.selection import Target, targets
from lit_distill.data.tokenize import TokenSettings, cut_counts, encode_rows, fingerprint, tokenize_once
from lit_distill.errors import UserError
from lit_distill.students import Tokens
from lit_distill.tasks import Row, Task, TeacherOutput, tasks_from
from tests.data.conftest import character_tokenizer, wrap
from tests.rows import make_row


def settings_of(prefixes: dict[str, str], source: int, target: int) -> TokenSettings:
    return TokenSettings(tasks_from({name: {"prefix": prefix} for name, prefix in prefixes.items()}), source, target)


SETTINGS = settings_of({"label": "p:", "rationale": ""}, 8, 4)
EXAMPLES = [make_row("a", "ab", "no", None, "why"), make_row("b", "long input", "yes", None, None)]


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def choose(task: Task, row: Row) -> list[Target]:
    return targets(task, row)


def once(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, settings: TokenSettings, root: Path) -> Any:
    return tokenize_once("t", rows, Tokens(tokenizer), settings, choose, root)


def mark(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, settings: TokenSettings = SETTINGS) -> str:
    return fingerprint(rows, Tokens(tokenizer), settings, choose)


def test_rows_by_hand(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = once(EXAMPLES, tokenizer, SETTINGS, tmp_path)
    assert list(rows) == [
        {
            "label.input_ids": [*codes("p:ab"), 1],
            "label.input_length": 5,
            "label.labels": [[*codes("no"), 1]],
            "label.target_lengths": [3],
            "label.labels_cut": 0,
            "rationale.input_ids": [*codes("ab"), 1],
            "rationale.input_length": 3,
            "rationale.labels": [[*codes("why"), 1]],
            "rationale.target_lengths": [4],
            "rationale.labels_cut": 0,
        },
        {
            "label.input_ids": [*codes("p:long "), 1],
            "label.input_length": 13,
            "label.labels": [[*codes("yes"), 1]],
            "label.target_lengths": [4],
            "label.labels_cut": 0,
            "rationale.input_ids": [*codes("long in"), 1],
            "rationale.input_length": 11,
            "rationale.labels": [],
            "rationale.target_lengths": [],
            "rationale.labels_cut": 0,
        },
    ]
    cut = cut_counts(lambda name: rows.data[name].to_pylist(), SETTINGS)
    assert cut == {"truncated_inputs": 2, "truncated_targets": 0, "truncated_labels": 0}


@pytest.mark.parametrize(("limit", "expected"), [(1, [1]), (3, [97, 98, 1]), (4, [97, 98, 99, 1])])
@pytest.mark.parametrize("ends", [True, False])
def test_a_cut_keeps_the_end_of_a_target(ends: bool, limit: int, expected: list[int]) -> None:
    tokens = Tokens(character_tokenizer(ends=ends))
    encoded = tokens.targets(["abc"], limit)
    assert (encoded.ids, encoded.lengths) == ([expected], [4])
    assert tokens.sources(["abc"], 2).ids == [[97, 1] if ends else [97, 98]]


def test_beyond_the_tokenizer_s_own_limit_there_is_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(Tokens(tokenizer).sources(["x" * 50], 100).ids[0]) == 51  # model_max_length is 16
    assert caplog.text + capsys.readouterr().err == ""


def test_several_targets_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = TokenSettings(tasks_from({"why": {"target": "{rationale}", "select": "all"}}), 8, 4)
    said = tuple(TeacherOutput(text) for text in ("a", "bcde"))
    rows = [make_row("a", "in", "x"), replace(make_row("b", "in", "x"), outputs=said)]
    columns = encode_rows(rows, Tokens(tokenizer), settings, choose)
    assert columns["why.labels"] == [[], [[*codes("a"), 1], [*codes("bcd"), 1]]]
    assert columns["why.target_lengths"] == [[], [2, 5]]
    counts = cut_counts(columns.__getitem__, settings)
    assert counts == {"truncated_inputs": 0, "truncated_targets": 1, "truncated_labels": 0}


@pytest.mark.parametrize(
    ("task", "limit", "expected", "cut", "labels_cut"),
    [
        ("rationale_label", 32, "because it So the answer is yes", 1, 0),
        ("rationale_label", 39, "because it is so. So the answer is yes", 0, 0),
        ("rationale_label", 38, "because it is so So the answer is yes", 1, 0),
        ("rationale_label", 26, "beca So the answer is yes", 1, 0),
        ("rationale_label", 22, " So the answer is yes", 1, 0),
        ("rationale_label", 21, " So the answer is ye", 1, 1),
        ("label_rationale", 21, "yes Rationale: becau", 1, 0),
        ("label_rationale", 15, "yes Rationale:", 1, 0),
        ("label_rationale", 14, "yes Rationale", 1, 1),
        ("rationale", 5, "beca", 1, 0),
        ("label", 4, "yes", 0, 0),
        ("label", 3, "ye", 1, 1),
    ],
)
@pytest.mark.parametrize("ends", [True, False])
def test_the_rationale_is_cut_and_not_the_label(
    task: str, limit: int, expected: str, cut: int, labels_cut: int, ends: bool
) -> None:
    example = make_row("a", "in", "yes", None, "because it is so.")
    settings = settings_of({task: ""}, 99, limit)
    # of two rows the first has no target
    rows = [make_row("b", "in", None), example]
    columns = encode_rows(rows, Tokens(character_tokenizer(ends=ends)), settings, choose)
    assert columns[f"{task}.labels"] == [[], [[*codes(expected), 1]]]
    assert len(columns[f"{task}.labels"][1][0]) <= limit
    assert cut_counts(columns.__getitem__, settings) == {
        "truncated_inputs": 0,
        "truncated_targets": cut,
        "truncated_labels": labels_cut,
    }


def test_many_batches_keep_their_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examples = [make_row(str(i), str(i), str(i % 7)) for i in range(2501)]
    rows = once(examples, tokenizer, settings_of({"label": ""}, 8, 8), tmp_path)
    assert rows[2500]["label.input_ids"] == [*codes("2500"), 1]
    assert len(rows) == 2501


def test_no_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert len(once([], tokenizer, SETTINGS, tmp_path)) == 0


def test_a_second_start_does_not_tokenise(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = once(EXAMPLES, tokenizer, SETTINGS, tmp_path)
    with patch.object(tokenize, "encode_rows", side_effect=AssertionError("tokenised again")):
        second = once(list(EXAMPLES), tokenizer, SETTINGS, tmp_path)
        with pytest.raises(AssertionError, match="tokenised again"):
            once(EXAMPLES[:1], tokenizer, SETTINGS, tmp_path)
    assert list(first) == list(second)


def test_fingerprint_of_everything_that_changes_the_tokens(
    tokenizer: PreTrainedTokenizerFast, endless_tokenizer: PreTrainedTokenizerFast
) -> None:
    more = wrap(tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    more.add_tokens(["why"])
    first, second = EXAMPLES
    changed = [
        mark(EXAMPLES, endless_tokenizer),
        mark(EXAMPLES, more),
        mark(EXAMPLES[:1], tokenizer),
        mark(EXAMPLES[::-1], tokenizer),
        mark([replace(first, label="yes"), second], tokenizer),
        mark([replace(first, label=None), second], tokenizer),
        mark([replace(first, input="x"), second], tokenizer),
        mark([replace(first, outputs=(TeacherOutput("x"),)), second], tokenizer),
        mark([replace(first, id="x"), second], tokenizer),
        mark(EXAMPLES, tokenizer, settings_of({"label": "q:", "rationale": ""}, 8, 4)),
        mark(EXAMPLES, tokenizer, settings_of({"label": "p:"}, 8, 4)),
        mark(EXAMPLES, tokenizer, replace(SETTINGS, max_source_length=9)),
        mark(EXAMPLES, tokenizer, replace(SETTINGS, max_target_length=9)),
    ]
    with patch.object(tokenize, "FORMAT", tokenize.FORMAT + 1):
        changed.append(mark(EXAMPLES, tokenizer))
    same = mark(EXAMPLES, tokenizer)
    assert len({same, *changed}) == 1 + len(changed)
    # what the tokens do not depend on
    agreeing = replace(first, outputs=(TeacherOutput("why", "x"),))
    assert mark([agreeing, second], tokenizer) == same
    weighted = {name: replace(task, weight=2.0, max_new_tokens=7) for name, task in SETTINGS.tasks.items()}
    assert mark(EXAMPLES, tokenizer, replace(SETTINGS, tasks=weighted)) == same


def only_file(root: Path) -> Path:
    (path,) = root.glob("*.arrow")
    return path


@pytest.mark.parametrize("damage", ["cut", "empty", "other rows", "no file", "garbage"])
def test_a_damaged_file_is_made_again(damage: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = list(once(EXAMPLES, tokenizer, SETTINGS, tmp_path))
    path = only_file(tmp_path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other rows":
        once(EXAMPLES[:1], tokenizer, SETTINGS, tmp_path / "other")
        path.write_bytes(only_file(tmp_path / "other").read_bytes())
    elif damage == "no file":
        path.unlink()
    else:
        path.write_bytes(b"x" * len(content))
    assert list(once(EXAMPLES, tokenizer, SETTINGS, tmp_path)) == expected


def test_what_a_killed_process_left_is_cleared(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with patch.object(tokenize, "encode_rows", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        once(EXAMPLES, tokenizer, SETTINGS, tmp_path)
    assert list(tmp_path.glob("*.arrow")) == []
    name = f"t-{mark(EXAMPLES, tokenizer)[:32]}.arrow"
    (tmp_path / f".{name}.{socket.gethostname().partition('.')[0]}.999999999.tmp").touch()
    assert len(once(EXAMPLES, tokenizer, SETTINGS, tmp_path)) == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow", ".lock"}


def test_a_cache_that_cannot_be_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="tokenised rows cannot be kept in"):
        once(EXAMPLES, tokenizer, SETTINGS, tmp_path / "file")


def test_two_that_start_together_tokenise_once(tmp_path: Path) -> None:
    plain, calls = tokenize.encode_rows, []

    def slow(*args: Any) -> dict[str, list[Any]]:
        calls.append(1)
        time.sleep(0.02)
        return plain(*args)

    examples = [make_row(str(i), f"input {i}", str(i)) for i in range(3000)]
    settings = settings_of({"label": "p:"}, 64, 64)
    with patch.object(tokenize, "encode_rows", slow), ThreadPoolExecutor(2) as threads:
        both = [threads.submit(once, examples, character_tokenizer(), settings, tmp_path) for _ in range(2)]
        tables = [one.result() for one in both]
    for rows in tables:
        assert (len(rows), rows[2999]["label.labels"]) == (3000, [[*codes("2999"), 1]])
    # one of them tokenised three batches, the other one waited
    assert len(calls) == 3
    assert only_file(tmp_path)
