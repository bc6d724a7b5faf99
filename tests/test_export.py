"""The saved student's folder and its card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from lit_distill.export import CardFacts, export_checkpoint, model_card
from lit_distill.modules import SingleTaskModule
from tests.students import make_student_folder

FACTS = CardFacts(
    method="StepByStep",
    dataset="cqa",
    student="t5-small",
    settings={"learning_rate": 5e-5, "rationale_weight": 0.5, "dropout": None},
    data={"splits": {"train": {"used": 10}}},
    metrics={"accuracy": 0.123456, "loss": 2.5},
)
PREFIXES = {"label": "say|it: ", "rationale": "why: "}
GENERATION = {"label": {"max_new_tokens": 7, "num_beams": 2}, "rationale": {"max_new_tokens": 9, "num_beams": 2}}


def test_the_card_says_what_it_was_given() -> None:
    lines = model_card(FACTS, PREFIXES, GENERATION).splitlines()
    assert lines[0] == "---"
    assert "library_name: transformers" in lines
    assert "# t5-small trained on cqa with StepByStep" in lines
    for row in (
        "| accuracy | 0.1235 |", "| loss | 2.5 |", "| learning_rate | 5e-05 |", "| rationale_weight | 0.5000 |",
        "| dropout | None |", "| splits.train.used | 10 |",
    ):  # fmt: skip
        assert row in lines
    [label] = [line for line in lines if line.startswith("| label |")]
    assert label.endswith("max_new_tokens 7, num_beams 2 |")


def test_the_card_leaves_out_what_is_not_known() -> None:
    card = model_card(CardFacts("Standard", "toy", "t5", settings={}), {"label": ""}, GENERATION)
    assert "## Metrics" not in card
    assert "## Data" not in card
    assert "## Method" not in card


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_becomes_a_folder_again_and_again(tied: bool, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    module = SingleTaskModule(make_student_folder(tmp_path / "student", tie_word_embeddings=tied), from_scratch=True)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "any.ckpt")
    prefixes = {"rationale_label": "x: "}
    # a folder that is there is overwritten
    for length in (5, 6):
        generation = {"rationale_label": {"max_new_tokens": length, "num_beams": 3}}
        folder = export_checkpoint(
            tmp_path / "any.ckpt", tmp_path / "a" / "b", prefixes=prefixes, generation=generation, facts=FACTS
        )
    assert folder == tmp_path / "a" / "b"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["prefix"] == "x: "
    assert config["task_specific_params"]["rationale_label"] == {"prefix": "x: ", "max_new_tokens": 6, "num_beams": 3}
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.num_beams) == (6, 3)
    for name, weight in module.student.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert (loaded.lm_head.weight.data_ptr() == loaded.shared.weight.data_ptr()) == tied
