"""``export``: what it writes, proves and refuses; and ``predict --engine`` on what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.exporting import parity
from lit_distill.exporting.engine import CTranslate2Engine
from lit_distill.exporting.predictor import load_predictor
from lit_distill.students import load
from tests.runs import QUIET, read_lines, refusal, run, run_folders, small_model, small_trainer, toy_data, write_lines
from tests.students import (
    WORDS,
    add_weights,
    make_causal_folder,
    make_causal_tokenizer,
    make_student_folder,
    make_unigram_tokenizer,
)

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def student(here: Path) -> Path:
    """A student whose texts differ from row to row."""
    return add_weights(make_student_folder(here / "student", vocab_size=72))


def eight_rows() -> list[str]:
    """Test rows of words that the students know."""
    texts = [" ".join(WORDS[5 + (3 * i + j) % 25] for j in range(1 + i)) for i in range(8)]
    write_lines(Path("test.jsonl"), [{"id": str(i), "input": text, "label": "cat"} for i, text in enumerate(texts)])
    return ["--data=JSONLDataModule", "--data.test=test.jsonl"]


def made(student: Path) -> list[str]:
    """The config of a method with short texts."""
    return [*small_model(student), *eight_rows()]


def export(student: Path, *more: object) -> dict[str, Any]:
    run("export", student, made(student), "--rows=8", "--json=found.json", *more)
    found: dict[str, Any] = json.loads(Path("found.json").read_text())
    return found


def test_an_export_is_proven_timed_and_written_whole(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = export(student, "--out=small", "--quantization=float32")
    assert json.loads(Path("small/export.json").read_text()) == found
    assert found["parity"]["passed"]
    assert found["parity"]["bounds"] == {"score": 1e-3, "texts": 1.0, "accuracy": 0.0}
    assert set(found["parity"]["tasks"]) == {"label", "rationale"}
    assert [task["scored"] for task in found["parity"]["tasks"].values()] == [8, 0]
    for task in found["parity"]["tasks"].values():
        assert task.get("score", 0) < 1e-4
        assert (task["greedy"], task["beams"]) == (1, 1)
    assert found["parity"]["accuracy"]["difference"] == 0
    assert set(found["speed"]) == {"transformers float32", "ctranslate2 float32"}
    for speed in found["speed"].values():
        assert set(speed) == {
            "megabytes", "accuracy", "rows_a_second", "batch_1_p50_ms", "batch_1_p99_ms", "batch_8_p50_ms",
            "batch_8_p99_ms",
        }  # fmt: skip
        assert all(value > 0 or name == "accuracy" for name, value in speed.items())
    shown = capsys.readouterr().out
    assert "parity on 8 test rows: passed" in shown
    assert shown.splitlines()[-1].strip() == "small"
    predictor = load_predictor("small")
    assert isinstance(predictor.engine, CTranslate2Engine)
    assert {name: (task.prefix, task.max_new_tokens) for name, task in predictor.tasks.items()} == {
        "label": ("predict: ", 3), "rationale": ("explain: ", 4),
    }  # fmt: skip


def test_a_folder_tells_its_tasks_where_the_config_has_none(student: Path) -> None:
    content = json.loads((student / "config.json").read_text())
    content["task_specific_params"] = {"label": {"prefix": "the: ", "max_new_tokens": 3, "num_beams": 2}}
    (student / "config.json").write_text(json.dumps(content))
    run(
        "export",
        student,
        toy_data(),
        "--data.test_size=8",
        "--rows=8",
        "--out=small",
        "--quantization=int8",
        "--write_anyway",
    )
    described = json.loads(Path("small/student/config.json").read_text())
    assert described["task_specific_params"] == content["task_specific_params"]
    assert (described["prefix"], described["decoder_start_token_id"]) == ("the: ", 0)
    report = json.loads(Path("small/export.json").read_text())
    assert set(report["speed"]) == {"transformers float32", "ctranslate2 float32", "ctranslate2 int8"}
    sizes = {name: speed["megabytes"] for name, speed in report["speed"].items()}
    assert sizes["ctranslate2 int8"] < sizes["ctranslate2 float32"]
    # those that are given count
    given = "--data.tasks={label: {prefix: 'own: ', max_new_tokens: 2}}"
    run("export", student, eight_rows(), "--rows=8", "--out=other", given)
    described = json.loads(Path("other/student/config.json").read_text())
    assert described["task_specific_params"] == {"label": {"prefix": "own: ", "max_new_tokens": 2, "num_beams": 2}}


def test_a_run_has_its_own_config_and_its_checkpoint_is_the_same_student(student: Path) -> None:
    # no length is configured: the longest label of train says it
    method = [f"--model.student={student}", "--model=StandardModule"]
    run("fit", method, toy_data(), small_trainer(), "--test_after_fit=false", "--data.max_target_length=9")
    [folder] = run_folders()
    [best] = (folder / "checkpoints").glob("best*.ckpt")
    run("export", folder, "--rows=5", "--out=of_run")
    config = [f"--config={folder / 'config.yaml'}"]
    run("export", best, config, "--rows=5", "--out=of_checkpoint")
    kept = [json.loads(Path(name, "student", "config.json").read_text()) for name in ("of_run", "of_checkpoint")]
    assert kept[0]["task_specific_params"] == kept[1]["task_specific_params"]
    assert kept[0]["task_specific_params"]["label"]["max_new_tokens"] < 9
    models = [Path(name, "model.bin").read_bytes() for name in ("of_run", "of_checkpoint")]
    assert models[0] == models[1]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_folder_in_bfloat16(family: str, here: Path, student: Path) -> None:
    if family == "llama":
        student = add_weights(make_causal_folder(here / "llama"), make_causal_tokenizer())
    found = export(student, "--to=safetensors", "--quantization=bf16", "--out=half", "--write_anyway")
    kept, before = load("half", dtype="bfloat16").state_dict(), load(student).state_dict()
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name].bfloat16()) for name in kept)
    assert found["parity"]["tasks"]["label"]["score"] > 0
    assert set(found["speed"]) == {"transformers float32", "safetensors bf16"}


def test_a_file_for_llama_cpp(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    student = add_weights(make_student_folder(here / "student", vocab_size=72, d_model=32), make_unigram_tokenizer())
    found = export(student, "--to=gguf", "--quantization=int8", "--out=small", "--write_anyway")
    assert {path.name for path in Path("small").iterdir()} >= {"model.gguf", "config.json", "export.json"}
    assert 0 < found["parity"]["tasks"]["label"]["token_score"] < 0.1
    # the folder's other files are as large as this tiny file
    assert {name: [*one] for name, one in found["speed"].items()} == {
        "transformers float32": ["megabytes"],
        "gguf int8": ["megabytes"],
    }
    assert load_predictor("small").tasks["rationale"].max_new_tokens == 4
    assert capsys.readouterr().out.splitlines()[-1].strip() == "small"
    monkeypatch.setattr("lit_distill.commands.export.same_pieces", lambda tokens, folder, texts: 0.875)
    parity = export(student, "--to=gguf", "--out=other", "--write_anyway")["parity"]
    assert parity["faults"] == ["tokenizer: 87.5% of the inputs are in the same pieces, allowed is 100%"]
    assert not parity["passed"]


def test_one_that_is_beyond_the_bounds_is_not_written(
    student: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(parity.BOUNDS, "float32", parity.Bounds(1e-9))
    arguments = [student, made(student), "--rows=8", "--out=small"]
    before = sorted(here.iterdir())
    line = refusal(capsys, "export", arguments)
    assert line.startswith("parity: label: score ")
    assert line.endswith("apart, allowed is 1e-09; nothing is written without --write_anyway")
    assert [path for path in sorted(here.iterdir()) if path.name != "token-cache"] == before
    run("export", arguments, "--write_anyway", "--json=found.json")
    assert not json.loads(Path("found.json").read_text())["parity"]["passed"]
    assert load_predictor("small").generate(["cat"], "label")


def test_predictions_of_an_engine_are_those_of_the_student(weights_folder: Path) -> None:
    # whose tokenizer has all ids
    student = weights_folder
    export(student, "--out=small")
    more = [*small_trainer(), "--data.eval_batch_size=5", "--model.num_beams=1"]
    run("predict", made(student), more, "--predictions=own.jsonl")
    run("predict", made(Path("small")), more, "--predictions=fast.jsonl", "--engine=ctranslate2")
    own = read_lines(Path("own.jsonl"))
    assert read_lines(Path("fast.jsonl")) == own
    assert len({row["prediction"] for row in own}) > 2


def test_refusals(student: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [*toy_data(), "--out=small"]
    (here / "bare").mkdir()
    (here / "bare" / "config.json").write_text((student / "config.json").read_text())
    mamba = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 64}
    strange = make_causal_folder(here / "strange")
    (strange / "config.json").write_text(json.dumps(mamba))
    for arguments, line in (
        (data, "student: must be given first, as in `lit-distill export RUN"),
        ([student, toy_data(), "--out=bare"], "out: 'bare' exists; give a new folder"),
        ([student, data, "--to=onnx"], "to: got onnx; allowed is one of 'ctranslate2', 'safetensors'"),
        ([student, data, "--to=safetensors", "--quantization=int8"], "quantization: of safetensors must be one of"),
        ([student, data], "rows: test has 5 rows, 200 are needed; --rows 5 takes all of them"),
        ([student, data, "--rows=6"], "rows: test has 5 rows, 6 are needed"),
        (["bare", data], "tokenizer: none in the folder 'bare'"),
        ([student, data, "--to=gguf"], "to: gguf needs a tokenizer of SentencePiece's unigram pieces, as T5's"),
        ([strange, data, "--rows=5"], "to: ctranslate2 cannot run a 'mamba' student; it runs t5, mt5, llama"),
    ):
        assert refusal(capsys, "export", arguments).startswith(line)
    assert not Path("small").exists()
    predict = ["predict", small_model(student), data[:-1], QUIET, "--engine=ctranslate2"]
    assert refusal(capsys, predict).startswith(f"engine: '{student}' holds no CTranslate2 model")


def test_a_delta_to_its_base(student: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = add_weights(make_student_folder(here / "base", d_model=64))
    tuned = load(base)
    with torch.no_grad():
        tuned.network.get_encoder().block[0].layer[1].DenseReluDense.wo.weight.mul_(1.01)  # small enough for the gate
        tuned.network.lm_head.weight.mul_(1.01)
    tuned.save(here / "tuned")
    found = export(here / "tuned", "--to=delta", "--base=base", "--bits=8", "--out=small")
    assert found["parity"]["passed"]
    assert found["parity"]["bounds"] == vars(parity.BOUNDS["delta"])
    assert found["delta"]["base"] == "base"
    assert found["delta"]["megabytes"] < (here / "tuned" / "model.safetensors").stat().st_size / 2e6
    assert set(found["speed"]) == {"transformers float32", "delta"}
    assert "delta to base: 0." in capsys.readouterr().out
    predictor = load_predictor("small")
    assert predictor.tasks["rationale"].max_new_tokens == 4
    whole = [here / "tuned", made(student), "--rows=8", "--out=other"]
    for more, line in [
        (["--to=delta"], "base: must be given with --to delta, and with it alone"),
        (["--bits=2"], "bits: only with --to delta; --quantization says them of the others"),
    ]:
        assert refusal(capsys, "export", whole, more).startswith(line)
        assert not Path("other").exists()
