"""Engines against transformers' own forward and ``generate``, on tiny students of random weights."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lit_distill.errors import UserError
from lit_distill.exporting.convert import check_architecture, convert
from lit_distill.exporting.engine import CTranslate2Engine, Engine, TransformersEngine, load_engine
from lit_distill.students import StudentFiles, load
from lit_distill.students.files import SEQ2SEQ
from tests.students import (
    CAUSAL_CONFIGS,
    CAUSAL_WORDS,
    WORDS,
    add_weights,
    make_causal_folder,
    make_causal_tokenizer,
    make_student_folder,
)

SPARE = 8
"""Embeddings that no token has."""
KINDS = ["untied", "tied", "mt5", "llama", "gpt2"]


def make(kind: str, folder: Path) -> Path:
    if kind in CAUSAL_CONFIGS:
        sizes = {"vocab_size": len(CAUSAL_WORDS) + SPARE}
        return add_weights(make_causal_folder(folder, kind, **sizes), make_causal_tokenizer())
    changes: dict[str, Any] = {"vocab_size": len(WORDS) + SPARE, "tie_word_embeddings": kind == "tied"}
    changes |= {"model_type": "mt5", "feed_forward_proj": "relu"} if kind == "mt5" else {}
    return add_weights(make_student_folder(folder, **changes))


def converted(student: Path, folder: Path, quantization: str = "float32") -> CTranslate2Engine:
    folder.mkdir()
    files = StudentFiles(student)
    check_architecture(files)
    convert(files, files.config, lambda: load(student), quantization, folder)
    found = load_engine(folder)
    assert isinstance(found, CTranslate2Engine)
    return found


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine]:
    folder = tmp_path_factory.mktemp(request.param)
    student = make(request.param, folder / "student")
    return student, converted(student, folder / "converted")


def rows(engine: Engine) -> tuple[list[list[int]], list[list[int]]]:
    """More than a batch of sources of all lengths, and targets of several tokens."""
    words = WORDS[5:31]
    texts = [" ".join(words[(3 * i + j) % 26] for j in range(1 + i % 9)) for i in range(36)]
    targets = [" ".join(words[(5 * i + j) % 26] for j in range(i % 5)) for i in range(36)]
    return engine.tokens.sources(texts, 64).ids, engine.tokens.targets(targets, 64).ids


def plain(student: Path) -> Any:
    kind = json.loads((student / "config.json").read_text())["model_type"]
    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForCausalLM
    return auto.from_pretrained(student).eval()


@torch.no_grad()
def own_score(model: Any, source: list[int], target: list[int]) -> float:
    """Of transformers' forward of one row, in float64."""
    labels = torch.tensor([target])
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([source]), labels=labels).logits
    else:
        logits = model(torch.tensor([source + target])).logits[:, len(source) - 1 : -1]
    return float(logits.double().log_softmax(-1)[0].gather(1, labels.T).sum())


def test_scores_are_those_of_the_model(pair: tuple[Path, Engine]) -> None:
    student, engine = pair
    sources, targets = rows(engine)
    model = plain(student)
    expected = [own_score(model, *row) for row in zip(sources, targets, strict=True)]
    assert engine.score(sources, targets) == pytest.approx(expected, abs=1e-4)
    assert TransformersEngine(load(student)).score(sources, targets) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_texts_are_those_of_generate_without_ids_that_no_token_has(pair: tuple[Path, Engine], num_beams: int) -> None:
    student, engine = pair
    sources, _ = rows(engine)
    model, known = plain(student), len(engine.tokens.tokenizer)
    eos = int(engine.tokens.tokenizer.eos_token_id)
    own: dict[str, Any] = {
        "max_new_tokens": 9,
        "num_beams": num_beams,
        "do_sample": False,
        "early_stopping": num_beams > 1,
    }
    own |= {"eos_token_id": eos, "pad_token_id": 0, "suppress_tokens": [*range(known, known + SPARE)]}
    expected = []
    for source in sources[::4]:
        given = torch.tensor([source])
        own |= {"input_ids": given, "attention_mask": torch.ones_like(given)}
        [ids] = model.generate(**own, renormalize_logits=True).tolist()
        ids = ids[1:] if model.config.is_encoder_decoder else ids[len(source) :]
        expected.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    assert len({tuple(ids) for ids in expected}) > 2
    assert max(max(ids) for ids in expected) < known
    for one in (engine, TransformersEngine(load(student)), TransformersEngine(load(student), plain=True)):
        assert one.generate(sources, max_new_tokens=9, num_beams=num_beams)[::4] == expected


def test_eight_bits_are_close_in_a_quarter_of_the_bytes(pair: tuple[Path, Engine], tmp_path: Path) -> None:
    student, engine = pair
    sources, targets = rows(engine)
    small = converted(student, tmp_path / "int8", "int8")
    assert small.score(sources, targets) == pytest.approx(engine.score(sources, targets), abs=0.5)
    sizes = [(folder / "model.bin").stat().st_size for folder in (tmp_path / "int8", student.parent / "converted")]
    assert sizes[0] < 0.6 * sizes[1]


def test_without_the_true_tying_scores_are_wrong(tmp_path: Path) -> None:
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-untyped]

    student = make("untied", tmp_path / "student")
    TransformersConverter(str(student)).convert(str(tmp_path / "theirs"))
    model = converted(student, tmp_path / "ours")
    sources, targets = rows(model)
    right = model.score(sources, targets)
    model._model = type(model._model)(str(tmp_path / "theirs"))
    model._words = json.loads((tmp_path / "theirs" / "shared_vocabulary.json").read_text())
    wrong = model.score(sources, targets)
    assert min(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 1e-3
    assert max(abs(a - b) for a, b in zip(right, wrong, strict=True)) > 0.3


def test_sizes_that_cannot_be_run_are_told(tmp_path: Path) -> None:
    # together 32 wide, and the hidden states 16
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    student = add_weights(make_causal_folder(tmp_path / "student", **sizes), make_causal_tokenizer())
    with pytest.raises(UserError, match=r"^to: ctranslate2 cannot run a student of these sizes \(.*; --to safetensors"):
        converted(student, tmp_path / "converted")


def test_what_cannot_be_run_is_told(tmp_path: Path, weights_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UserError, match=r"^to: ctranslate2 cannot run a 'mamba' student; it runs t5"):
        check_architecture(StudentFiles(tmp_path))
    with pytest.raises(UserError, match=r"^engine: .* holds no CTranslate2 model \(model.bin\); `lit-distill export"):
        load_engine(weights_folder, "ctranslate2")
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"^engine: .* holds a CTranslate2 model; allowed is ctranslate2"):
        load_engine(tmp_path, "transformers")
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r'^ctranslate2 is not installed: pip install "lit_distill\[ctranslate2\]"'):
        load_engine(tmp_path)
