"""Tokens by hand (ids are character codes), and the cache."""

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import PreTrainedTokenizerFast

from lit_distill.data import tokenize
from lit_distill.data.tokenize import TokenSettings, encode, fingerprint, tokenize_once, tokenizer_fingerprint
from lit_distill.errors import UserError
from lit_distill.tasks import TeacherOutput, tasks_from
from tests.data.conftest import character_tokenizer, wrap
from tests.rows import make_row


def settings_of(prefixes: dict[str, str], source: int, target: int) -> TokenSettings:
    return TokenSettings(tasks_from({name: {"prefix": prefix} for name, prefix in prefixes.items()}), source, target)


SETTINGS = settings_of({"label": "p:", "rationale": ""}, 8, 4)
EXAMPLES = [make_row("a", "ab", "no", None, "why"), make_row("b", "long input", "yes", None, None)]


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_rows_by_hand(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows, cut = tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path)
    assert list(rows) == [
        {
            "index": 0,
            "label.input_ids": [*codes("p:ab"), 1],
            "label.input_length": 5,
            "label.labels": [*codes("no"), 1],
            "label.target_length": 3,
            "rationale.input_ids": [*codes("ab"), 1],
            "rationale.input_length": 3,
            "rationale.labels": [*codes("why"), 1],
            "rationale.target_length": 4,
        },
        {
            "index": 1,
            "label.input_ids": [*codes("p:long "), 1],
            "label.input_length": 13,
            "label.labels": [*codes("yes"), 1],
            "label.target_length": 4,
            "rationale.input_ids": [*codes("long in"), 1],
            "rationale.input_length": 11,
            "rationale.labels": None,
            "rationale.target_length": None,
        },
    ]
    assert cut == {"truncated_inputs": 2, "truncated_targets": 0, "truncated_labels": 0}


def test_targets_end_even_where_the_tokenizer_adds_no_end(endless_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(endless_tokenizer, ["ab"], 8, is_target=True).ids == [[*codes("ab"), 1]]
    assert encode(endless_tokenizer, ["ab", ""], 8, is_target=False).ids == [codes("ab"), []]


@pytest.mark.parametrize(("limit", "expected"), [(1, [1]), (3, [97, 98, 1]), (4, [97, 98, 99, 1])])
def test_a_cut_keeps_the_end(tokenizer: PreTrainedTokenizerFast, limit: int, expected: list[int]) -> None:
    encoded = encode(tokenizer, ["abc"], limit, is_target=True)
    assert (encoded.ids, encoded.lengths) == ([expected], [4])


def test_a_cut_without_an_end_is_plain(endless_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(endless_tokenizer, ["abc"], 2, is_target=False).ids == [codes("ab")]


def test_beyond_the_tokenizer_s_own_limit_there_is_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(encode(tokenizer, ["x" * 50], 100, is_target=False).ids[0]) == 51  # model_max_length is 16
    assert caplog.text + capsys.readouterr().err == ""


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
    ((columns, counts),) = tokenize.encode_examples(rows, character_tokenizer(ends=ends), settings)
    assert columns[f"{task}.labels"] == [None, [*codes(expected), 1]]
    assert len(columns[f"{task}.labels"][1]) <= limit
    assert counts == {"truncated_inputs": 0, "truncated_targets": cut, "truncated_labels": labels_cut}


def test_many_batches_keep_their_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    examples = [make_row(str(i), str(i), str(i % 7)) for i in range(2501)]
    rows, _ = tokenize_once("t", examples, tokenizer, settings_of({"label": ""}, 8, 8), tmp_path)
    assert rows["index"][:] == list(range(2501))
    assert rows[2500]["label.input_ids"] == [*codes("2500"), 1]


def test_no_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows, cut = tokenize_once("t", [], tokenizer, SETTINGS, tmp_path)
    assert (len(rows), set(cut.values())) == (0, {0})


def test_a_second_start_does_not_tokenise(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, cut = tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path)
    with patch.object(tokenize, "encode", side_effect=AssertionError("tokenised again")):
        second, cut_again = tokenize_once("t", list(EXAMPLES), tokenizer, SETTINGS, tmp_path)
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenize_once("t", EXAMPLES[:1], tokenizer, SETTINGS, tmp_path)
    assert list(first) == list(second)
    assert cut == cut_again


def test_using_a_tokenizer_does_not_change_its_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def test_fingerprint_of_everything_that_changes_the_tokens(
    tokenizer: PreTrainedTokenizerFast, endless_tokenizer: PreTrainedTokenizerFast
) -> None:
    mark = tokenizer_fingerprint(tokenizer)
    more = wrap(tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    more.add_tokens(["why"])
    changed = [
        fingerprint(EXAMPLES, tokenizer_fingerprint(endless_tokenizer), SETTINGS),
        fingerprint(EXAMPLES, tokenizer_fingerprint(more), SETTINGS),
        fingerprint(EXAMPLES[:1], mark, SETTINGS),
        fingerprint(EXAMPLES[::-1], mark, SETTINGS),
        fingerprint([replace(EXAMPLES[0], label="yes"), EXAMPLES[1]], mark, SETTINGS),
        fingerprint([replace(EXAMPLES[0], label=None), EXAMPLES[1]], mark, SETTINGS),
        fingerprint([replace(EXAMPLES[0], input="x"), EXAMPLES[1]], mark, SETTINGS),
        fingerprint([replace(EXAMPLES[0], outputs=(TeacherOutput("x"),)), EXAMPLES[1]], mark, SETTINGS),
        fingerprint([replace(EXAMPLES[0], id="x"), EXAMPLES[1]], mark, SETTINGS),
        fingerprint(EXAMPLES, mark, settings_of({"label": "q:", "rationale": ""}, 8, 4)),
        fingerprint(EXAMPLES, mark, settings_of({"label": "p:"}, 8, 4)),
        fingerprint(EXAMPLES, mark, replace(SETTINGS, max_source_length=9)),
        fingerprint(EXAMPLES, mark, replace(SETTINGS, max_target_length=9)),
    ]
    with patch.object(tokenize, "FORMAT", tokenize.FORMAT + 1):
        changed.append(fingerprint(EXAMPLES, mark, SETTINGS))
    same = fingerprint(EXAMPLES, mark, SETTINGS)
    assert len({same, *changed}) == 1 + len(changed)
    # what the tokens do not depend on
    agreeing = replace(EXAMPLES[0], outputs=(TeacherOutput("why", "x"),))
    assert fingerprint([agreeing, EXAMPLES[1]], mark, SETTINGS) == same


def only_folder(root: Path) -> Path:
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("damage", ["cut", "empty", "no mark", "broken mark", "other mark", "no rows", "garbage"])
def test_a_damaged_folder_is_built_again(damage: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = list(tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path)[0])
    folder = only_folder(tmp_path)
    table, mark = folder / "rows.arrow", folder / "done.json"
    content = table.read_bytes()
    if damage == "cut":
        table.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        table.write_bytes(b"")
    elif damage == "no mark":
        mark.unlink()
    elif damage == "broken mark":
        mark.write_text('{"fingerprint": ')
    elif damage == "other mark":
        mark.write_text(json.dumps(json.loads(mark.read_text()) | {"fingerprint": "other"}))
    elif damage == "no rows":
        table.unlink()
    else:
        table.write_bytes(b"x" * len(content))
    assert list(tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path)[0]) == expected


def test_what_a_killed_process_left_is_cleared(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with (
        patch.object(tokenize, "encode", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    name = f"t-{fingerprint(EXAMPLES, tokenizer_fingerprint(tokenizer), SETTINGS)[:32]}"
    (tmp_path / f".{name}.{socket.gethostname().partition('.')[0]}.999999999.tmp").mkdir()
    rows, _ = tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path)
    assert len(rows) == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]


def test_a_cache_that_cannot_be_written(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir: tokenised rows cannot be kept in"):
        tokenize_once("t", EXAMPLES, tokenizer, SETTINGS, tmp_path / "file")


STARTING_TOGETHER = """
import sys, time
from pathlib import Path
from typing import Any
from tests.data.test_tokenize import tokenize_slowly
from tests.rows import make_row
root = Path(sys.argv[1])
(root / "ready").touch()
while not (root / "go").exists():
    time.sleep(0.001)
print(tokenize_slowly(root / "cache"))
"""


def tokenize_slowly(root: Path) -> int:
    """Tokenise three batches, check them, and say how often the tokenizer was called."""
    plain, calls = tokenize.encode, []

    def slow(*args: Any, **settings: Any) -> tokenize.Encoded:
        calls.append(1)
        time.sleep(0.1)
        return plain(*args, **settings)

    examples = [make_row(str(i), f"input {i}", str(i)) for i in range(3000)]
    with patch.object(tokenize, "encode", slow):
        rows, cut = tokenize_once("t", examples, character_tokenizer(), settings_of({"label": "p:"}, 64, 64), root)
    assert (len(rows), rows[2999]["label.labels"]) == (3000, [*codes("2999"), 1])
    assert cut["truncated_inputs"] == 0
    return len(calls)


def test_two_processes_starting_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTING_TOGETHER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as other:  # noqa: S603
        while not (tmp_path / "ready").exists():
            assert other.poll() is None
            time.sleep(0.01)
        (tmp_path / "go").touch()
        here = tokenize_slowly(tmp_path / "cache")
        there = int(other.communicate(timeout=100)[0])
    assert other.returncode == 0
    # one of them tokenised (inputs and targets of three batches), the other one waited
    assert sorted([here, there]) == [0, 6]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
