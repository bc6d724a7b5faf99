"""Arguments: checked when the data module is made, one line each; described in --help; kept as plain values."""

import inspect
import io
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerFast

import lit_distill.data
from lit_distill.data import ANLIDataModule, CorpusDataModule, CQADataModule, JSONLDataModule, RationaleDataModule
from lit_distill.data.student import StudentDataModule
from lit_distill.errors import UserError
from lit_distill.tasks import Row
from tests.data.conftest import wrap

ARGUMENTS = [
    "data_dir", "tokenizer", "batch_size", "eval_batch_size", "tasks", "label_source", "rationale_filter",
    "train_fraction", "seed", "max_source_length", "max_target_length", "num_workers", "allow_extra_outputs",
    "predict_split", "batching", "rationales", "rationale_pairing", "select", "pseudo_labels", "row_weights",
]  # fmt: skip
MODULES = [name for name in lit_distill.data.__all__ if name != "RationaleDataModule"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_fraction": 1.5}, "train_fraction must be in (0, 1] or a whole number above 1, got 1.5"),
        ({"train_fraction": 0}, "train_fraction must be in (0, 1] or a whole number above 1, got 0"),
        ({"train_fraction": True}, "train_fraction must be in (0, 1] or a whole number above 1, got True"),
        ({"train_fraction": "half"}, "train_fraction must be in (0, 1] or a whole number above 1, got 'half'"),
        ({"train_fraction": float("nan")}, "train_fraction must be in (0, 1] or a whole number above 1, got nan"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1, got 2.0"),
        ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer in [0, 4294967295], got -1"),
        ({"seed": 2**32}, "seed must be an integer in [0, 4294967295], got 4294967296"),
        ({"max_source_length": 0}, "max_source_length must be an integer >= 1, got 0"),
        ({"max_target_length": None}, "max_target_length must be an integer >= 1, got None"),
        ({"num_workers": -1}, "num_workers must be an integer in [0, 256], got -1"),
        ({"allow_extra_outputs": "yes"}, "allow_extra_outputs must be true or false, got 'yes'"),
        ({"label_source": "human"}, "label_source must be one of gold, teacher, got 'human'"),
        ({"batching": "sorted"}, "batching must be one of shuffled, by_length, got 'sorted'"),
        ({"predict_split": "valid"}, "predict_split must be one of train, val, test, predict, got 'valid'"),
        (
            {"tasks": "label"},
            "tasks must be a list of names (label, rationale, rationale_label, label_rationale) or a mapping,"
            " got 'label'",
        ),
        (
            {"tasks": []},
            "tasks must be a list of names (label, rationale, rationale_label, label_rationale) or a mapping, got []",
        ),
        (
            {"tasks": ["label", "lable"]},
            "tasks must be one of label, rationale, rationale_label, label_rationale, got 'lable'",
        ),
        ({"tasks": ["label", "label"]}, "tasks must have different names, got ['label', 'label']"),
        ({"tasks": {"label": {"prefix": 1}}}, "tasks: label: prefix must be a text, got 1"),
        (
            {"tasks": {"label": {"prefix": "do: "}, "rationale": {"prefix": "do:"}}},
            "tasks: label and rationale both have the prefix 'do:'; give each its own",
        ),
        (
            {"rationale_filter": 3},
            "rationale_filter: got 3; allowed are none, label_agrees, conditions on columns, or a function"
            " (package.module.function)",
        ),
        ({"tokenizer": 3}, "tokenizer must be a hub name, a folder or a tokenizer object, got 3"),
        ({"round": 4}, "round must be one of 1, 2, 3, got 4"),
        ({"round": True}, "round must be one of 1, 2, 3, got True"),
    ],
)
def test_what_is_not_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ANLIDataModule(**arguments)
    assert str(caught.value) == message


def long_only(example: Row) -> bool:
    return len(example.rationale or "") > 10


def test_hyperparameters_are_plain(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    module = ANLIDataModule(tokenizer=tokenizer, data_dir=tmp_path, rationale_filter=long_only, tasks=("label",))
    assert set(module.hparams) == {*ARGUMENTS, "round"}
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    loaded = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert loaded["rationale_filter"] == "tests.data.test_arguments.long_only"
    assert loaded["data_dir"] == str(tmp_path)
    again = ANLIDataModule(**loaded)
    assert dict(again.hparams) == loaded
    own = JSONLDataModule(train=tmp_path / "x.jsonl", label_set=("a", "b"), batching="by_length")
    assert own.hparams["batching"] == "by_length"
    torch.save(dict(own.hparams), tmp_path / "hparams.pt")
    assert dict(JSONLDataModule(**torch.load(tmp_path / "hparams.pt", weights_only=True)).hparams) == dict(own.hparams)


@pytest.mark.parametrize("name", MODULES)
def test_every_argument_is_in_the_help(name: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(StudentDataModule, "data")
    own = [*inspect.signature(CorpusDataModule).parameters] if name == "CorpusDataModule" else ARGUMENTS
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        parser.parse_args([f"--data.help=lit_distill.data.{name}"])
    words = " ".join(shown.getvalue().split())
    for argument in own:
        # followed by its description, not by its type right away
        _, _, described = words.rpartition(f"--data.{argument} ")
        assert described
        assert not described.split(maxsplit=1)[1].startswith("(type:"), argument


def test_values_as_a_configuration_has_them() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(RationaleDataModule, "data")
    given = {"tasks": {"label": {"prefix": "a"}, "why": {"target": "{rationale}"}}, "tokenizer": "t5-small"}
    config = parser.parse_object({"data": {"class_path": "lit_distill.data.CQADataModule", "init_args": given}})
    module = parser.instantiate(config).data
    assert isinstance(module, CQADataModule)
    assert {name: (task.prefix, task.target) for name, task in module.tasks.items()} == {
        "label": ("a", "{label}"),
        "why": ("", "{rationale}"),
    }
    assert module.hparams["tokenizer"] == "t5-small"


def test_a_tokenizer_is_needed_where_it_is_used() -> None:
    with pytest.raises(UserError, match="tokenizer must be given"):
        _ = CQADataModule().tokenizer


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^tokenizer: none in the folder '.*empty'"):
        _ = CQADataModule(tokenizer=tmp_path / "empty").tokenizer


def test_a_tokenizer_without_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    headless = wrap(tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(UserError, match="needs a padding and an end-of-sequence token"):
        _ = CQADataModule(tokenizer=headless).tokenizer


def test_a_tokenizer_from_its_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    assert CQADataModule(tokenizer=tmp_path / "saved").tokenizer("ab")["input_ids"] == [97, 98, 1]
