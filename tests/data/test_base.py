"""From released files to batches and answers, on a small dataset whose tokens are character codes."""

import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW
from lit_distill.data import CQADataModule, ESNLIDataModule, JSONLDataModule, SVAMPDataModule, base
from lit_distill.data.batches import EpochSampler, ResumableLoader
from lit_distill.errors import UserError
from tests.data.conftest import WriteCQA, WriteLines, cqa_output

BOTH = ("label", "rationale")


def text(ids: torch.Tensor) -> str:
    """The characters of a row, without padding, up to its end token."""
    codes = [code for code in ids.tolist() if code not in (0, IGNORE_INDEX)]
    assert codes[-1] == 1
    return "".join(map(chr, codes[:-1]))


def all_of(loader: DataLoader[Any], task: str, part: str) -> list[str]:
    return [text(row) for batch in loader for row in batch[task][part]]


def test_training_batches_hold_what_the_files_say(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    outputs = [cqa_output(i) for i in range(20)]
    outputs[3] = outputs[11] = "Nothing to be read."
    data = write_cqa(outputs=outputs)
    module = CQADataModule(data_dir=data, tokenizer=tokenizer, tasks=BOTH, batch_size=4)
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert (len(loader), len(loader.dataset)) == (5, 18)  # type: ignore[arg-type]
    val = set(module.answer_key("val").ids)
    expected = [i for i in range(20) if f"q{i}" not in val]
    inputs = all_of(loader, "label", "input_ids")
    assert sorted(inputs) == sorted(f"predict: Q{i}?\nAnswer Choices:\n(a) yes\n(b) no" for i in expected)
    assert set(all_of(loader, "label", "labels")) == {"yes"}
    parsed = [i for i in expected if i not in (3, 11)]
    assert sorted(all_of(loader, "rationale", "labels")) == sorted(f"Because {i}." for i in parsed)
    for batch in loader:
        for source, target in zip(batch["rationale"]["input_ids"], batch["rationale"]["labels"], strict=True):
            number = text(target).removeprefix("Because ").removesuffix(".")
            assert text(source).startswith(f"explain: Q{number}?")
    counts = module.counts["train"]
    assert counts["rows"] == counts["used"] == 18
    assert counts["unparsed"] == len({3, 11} & set(expected))
    assert counts["parsed"] + counts["unparsed"] + counts["no_output"] == 18


def test_evaluation_batches_hold_every_row(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    module = CQADataModule(data_dir=write_cqa(test=5), tokenizer=tokenizer, tasks=BOTH, eval_batch_size=2)
    module.setup("test")
    batches = list(module.test_dataloader())
    assert [batch["label"]["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [batch["rationale"]["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    # no teacher wrote of test here: the row is there, its targets are not
    assert all((batch["rationale"]["labels"] == IGNORE_INDEX).all() for batch in batches)
    assert [text(row) for row in batches[0]["label"]["labels"]] == ["yes", "yes"]


def lengths(inputs: Any) -> list[int]:
    found: list[int] = inputs["attention_mask"].sum(dim=1).tolist()
    return found


def test_answers(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    outputs = [cqa_output(i, "no" if i % 2 else "yes") for i in range(20)]
    data = write_cqa(outputs=["?" if i == 2 else output for i, output in enumerate(outputs)])
    module = CQADataModule(data_dir=data, tasks=[*BOTH, "rationale_label"], label_source="teacher")
    labels = [example.label for example in module.used_rows("train").rows]
    key = module.answer_key("val")
    assert len(key) == len(set(key.ids)) == 2
    assert key.labels == ["yes", "yes"]  # gold, whatever the student is trained on
    assert key.inputs[0].startswith("Q")
    assert key.choices == [("yes", "no")] * 2
    assert (key.metric, key.label_set) == ("exact_match", None)
    train = module.answer_key("train")
    assert set(train.labels) == {"yes"}
    assert key.majority_label == max(("no", "yes"), key=labels.count)
    assert module.answer_key("val") is key


def test_the_majority_is_known_once_train_is_read(write_cqa: WriteCQA) -> None:
    module = CQADataModule(data_dir=write_cqa())
    assert module.majority_label is None
    module.used_rows("train")
    assert module.answer_key("test").majority_label == "yes"


def test_val_does_not_move_with_seed_or_fraction(write_cqa: WriteCQA) -> None:
    data = write_cqa(train=40)
    ids = [
        module.answer_key("val").ids
        for module in (
            CQADataModule(data_dir=data),
            CQADataModule(data_dir=data, seed=5, train_fraction=0.1, label_source="teacher", tasks=BOTH),
        )
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 4


def test_inputs_that_test_shares_with_train_are_said(
    tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA, caplog: pytest.LogCaptureFixture
) -> None:
    module = CQADataModule(data_dir=write_cqa(train=40, test=4), tokenizer=tokenizer)
    held = {text.partition("\n")[0] for text in module.answer_key("val").inputs}
    shared = len({f"Q{i}?" for i in range(4)} - held)
    assert module.repeated_rows("test") == shared > 0
    for _ in range(2):
        module.setup("fit")
    assert caplog.text.count(f"cqa test: {shared} of 4 rows have an input that is also in train") == 1
    assert caplog.text.count("also in train") == 1


def test_label_agrees_is_by_the_dataset_s_metric(tmp_path: Path, write_lines: WriteLines) -> None:
    rows = [{"input": f"{i}?", "label": "( 4.0 / 2.0 )"} for i in range(10)]
    write_lines(tmp_path / "svamp" / "svamp_train.json", rows)
    (tmp_path / "svamp" / "llm").mkdir()
    outputs = [f"So. The answer is ({4 + i % 2} / 2)." for i in range(10)]
    (tmp_path / "svamp" / "llm" / "train_CoT_0.json").write_text(json.dumps(outputs))
    module = SVAMPDataModule(data_dir=tmp_path, tasks=BOTH, rationale_filter="label_agrees")
    examples = module.used_rows("train").rows
    assert {(row.rationale is None, int(row.id.rpartition("-")[2]) % 2) for row in examples} == {(False, 0), (True, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": BOTH}, "tasks: rationale has no target in train: .*needs teacher outputs of kind rationale"),
        (
            {"tasks": ["label_rationale"]},
            "tasks: label_rationale has no target in train: .*needs labels and teacher outputs of kind rationale",
        ),
        ({"label_source": "teacher"}, "tasks: label has no target in train: .*needs labels of the teacher"),
        (
            {"rationale_filter": "label_agrees", "tasks": ("label", "rationale")},
            "rationale_filter: label_agrees leaves no rationale",
        ),
    ],
)
def test_train_without_teacher_outputs(
    arguments: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA
) -> None:
    data = write_cqa(outputs=[])
    with pytest.raises(UserError, match=rf"^{message}"):
        CQADataModule(data_dir=data, tokenizer=tokenizer, **arguments).setup("fit")
    CQADataModule(data_dir=data, tokenizer=tokenizer, **arguments).setup("test")
    CQADataModule(data_dir=data, tokenizer=tokenizer).setup("fit")


def nli(folder: Path, *words: str) -> Path:
    (folder / "esnli").mkdir(exist_ok=True)
    for word in words:
        rows = [{"premise": f"{word} {i}", "hypothesis": "h", "label": i % 3} for i in range(4)]
        (folder / "esnli" / f"esnli_{word}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    ("present", "stage", "missing"),
    [
        (["valid", "test"], "fit", "train"),
        (["train", "test"], "fit", "val"),
        (["train", "test"], "validate", "val"),
        (["train", "valid"], "test", "test"),
        (["train", "valid"], "predict", "test"),
    ],
)
def test_an_absent_split_is_an_error_where_it_is_needed(
    present: list[str],
    stage: str,
    missing: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = ESNLIDataModule(data_dir=nli(tmp_path, *present), tokenizer=tokenizer)
    module.prepare_data()  # some are there: nothing is downloaded
    word = {"val": "valid"}.get(missing, missing)
    with pytest.raises(
        UserError, match=rf"^data_dir: esnli has no {missing} split \(.*esnli_{word}\.json\), and {stage} needs it"
    ):
        module.setup(stage)
    available = {"train": "predict", "valid": "validate", "test": "test"}
    module.predict_split = "train"
    caplog.set_level(logging.WARNING)
    for word in present:
        module.setup(available[word])
    assert caplog.text.count(f"esnli has no {missing} split") == 1


def test_setup_is_done_once_and_only_for_the_stage(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    module = CQADataModule(data_dir=write_cqa(), tokenizer=tokenizer)
    module.setup("fit")
    assert set(module.counts) == {"train", "val"}
    with pytest.raises(RuntimeError, match="setup has not built the test split"):
        module.test_dataloader()
    with patch.object(base, "tokenize_once", side_effect=AssertionError("tokenised again")):
        module.setup("fit")
        module.setup("validate")
        with pytest.raises(AssertionError, match="tokenised again"):
            module.setup("test")


def test_a_new_start_reads_the_cache(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    data = write_cqa()
    CQADataModule(data_dir=data, tokenizer=tokenizer, tasks=BOTH).setup("fit")
    second = CQADataModule(data_dir=data, tokenizer=tokenizer, tasks=BOTH)
    with patch.object(type(tokenizer), "__call__", side_effect=AssertionError("tokenised again")):
        second.setup("fit")
        third = CQADataModule(data_dir=data, tokenizer=tokenizer, tasks=BOTH, label_source="teacher", seed=1)
        third.setup("validate")
    assert len(list(second.train_dataloader())) == 1


def test_the_cache_is_where_it_was_asked_for(
    tokenizer: PreTrainedTokenizerFast,
    write_cqa: WriteCQA,
    tmp_path: Path,
    token_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_cqa()
    CQADataModule(data_dir=data, tokenizer=tokenizer).setup("test")
    assert any(token_cache.glob("cqa-test-*"))
    monkeypatch.delenv("LIT_DISTILL_CACHE")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    CQADataModule(data_dir=data, tokenizer=tokenizer).setup("test")
    assert any((tmp_path / "hf" / "lit_distill").glob("cqa-test-*"))


def test_truncation_is_counted_and_said(
    tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA, caplog: pytest.LogCaptureFixture
) -> None:
    module = CQADataModule(
        data_dir=write_cqa(), tokenizer=tokenizer, tasks=BOTH, max_source_length=10, max_target_length=5
    )
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert "cqa train: rows 18, parsed 18, teacher correct " in caplog.text
    # 18 rows: both tasks' inputs are cut, of the targets only the rationales (`yes` and its end are 4 tokens)
    assert module.counts["train"]["truncated_inputs"] == 36
    assert module.counts["train"]["truncated_targets"] == 18
    assert "36 truncated inputs, 18 truncated targets (max_source_length 10, max_target_length 5)" in caplog.text
    assert set(all_of(module.train_dataloader(), "rationale", "labels")) == {"Beca"}


def test_describe_is_plain(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    module = CQADataModule(data_dir=write_cqa(), tokenizer=tokenizer, tasks=BOTH, train_fraction=0.5)
    module.setup("fit")
    described = module.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["splits"]["train"]["left_out_by_fraction"] == 9
    assert described["splits"]["train"]["used"] == 9
    assert described["dataset"] == "cqa"


def stand_in(rank: int, world: int, limit: float = 1.0) -> Any:
    limits = {f"limit_{stage}_batches": limit for stage in ("val", "test", "predict")}
    return SimpleNamespace(global_rank=rank, world_size=world, **limits)


def test_ranks_share_the_rows(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    seen: list[list[int]] = []
    data = write_cqa(test=5)
    for rank in range(2):
        module = CQADataModule(data_dir=data, tokenizer=tokenizer)
        module.setup("test")
        module.setup("fit")
        module.trainer = stand_in(rank, 2)
        (batch,) = module.test_dataloader()
        seen.append(batch["label"]["index"].tolist())
        sampler = module.train_dataloader().sampler
        assert isinstance(sampler, EpochSampler)
        assert (sampler.rank, sampler.num_replicas, len(sampler)) == (rank, 2, 9)
    assert seen == [[0, 2, 4], [1, 3, PADDING_ROW]]


def lengthy(folder: Path, write_lines: WriteLines, train: int = 4, test: int = 0) -> dict[str, Any]:
    """Files, and the arguments that name them: rows of 1, 2, ... letters in a mixed order, with their own label."""

    def rows(count: int) -> list[dict[str, Any]]:
        sizes = [(7 * i) % count + 1 for i in range(count)]
        return [{"input": "x" * size, "label": "yes", "rationale": "y" * size} for size in sizes]

    arguments: dict[str, Any] = {"train": write_lines(folder / "train.jsonl", rows(train))}
    if test:
        arguments["test"] = arguments["val"] = write_lines(folder / "test.jsonl", rows(test))
    return arguments


def sources(loader: DataLoader[Any]) -> list[list[int]]:
    """The lengths of the label task's inputs without their end, batch by batch."""
    return [[length - 1 for length in lengths(batch["label"])] for batch in loader]


def test_evaluation_reads_the_longest_rows_first(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    module = JSONLDataModule(**lengthy(tmp_path, write_lines, test=10), tokenizer=tokenizer, eval_batch_size=4)
    module.setup("test")
    assert sources(module.test_dataloader()) == [[10, 9, 8, 7], [6, 5, 4, 3], [2, 1]]
    # row i has 7i mod 10 + 1 letters; an index is still a position in the file
    for batch in module.test_dataloader():
        index = batch["label"]["index"].tolist()
        assert [(7 * i) % 10 + 2 for i in index] == list(lengths(batch["label"]))


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (5, 3), (0.4, 1), (0.7, 2), (1.0, 3)])
def test_a_limited_evaluation_reads_the_first_rows(
    limit: float, batches: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    data = JSONLDataModule(
        **lengthy(tmp_path, write_lines, test=10), tokenizer=tokenizer, eval_batch_size=4, predict_split="val"
    )
    module = Silent()
    trainer = make_trainer(tmp_path, limit_val_batches=limit, limit_test_batches=limit, limit_predict_batches=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers
        trainer.validate(module, data, verbose=False)
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data)
    assert set(module.rows) == {"val", "test", "predict"}
    for rows in module.rows.values():
        if limit == 1.0 and isinstance(limit, float):
            assert rows == sorted(range(10), key=lambda i: -((7 * i) % 10))
        else:
            assert rows == list(range(min(10, 4 * batches)))


@pytest.mark.parametrize("world", [1, 2])
def test_training_batches_by_length(
    world: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    data = JSONLDataModule(
        **lengthy(tmp_path, write_lines, train=201),
        val=tmp_path / "train.jsonl",
        tokenizer=tokenizer,
        tasks=BOTH,
        batch_size=4,
    )
    data.setup("fit")
    spread = {}
    for data.batching in ("shuffled", "by_length"):
        ranks = []
        for rank in range(world):
            data.trainer = stand_in(rank, world)
            ranks.append(sources(data.train_dataloader()))
            assert [len(batch) for batch in ranks[-1]] == {1: [4] * 50 + [1], 2: [4] * 25 + [1]}[world]
        seen = {length for rank in ranks for batch in rank for length in batch}
        assert seen == {length + len("predict: ") for length in range(1, 202)}
        spread[data.batching] = sum(max(batch) - min(batch) for rank in ranks for batch in rank)
    assert spread["by_length"] < spread["shuffled"] / 2


def test_a_pass_by_length_goes_on_where_it_was_left(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    files = lengthy(tmp_path, write_lines, train=30)

    def loader() -> ResumableLoader:
        data = JSONLDataModule(
            **files, val=tmp_path / "train.jsonl", tokenizer=tokenizer, batch_size=4, batching="by_length"
        )
        data.setup("fit")
        found = data.train_dataloader()
        assert isinstance(found, ResumableLoader)
        return found

    whole = loader()
    assert isinstance(whole.sampler, EpochSampler)
    whole.sampler.set_epoch(2)
    expected = sources(whole)
    assert [len(batch) for batch in expected] == [4] * 7 + [2]
    for batches in range(9):
        resumed = loader()
        resumed.load_state_dict({"epoch": 2, "batches": batches})
        assert sources(resumed) == expected[batches:]


def test_overfitting_reads_the_same_rows_by_length(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_lines: WriteLines
) -> None:
    data = JSONLDataModule(
        **lengthy(tmp_path, write_lines, train=20, test=10), tokenizer=tokenizer, batch_size=4, batching="by_length"
    )
    module = Silent()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says that it turns shuffling off
        make_trainer(tmp_path, overfit_batches=1, max_epochs=2).fit(module, data)
    assert module.trained == [[1, 8, 15, 2]] * 2
    assert module.rows["val"] == [0, 1, 2, 3] * 2


class Silent(pl.LightningModule):
    """Notes what Lightning hands to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.loaders: list[Any] = []
        self.rows: dict[str, list[int]] = {}
        self.trained: list[list[int]] = []

    def _rows(self, stage: str, batch: Any) -> None:
        self.rows.setdefault(stage, []).extend(batch["label"]["index"].tolist())

    def training_step(self, batch: Any) -> torch.Tensor:
        self.loaders.append(self.trainer.train_dataloader)
        self.trained.append([length - 1 for length in lengths(batch["label"])])
        return self.weight * 1

    def validation_step(self, batch: Any) -> None:
        self._rows("val", batch)

    def test_step(self, batch: Any) -> None:
        self._rows("test", batch)

    def predict_step(self, batch: Any) -> None:
        self._rows("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "num_sanity_val_steps": 0}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**quiet, default_root_dir=folder, **settings)


def test_lightning_runs_it(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA, tmp_path: Path) -> None:
    data = CQADataModule(data_dir=write_cqa(test=5), tokenizer=tokenizer, tasks=BOTH, batch_size=4, eval_batch_size=2)
    module = Silent()
    with warnings.catch_warnings():
        # advice on workers and devices
        warnings.simplefilter("ignore")
        trainer = make_trainer(tmp_path, max_epochs=2)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    # of val the second row is the longer one, by a digit
    assert module.rows == {"val": [1, 0, 1, 0], "test": list(range(5)), "predict": list(range(5))}
    loader = module.loaders[-1]
    assert isinstance(loader, ResumableLoader)
    assert isinstance(loader.sampler, EpochSampler)
    restored = torch.load(tmp_path / "x.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert restored["tasks"]["rationale"] == {"prefix": "explain: ", "target": "{rationale}"}
    assert restored["tokenizer"] is None  # an object without a name
