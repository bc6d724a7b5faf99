"""``fit`` and ``validate`` on a corpus: what a student reads before it learns a task."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from lit_distill.comparison.runs import find_runs
from lit_distill.data import CorpusDataModule
from lit_distill.modules import SpanCorruptionModule
from lit_distill.records import read_record
from lit_distill.students import load
from tests.runs import CONFIGS, metric_rows, refusal, run, run_folders, small_model, small_trainer, toy_data
from tests.students import WORDS, make_causal_folder, make_student_folder

STOPPING = "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/text_loss}}]"

pytestmark = pytest.mark.usefixtures("here")


def documents(count: int = 400) -> list[str]:
    draw = random.Random(0)  # noqa: S311 - no secret
    return [" ".join(draw.choices(WORDS[3:], k=7)) for _ in range(count)]


@pytest.fixture
def student(here: Path) -> Path:
    return make_student_folder(here / "reader", sentinels=12, dropout_rate=0.1)


@pytest.fixture
def corpus(here: Path) -> Path:
    path = here / "corpus.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in documents()))
    return path


def reading(student: Path, corpus: Path) -> list[str]:
    data = [f"--data.train={corpus}", "--data.max_length=24", "--data.batch_size=4", "--data.shuffle_buffer=30"]
    model = [*small_model(student, "SpanCorruptionModule")[:3], "--model.learning_rate=0.01"]
    return [*model, "--data=CorpusDataModule", *data]


def test_a_student_reads_and_then_learns_a_task(
    student: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", reading(student, corpus), small_trainer(steps=4, every=2), f"--trainer.callbacks={STOPPING}")
    shown = capsys.readouterr().out
    [folder] = run_folders()
    assert folder.parent.name == "corpus-SpanCorruption-seed0"
    rows = [row for row in metric_rows(folder) if "val/loss" in row]
    assert [row["step"] for row in rows] == ["1", "3"]
    losses = [float(row["val/loss"]) for row in rows]
    for row, loss in zip(rows, losses, strict=True):
        assert float(row["val/text_loss"]) == loss
        assert float(row["val/perplexity"]) == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
        assert not any("accuracy" in name for name in row)
    # the best by the loss, without being told
    record = read_record(folder)
    assert record.validation["val/loss"] == pytest.approx(min(losses))
    assert (record.label_source, record.test_rows, record.steps, record.metrics) == ("none", 0, 4, {})
    # 4 sequences a step, whose sources have at most 24 tokens
    assert 4 * 4 * 20 < record.train_tokens < 4 * 4 * 32
    assert f"{record.train_tokens:,}" in shown
    assert f"{min(losses):.4f}" in shown
    assert "perplexity" in shown
    card = (folder / "student" / "README.md").read_text()
    assert "It has only read texts" in card
    assert "generate(" not in card
    # plain transformers read it, with the weights of the best checkpoint
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    best = torch.load(next((folder / "checkpoints").glob("best*.ckpt")), weights_only=True)["state_dict"]
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(plain.state_dict()[name], best[f"student.model.{name}"])
    assert AutoTokenizer.from_pretrained(folder / "student").get_vocab()["<extra_id_0>"] == len(WORDS) + 11

    run("validate", reading(folder / "student", corpus), small_trainer(), "--model.from_scratch=false")
    assert f"{min(losses):.4f}" in capsys.readouterr().out

    run("fit", small_model(folder / "student"), toy_data(), small_trainer(), "--test_after_fit=false")
    assert (run_folders()[-1] / "student" / "model.safetensors").exists()

    # a folder of runs is compared without it, which is said
    found, skipped = find_runs(["runs"])
    assert len(found) == 1
    assert list(skipped.values()) == ["it read a corpus, and was tested on no rows"]


def test_it_resumes_bit_exactly(student: Path, corpus: Path) -> None:
    parts = [reading(student, corpus), "--trainer.accumulate_grad_batches=2"]
    run("fit", parts, small_trainer(steps=6, every=3))
    [whole] = run_folders()
    first = next(whole.glob("checkpoints/best-step3.ckpt"), None) or whole / "checkpoints" / "last.ckpt"
    expected = load_file(whole / "student" / "model.safetensors")
    run("fit", parts, small_trainer(steps=3, every=3), "--trainer.default_root_dir=b", "--trainer.max_steps=6",
        "--trainer.limit_val_batches=1.0", f"--ckpt_path={first}")  # fmt: skip
    [again] = run_folders(Path("b/runs"))
    found = load_file(again / "student" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_record(again).train_tokens == read_record(whole).train_tokens


@pytest.mark.parametrize("family", ["seq2seq", "causal"])
def test_the_loss_is_that_of_transformers(family: str, student: Path, corpus: Path, here: Path) -> None:
    folder = student if family == "seq2seq" else make_causal_folder(here / "llama")
    made = load(folder, from_scratch=True, dropout=0.0 if family == "seq2seq" else None)
    made.save(here / "saved")
    module = SpanCorruptionModule(here / "saved", dropout=0.0 if family == "seq2seq" else None).double()
    data = CorpusDataModule(str(corpus), tokenizer=module.student.tokens, max_length=24, batch_size=6)
    data.setup("validate")
    batch = next(iter(data.train_dataloader()))
    inputs: Any = batch["text"]
    terms = module.loss_terms(module.step(batch))
    assert list(terms) == ["text"]
    if family == "seq2seq":
        plain = AutoModelForSeq2SeqLM.from_pretrained(here / "saved", dtype=torch.float64)
        expected = plain(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    else:
        # next-token loss on the whole packed sequence
        plain = AutoModelForCausalLM.from_pretrained(here / "saved", dtype=torch.float64)
        ids = torch.cat([inputs["input_ids"], inputs["labels"]], dim=1)
        logits = plain(input_ids=ids).logits[:, :-1]
        expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    # whatever the weights' precision, the loss is in float32
    torch.testing.assert_close(terms["text"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_budget_of_tokens_is_met(student: Path, corpus: Path) -> None:
    run("fit", reading(student, corpus), small_trainer(), "--max_tokens=1000", "--data.shuffle_buffer=400",
        "--trainer.max_steps=-1")  # fmt: skip
    record = read_record(run_folders()[0])
    # 26 tokens make a source of 24 and a target of 6: 120 a step of four
    assert record.steps == 8
    assert 0.9 * 1000 < record.train_tokens <= 1000


def test_what_does_not_go_with_a_corpus(student: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, toy = reading(student, corpus), [*small_model(student), *toy_data()]
    without = "CorpusDataModule has no labels, and is for fit and validate alone"
    mixed = "cannot be trained on"
    assert mixed in refusal(capsys, "fit", own, "--data=ToyDataModule")
    assert mixed in refusal(capsys, "fit", toy, "--data=CorpusDataModule", f"--data.train={corpus}")
    for command in ("test", "predict", "inspect", "annotate", "plan"):
        arguments = own[4:] if command in ("inspect", "annotate") else own
        line = refusal(capsys, command, arguments)
        assert line.startswith(f"data: {without}; allowed are ANLIDataModule, ")
    # as a run has saved it
    data = {"class_path": "lit_distill.data.CorpusDataModule", "init_args": {"train": str(corpus)}}
    Path("config.yaml").write_text(json.dumps({"data": data}))
    assert refusal(capsys, "inspect", "--config=config.yaml").startswith(f"data: {without}; allowed are ")
    assert refusal(capsys, "fit", own, "--baseline_after_fit=true").startswith("baseline_after_fit: not with a corpus")
    assert refusal(capsys, "fit", own, "--trainer.max_epochs=1", "--trainer.max_steps=-1").startswith("max_steps: must")
    for prefix in ("x", "''"):
        line = refusal(capsys, "fit", own, f"--model.tasks.label.prefix={prefix}")
        assert line.endswith("SpanCorruptionModule has the task text alone, not label")
    line = refusal(capsys, "fit", own, "--config", CONFIGS / "overlay" / "early_stopping.yaml")
    assert line == (
        "trainer.callbacks: EarlyStopping: no val/accuracy is logged on a corpus, which has no labels;"
        " monitor val/loss, with mode: min"
    )
    assert refusal(capsys, "fit", own, "--checkpoint.monitor=val/macro_f1").startswith("checkpoint: no val/macro_f1 is")
    assert refusal(capsys, "fit", own, "--model.vote={samples: 3}").startswith("vote: no label is parsed from texts of")
    line = refusal(capsys, "fit", own, small_trainer(), "--model.objectives=[{class_path: AnswerConsistency}]")
    assert line.startswith("objectives: a corpus keeps no tokenised rows")
    line = refusal(capsys, "fit", own, small_trainer(), "--data.max_length=400")
    assert line.startswith("tokenizer: ")
    assert "has 12 sentinels" in line
    assert not Path("runs").exists()
