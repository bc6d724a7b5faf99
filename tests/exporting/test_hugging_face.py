"""The saved student's folder and its card."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import sentencepiece
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lit_distill.exporting.hugging_face import CardFacts, export_checkpoint, model_card, origin
from lit_distill.modules import SingleTaskModule
from tests.students import WORDS, make_student_folder

TASKS = {
    "label": {"prefix": "say|it: ", "max_new_tokens": 7, "num_beams": 2},
    "rationale": {"prefix": "why: ", "max_new_tokens": 9, "num_beams": 2},
}
FACTS = CardFacts(
    method="StepByStep",
    dataset="cqa",
    student="t5-small",
    tasks=TASKS,
    settings={"learning_rate": 5e-5, "rationale_weight": 0.5, "dropout": None},
    data={"splits": {"train": {"used": 10}}, "data_dir": "/home/me/rows"},
    metrics={"accuracy": 0.123456, "accuracy_low": 0.1, "accuracy_high": 0.15, "loss": 2.5},
    rows=500,
    baseline={"test/accuracy": 0.11, "test/accuracy_low": 0.05, "test/accuracy_high": 0.2},
    base_model="google/t5-small",
    license="apache-2.0",
    hub_dataset="tau/commonsense_qa",
)


def test_the_card_says_what_it_was_given() -> None:
    lines = model_card(FACTS).splitlines()
    assert "# t5-small trained on cqa with StepByStep" in lines
    for row in (
        "| accuracy | 0.1235 | 0.1000 to 0.1500 |", "| loss | 2.5000 |  |", "| learning_rate | 5e-05 |",
        "| rationale_weight | 0.5000 |", "| dropout | None |", "| splits.train.used | 10 |", "| data_dir | rows |",
        "| accuracy of the label-only baseline | 0.1100 | 0.0500 to 0.2000 |", "Of 500 rows of test.",
    ):  # fmt: skip
        assert row in lines
    [label] = [line for line in lines if line.startswith("| label |")]
    assert label.endswith("max_new_tokens 7, num_beams 2 |")


def test_the_card_says_what_the_student_reads() -> None:
    plain = model_card(FACTS)
    assert "inputs = tokenizer('say|it: ' + \"your input\", return" in plain
    own = TASKS | {"label": TASKS["label"] | {"input": "{input}\n{rationale}", "after": "rationale"}}
    lines = model_card(CardFacts("StepByStep", "toy", "t5", own, settings={})).splitlines()
    [code] = [line for line in lines if line.startswith("inputs = ")]
    known = {"tokenizer": lambda text, return_tensors: text}
    made = eval(code.removeprefix("inputs = "), known)  # noqa: S307 - the card's own
    assert made == "say|it: your input\nits text for rationale"
    [row] = [line for line in lines if line.startswith("| label |")]
    assert row.endswith(
        '{input}\\n{rationale}"`; {rationale} is its text for rationale | max_new_tokens 7, num_beams 2 |'
    )
    assert '| rationale | `"why: {input}"` | max_new_tokens 9, num_beams 2 |' in lines


def test_the_card_leaves_out_what_is_not_known() -> None:
    card = model_card(CardFacts("Standard", "toy", "t5", TASKS, settings={}))
    assert "## Metrics" not in card
    assert "## Data" not in card
    assert "## Method" not in card
    data: Any = ModelCard(card).data
    assert (data.base_model, data.license, data.datasets, data.eval_results) == (None, None, None, None)


def test_the_hub_reads_the_card() -> None:
    data: Any = ModelCard(model_card(FACTS)).data
    assert data.library_name == "transformers"
    assert (data.base_model, data.license, data.datasets) == ("google/t5-small", "apache-2.0", ["tau/commonsense_qa"])
    assert data.model_name == "t5-small trained on cqa with StepByStep"
    # a loss is no result: other methods sum other terms
    [result] = data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.123456)
    assert result.metric_args == {"confidence_interval_95": [0.1, 0.15]}
    assert (result.dataset_type, result.dataset_name) == ("tau/commonsense_qa", "cqa")
    assert (result.dataset_split, result.dataset_args) == ("test", {"rows": 500})


def test_where_the_weights_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert origin("google/t5-small", from_scratch=True) == (None, None)
    assert origin(str(tmp_path), from_scratch=False) == (None, None)
    # a student that was exported here and is trained on
    (tmp_path / "README.md").write_text(model_card(FACTS))
    assert origin(str(tmp_path), from_scratch=False) == ("google/t5-small", "apache-2.0")
    monkeypatch.setattr(
        HfApi, "model_info", lambda self, name, timeout: SimpleNamespace(card_data=ModelCardData(license="mit"))
    )
    assert origin("google/t5-small", from_scratch=False) == ("google/t5-small", "mit")
    monkeypatch.undo()
    # the hub is not reached
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint="http://127.0.0.1:9"))
    assert origin("google/t5-small", from_scratch=False) == ("google/t5-small", None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_becomes_a_folder_again_and_again(tied: bool, tmp_path: Path) -> None:
    module = SingleTaskModule(make_student_folder(tmp_path / "student", tie_word_embeddings=tied), from_scratch=True)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "any.ckpt")
    folder = tmp_path / "a" / "b"
    # a folder that is there is overwritten
    for length in (5, 6):
        tasks = {"rationale_label": {"prefix": "x: ", "max_new_tokens": length, "num_beams": 3}}
        export_checkpoint(tmp_path / "any.ckpt", folder, replace(FACTS, tasks=tasks))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["prefix"] == "x: "
    assert config["task_specific_params"]["rationale_label"] == {"prefix": "x: ", "max_new_tokens": 6, "num_beams": 3}
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.num_beams) == (6, 3)
    for name, weight in module.student.model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert (loaded.lm_head.weight.data_ptr() == loaded.shared.weight.data_ptr()) == tied


def sentencepiece_folder(path: Path) -> Path:
    """A T5 as the hub has them: a SentencePiece model and no ``tokenizer.json``."""
    make_student_folder(path, tie_word_embeddings=False)
    (path / "tokenizer.json").unlink()
    text = path / "text.txt"
    text.write_text(
        "\n".join(f"the {first} is a {second} of {first}" for first in WORDS[9:26] for second in WORDS[9:26])
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path / "spiece"), vocab_size=28, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    extra = ["<extra_id_0>", "<extra_id_1>"]
    content = {"tokenizer_class": "T5Tokenizer", "extra_ids": 2, "additional_special_tokens": extra}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


def exported(student: Path, folder: Path) -> Path:
    """A student's folder after a checkpoint of a checkpoint, as a run that was resumed leaves it."""
    module = SingleTaskModule(student, from_scratch=True)
    for name in ("first.ckpt", "second.ckpt"):
        trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(student / name)
        module = SingleTaskModule(student / name)
    export_checkpoint(student / "second.ckpt", folder, FACTS)
    return folder


def test_the_tokenizer_is_written_in_the_words_of_transformers_4_too(tmp_path: Path) -> None:
    student = sentencepiece_folder(tmp_path / "student")
    folder = exported(student, tmp_path / "exported")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    # version 4 takes `extra_special_tokens` for a mapping
    assert "extra_special_tokens" not in content
    assert content["additional_special_tokens"] == ["<extra_id_0>", "<extra_id_1>"]
    assert content["tokenizer_class"] == "T5Tokenizer"
    # what the slow tokenizer is built from
    assert (folder / "spiece.model").read_bytes() == (student / "spiece.model").read_bytes()
    text = "the cat is <extra_id_1> dog"
    before, after = (AutoTokenizer.from_pretrained(path) for path in (student, folder))
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert after.convert_tokens_to_ids("<extra_id_1>") in after(text)["input_ids"]


def test_a_tokenizer_of_no_family_is_named_as_transformers_4_does(tmp_path: Path) -> None:
    folder = exported(make_student_folder(tmp_path / "student"), tmp_path / "exported")
    content = json.loads((folder / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (folder / "spiece.model").exists()


LOOK = """
import sys, torch, transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, out = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
batch = tokenizer(["the cat is <extra_id_1>", "a  dog </s> of"], return_tensors="pt", padding=True)
with torch.no_grad():
    logits = model(**batch, decoder_input_ids=torch.tensor([[0, 3, 4]] * 2)).logits
torch.save({"ids": batch["input_ids"], "logits": logits, "generated": model.generate(**batch)}, out)
print(transformers.__version__)
"""
V4 = "LIT_DISTILL_TRANSFORMERS_4"
"""A folder of ``pip install --no-deps --target FOLDER "transformers<5" "tokenizers<0.23" "huggingface_hub<1"``."""


@pytest.mark.skipif(V4 not in os.environ, reason=f"{V4} names no folder with transformers 4")
@pytest.mark.parametrize("kind", ["T5Tokenizer", "PreTrainedTokenizerFast"])
def test_transformers_4_reads_the_folder_as_5_does(kind: str, tmp_path: Path) -> None:
    make = sentencepiece_folder if kind == "T5Tokenizer" else make_student_folder
    folder = exported(make(tmp_path / "student"), tmp_path / "exported")
    found = {}
    for version, path in (("4", os.environ[V4]), ("5", "")):
        out = tmp_path / f"{version}.pt"
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-c", LOOK, str(folder), str(out)],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().startswith(f"{version}.")
        found[version] = torch.load(out)
    assert torch.equal(found["4"]["ids"], found["5"]["ids"])
    assert torch.equal(found["4"]["generated"], found["5"]["generated"])
    assert torch.allclose(found["4"]["logits"], found["5"]["logits"], atol=1e-5)
