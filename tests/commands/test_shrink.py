"""``shrink``: a student that trains as any other, and bad input in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lit_distill.shrinking import importance
from lit_distill.students import load_tokenizer
from tests.runs import metric_rows, refusal, run, run_folders, small_model, small_toy, toy_data, write_lines
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder

pytestmark = pytest.mark.usefixtures("here")

SMALLER = {
    "t5": ["--encoder_layers=uniform:2", "--decoder_layers=0", "--d_ff=20", "--heads=1", "--d_model=12"],
    "llama": ["--layers=first:2", "--d_ff=20", "--heads=2", "--d_model=16"],
}


def large(kind: str) -> Path:
    if kind == "t5":
        return add_weights(make_student_folder(Path("large"), num_layers=3, d_model=24, vocab_size=72))
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 24,
        "head_dim": 8,
    }
    return add_weights(make_causal_folder(Path("large"), **sizes), make_causal_tokenizer())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_smaller_student_trains(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "LONGEST", 3)
    student = large(kind)
    Path("words.txt").write_text("predict: cat\nexplain: 7 because dog\n")
    given = ["--importance=features", "--rows=6", "--vocabulary", "words.txt", "train", "--json=report.json"]
    run("shrink", f"--from={student}", "--out=small", small_model(student), toy_data(), SMALLER[kind], given)
    report = json.loads(Path("report.json").read_text())
    shown = capsys.readouterr().out
    assert "small, from large" in shown
    assert "--model.student small --model.from_scratch false\n" in shown
    auto: Any = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained("small")
    assert report["after"]["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert report["before"]["parameters"] > 1.5 * report["after"]["parameters"]
    assert report["after"]["bytes"] == 4 * report["after"]["parameters"]
    assert report["after"]["vocabulary"] == len(load_tokenizer("small")) < report["before"]["vocabulary"]
    assert {"label loss", "rationale loss"} <= report["before"].keys() & report["after"].keys()
    assert report["layers"] == ({"encoder": [0, 2], "decoder": [0]} if kind == "t5" else {"decoder": [0, 1]})
    run("fit", small_toy(Path("small"), 1), "--test_after_fit=false")
    (folder,) = run_folders()
    losses = [float(row["train/label_loss"]) for row in metric_rows(folder) if "train/label_loss" in row]
    assert all(torch.tensor(losses).isfinite())


def test_the_loss_stays_where_only_unused_pieces_go() -> None:
    student = large("t5")
    run(
        "shrink",
        f"--from={student}",
        "--out=small",
        small_model(student),
        toy_data(),
        "--vocabulary",
        "train",
        "--json=report.json",
    )
    report = json.loads(Path("report.json").read_text())
    # the softmax has fewer rivals
    assert 0 < report["after"]["label loss"] < report["before"]["label loss"]
    # the prefixes of the tasks, whichever words the rows have
    assert {"predict:", "explain:"} <= load_tokenizer("small").get_vocab().keys()


def test_the_words_of_a_label_set_stay() -> None:
    write_lines(Path("train.jsonl"), [{"question": f"{i} a", "answer": ("cat", "dog")[i % 2]} for i in range(6)])
    Path("words.txt").write_text("because\n")
    data = ["--data=JSONLDataModule", "--data.train=train.jsonl", "--data.input_column=question"]
    data += ["--data.label_column=answer", "--data.label_set=[cat,dog]"]
    run("shrink", f"--from={large('t5')}", "--out=small", data, "--vocabulary", "words.txt")
    words = load_tokenizer("small").get_vocab().keys()
    assert {"cat", "dog", "because", "</s>", "<pad>", "7"} <= words
    assert not {"red", "blue", "31"} & words


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give what is to be smaller: layers, encoder_layers, decoder_layers, d_ff, heads, d_model or vocabulary"),
        (["--layers=uniform:4"], "layers: 'uniform:4' must keep 1 to 2 layers, as the model has 2"),
        (["--layers=0,1", "--decoder_layers=0"], "layers: not with decoder_layers, which is of one stack alone"),
        (["--d_ff=33"], "d_ff must be an integer in [1, 32], got 33"),
        (["--heads=0"], "heads must be an integer in [1, 2], got 0"),
        (["--layers=0", "--importance=magnitude"], "importance: only with d_ff, heads, d_model; "),
        (["--d_ff=4", "--importance=features"], "importance: features needs rows; give a config with data, or --data"),
        (["--vocabulary", "train"], "vocabulary: train needs rows; give a config with data, or --data"),
        (
            ["--vocabulary", "nowhere.txt"],
            "vocabulary: no file 'nowhere.txt'; allowed are text files in UTF-8, and train",
        ),
        (["--layers=0", "--sentinels"], "sentinels: only with vocabulary; without it all pieces stay"),
        (["--layers=0", "--json=none/report.json"], "json: there is no folder "),
        (["--layers=0", "--json=full"], "json: 'full' is a folder; give a file"),
        pytest.param(
            *(["--layers=0", "--trainer.accelerator=gpu"], "trainer: "),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--layers=0", "--out=full"], "out: 'full' exists; give a new folder"),
        (["--layers=0", "--rows=0"], "rows must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], said: str, weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("full").mkdir()
    Path("full", "kept.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    line = refusal(capsys, "shrink", f"--from={weights_folder}", "--out=small", given)
    assert line.startswith(said), line
    assert sorted(Path().rglob("*")) == before


def test_heads_that_share_their_keys_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "shrink", f"--from={large('llama')}", "--out=small", "--heads=3")
    assert line == "heads: 3 must be a multiple of 2, as 2 heads share their keys and values"
    assert refusal(capsys, "shrink", "--from=large", "--out=small", "--encoder_layers=0").startswith(
        "encoder_layers: the"
    )
