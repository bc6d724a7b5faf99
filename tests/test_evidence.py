"""The script that makes the students of the evidence."""

import json
import lzma
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tests.students import make_causal_folder, make_student_folder

SCRIPT = Path(__file__).parent.parent / "docs" / "evidence" / "make_student.py"


def run_script(arguments: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_student.py", *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A student whose texts have two kinds of animals, and its tokenizer."""
    folder, draw = tmp_path_factory.mktemp("started"), random.Random(0)  # noqa: S311
    kinds = [(("cat", "dog"), ("sleeps", "barks")), (("carp", "pike"), ("swims", "dives"))]
    texts = []
    for _ in range(400):
        names, verbs = draw.choice(kinds)
        texts.append({"text": f"The {draw.choice(names)} {draw.choice(verbs)}.", "label": 1})
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in texts))
    like = make_student_folder(folder / "like", d_model=64)
    arguments = ["--like", like, "--words", folder / "texts.jsonl", "--width", 64, "--out", folder / "made"]
    arguments += ["--embeddings"]
    run_script(arguments)
    return AutoModelForSeq2SeqLM.from_pretrained(folder / "made"), AutoTokenizer.from_pretrained(folder / "made")


def test_a_vocabulary_has_t5s_sentinels(started: tuple[Any, Any]) -> None:
    _, tokenizer = started
    last = len(tokenizer) - 1
    assert [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in (0, 1, 99)] == [last, last - 1, last - 99]
    ids = [last, *tokenizer("The cat")["input_ids"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The cat"


def test_words_alike_begin_alike(started: tuple[Any, Any]) -> None:
    student, tokenizer = started
    weight = student.get_input_embeddings().weight.detach()

    def cosine(one: str, other: str) -> float:
        first, second = (weight[tokenizer.convert_tokens_to_ids(f"▁{word}")] for word in (one, other))
        return float(torch.cosine_similarity(first, second, dim=0))

    assert min(cosine("cat", "dog"), cosine("carp", "pike")) > 0.8
    assert max(cosine(a, b) for a in ("cat", "dog") for b in ("carp", "pike")) < 0.5
    # as long as random ones
    assert float(weight[tokenizer.convert_tokens_to_ids("▁cat")].square().mean()) == pytest.approx(1)


def test_texts_are_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"one"\n{"a": "two", "b": [{"c": "three"}, 4]}\n["five", ["six", "seven"]]\n')
    found = runpy.run_path(str(SCRIPT))["read_texts"]([tmp_path / "a.jsonl"])
    assert list(found) == ["one", "two three", "five", "six seven"]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like, bare = make_student_folder(tmp_path / "like"), tmp_path / "bare"
    llama = make_causal_folder(tmp_path / "llama")
    bare.mkdir()
    (bare / "config.json").write_bytes((like / "config.json").read_bytes())
    (tmp_path / "latin.jsonl").write_bytes(b'"caf\xe9"')
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'"one two"\n' * 90)[:-20])
    (tmp_path / "few.txt").write_text("one two three")
    words, few = "--words", tmp_path / "few.txt"
    cases: list[tuple[list[Any], str]] = [
        ([like, words, tmp_path / "latin.jsonl"], f"{tmp_path}/latin.jsonl:1: not JSON: 'utf-8' codec"),
        ([like, words, tmp_path / "cut.jsonl.xz"], f"{tmp_path}/cut.jsonl.xz is damaged"),
        ([llama], "--like: a 'llama' model is no T5; allowed are t5, mt5"),
        ([llama, words, few, "--heads"], "--like: a 'llama' model is no T5"),
        ([bare], f"--like: {bare} has neither spiece.model nor tokenizer.json; give --words"),
        ([like, words, few, "--embeddings", "--width", 1000], "--width: the texts have "),
        ([like, "--layers", "many"], "argument --layers: invalid int value"),
    ]
    for arguments, expected in cases:
        with pytest.raises(SystemExit) as stopped:
            run_script(["--out", tmp_path / "made", "--like", *arguments])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"make_student.py: error: {expected}"), expected
        assert not (tmp_path / "made").exists()
