"""Tokens by hand (ids are character codes)."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import PreTrainedTokenizerFast

from lit_distill.data import tokenize
from lit_distill.data.selection import Target, targets
from lit_distill.data.store import CHUNK
from lit_distill.data.tokenize import (
    Lengths,
    TokenRow,
    TokenRows,
    TokenSettings,
    cut_counts,
    encode_rows,
    lengths_of,
    tokenize_once,
)
from lit_distill.students import Tokens, load_tokens
from lit_distill.students import tokens as tokens_module
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


def once(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, settings: TokenSettings) -> TokenRows:
    return TokenRows(tokenize_once("t", rows, "key", Tokens(tokenizer), settings, choose), settings)


def all_of(rows: TokenRows) -> list[TokenRow]:
    return [rows[position] for position in range(len(rows))]


def test_rows_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = once(EXAMPLES, tokenizer, SETTINGS)
    assert all_of(rows) == [
        {
            "index": 0,
            "label.input_ids": [[*codes("p:ab"), 1]],
            "label.labels": [[*codes("no"), 1]],
            "rationale.input_ids": [[*codes("ab"), 1]],
            "rationale.labels": [[*codes("why"), 1]],
        },
        {
            "index": 1,
            "label.input_ids": [[*codes("p:long "), 1]],
            "label.labels": [[*codes("yes"), 1]],
            "rationale.input_ids": [[*codes("long in"), 1]],
            "rationale.labels": [],
        },
    ]
    # before truncation
    assert rows.lengths_of == {
        "label": Lengths(Counter({5: 1, 13: 1}), Counter({3: 1, 4: 1}), 0),
        "rationale": Lengths(Counter({3: 1, 11: 1}), Counter({4: 1}), 0),
    }
    # after it, and in training only for targets
    assert rows.lengths(evaluation=True).tolist() == [5 + 3 + 3 + 4, 8 + 4 + 8]
    assert rows.lengths(evaluation=False).tolist() == [5 + 3 + 3 + 4, 8 + 4]
    cut = cut_counts(rows.lengths_of, SETTINGS)
    assert cut == {"truncated_inputs": 2, "truncated_targets": 0, "truncated_labels": 0}


TEXTS = [
    "A man</s>No man",
    "e\u0301t\u00e9 here",
    "",
    " ",
    " a",
    "a  b ",
    "\u0301a",
    "</s>x",
    "<extra_id_0> a <extra_id_1>",
    "\ufb01x",
    "\nA\tb",
    "a\x7fb\x00c",
    "a a " + "b" * 300,
]


def drawn_texts(count: int) -> list[str]:
    draw = random.Random(0)  # noqa: S311 - no secret
    pieces = [
        *map(chr, range(32, 127)),
        *" \u00e9\u0301\ufb01\u00a0\u200b\u3000\n",
        "</s>",
        "<extra_id_0>",
        "premise: ",
        "man ",
    ]
    return ["".join(draw.choices(pieces, k=draw.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("kept", [0, 50_000])
def test_words_are_tokenised_as_whole_texts(kept: int, shared_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "WORDS", kept)
    plain: Any
    for tokens in (load_tokens(shared_tokenizer), Tokens(character_tokenizer())):
        texts, plain = [*TEXTS, *drawn_texts(300)], tokens.tokenizer
        for some in (texts[:100], texts[100:], texts):
            assert tokens.sources(some, 999).ids == [plain(text).input_ids for text in some]


@pytest.mark.parametrize("added", ["\u2581abqz", "a bqz", "abqz"])
def test_added_tokens_are_found_in_whole_texts(added: str, shared_tokenizer: Path) -> None:
    tokens = load_tokens(shared_tokenizer)
    tokens.tokenizer.add_tokens([added])
    texts = ["x abqz", "xabqz a bqz"]
    assert tokens.sources(texts, 99).ids == [tokens.tokenizer(text).input_ids for text in texts]


def test_a_word_is_tokenised_once(shared_tokenizer: Path) -> None:
    tokens = load_tokens(shared_tokenizer)
    seen: list[str] = []
    plain = type(tokens.tokenizer).__call__

    def counted(tokenizer: Any, texts: list[str], **settings: Any) -> Any:
        seen.extend(texts)
        return plain(tokenizer, texts, **settings)

    with patch.object(type(tokens.tokenizer), "__call__", counted):
        for prefix in ("predict: ", "explain: "):
            tokens.sources([prefix + "a man", prefix + "\u0301n", prefix + "a dog"], 9)
    expected = ["predict:", "explain:", "a", "man", "dog", "predict: \u0301n", "explain: \u0301n"]
    # two letters tell which special tokens are around a text
    assert sorted(seen) == sorted([*expected, "a", "a"])


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
    counts = cut_counts(lengths_of(columns, settings), settings)
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
    assert cut_counts(lengths_of(columns, settings), settings) == {
        "truncated_inputs": 0,
        "truncated_targets": cut,
        "truncated_labels": labels_cut,
    }


def test_many_batches_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    # enough for processes of their own
    count = 8 * CHUNK + 501
    examples = [make_row(str(i), str(i), str(i % 7)) for i in range(count)]
    rows = once(examples, tokenizer, settings_of({"label": ""}, 8, 8))
    assert len(rows) == count
    for i in (0, CHUNK - 1, CHUNK, count - 1):
        assert rows[i]["label.input_ids"] == [[*codes(str(i)), 1]]
        assert rows[i]["label.labels"] == [[*codes(str(i % 7)), 1]]


def test_no_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(once([], tokenizer, SETTINGS)) == 0


def test_a_second_start_does_not_tokenise(
    tokenizer: PreTrainedTokenizerFast, endless_tokenizer: PreTrainedTokenizerFast
) -> None:
    first = once(EXAMPLES, tokenizer, SETTINGS)
    more = wrap(tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    more.add_tokens(["why"])
    with patch.object(tokenize, "encode_rows", side_effect=AssertionError("tokenised again")):
        second = once(list(EXAMPLES), tokenizer, SETTINGS)
        for other, settings in (
            (endless_tokenizer, SETTINGS),
            (more, SETTINGS),
            (tokenizer, replace(SETTINGS, max_source_length=9)),
            (tokenizer, replace(SETTINGS, max_target_length=9)),
        ):
            with pytest.raises(AssertionError, match="tokenised again"):
                once(EXAMPLES, other, settings)
    assert all_of(first) == all_of(second)
