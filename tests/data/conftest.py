"""A tokenizer whose ids are character codes, and a small released layout to write."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).parents[3] / "shared"

WriteLines = Callable[[Path, Sequence[dict[str, Any]]], Path]
WriteCQA = Callable[..., Path]


def character_tokenizer(*, ends: bool = True) -> PreTrainedTokenizerFast:
    """Ids are character codes; 0 pads, 1 ends, 2 is unknown. With ``ends`` it appends the 1 by itself, as T5's does."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {chr(code): code for code in (9, 10, *range(32, 127))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if ends:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return wrap(backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16)


def wrap(backend: Tokenizer, **settings: str | int) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers has it."""
    build: Any = PreTrainedTokenizerFast  # its constructor has no types
    wrapped: PreTrainedTokenizerFast = build(tokenizer_object=backend, **settings)
    return wrapped


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture
def endless_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(ends=False)


@pytest.fixture(autouse=True)
def token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test tokenises is seen by another, or by the user."""
    folder = tmp_path / "token-cache"
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(folder))
    return folder


@pytest.fixture
def write_lines() -> WriteLines:
    def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def cqa_rows(count: int, answer: str = "yes") -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "question": f"Q{i}?", "choices": ["yes", "no"], "answer": answer} for i in range(count)]


def cqa_output(i: int, answer: str = "yes") -> str:
    return f"Because {i}. So the answer is (a) {answer}.\n\nQ: Another?"


@pytest.fixture
def write_cqa(tmp_path: Path, write_lines: WriteLines) -> WriteCQA:
    """Write ``cqa/`` with train rows, test rows, and the teacher's outputs of train in chunks."""

    def write(
        train: int | None = 20, test: int | None = 4, outputs: Sequence[str] | None = None, chunk: int = 7
    ) -> Path:
        folder = tmp_path / "data" / "cqa"
        if train is not None:
            write_lines(folder / "cqa_train.json", cqa_rows(train))
            outputs = [cqa_output(i) for i in range(train)] if outputs is None else outputs
        if test is not None:
            write_lines(folder / "cqa_test.json", cqa_rows(test))
        (folder / "llm").mkdir(parents=True, exist_ok=True)
        for k, start in enumerate(range(0, len(outputs or ()), chunk)):
            chunk_rows = json.dumps(list(outputs or ())[start : start + chunk])
            (folder / "llm" / f"train_CoT_{k}.json").write_text(chunk_rows, encoding="utf-8")
        return folder.parent

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the real data is not on this machine: {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_tokenizer() -> Path:
    folder = SHARED / "models" / "t5-v1_1-small"
    if not folder.is_dir():
        pytest.skip(f"T5's tokenizer is not on this machine: {folder}")
    return folder
