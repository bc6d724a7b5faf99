"""What the loggers hold of a run: CSV, TensorBoard and Weights & Biases, read from their files."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from wandb.proto import wandb_internal_pb2

from tests.runs import CONFIGS, at_work_in, metric_rows, run, run_folders, small_toy, small_trainer, write_release

METRICS = {
    "train/loss", "train/label_loss", "train/rationale_loss", "train/grad_norm", "train/examples_per_second",
    "train/tokens_per_second", "train/steps_per_second", "val/loss", "val/accuracy", "val/label_loss",
    "val/rationale_loss", "val/scored_accuracy", "test/loss", "test/accuracy", "test/accuracy_low",
    "test/accuracy_high",
}  # fmt: skip
COLUMNS = ["id", "input", "label", "prediction", "correct", "rationale", "tokens"]


pytestmark = pytest.mark.usefixtures("here")


def test_csv_is_the_default(student_folder: Path) -> None:
    run("fit", small_toy(student_folder))
    [folder] = run_folders()
    assert folder == Path("runs/toy-StepByStep-gold-1-seed0/version_0")
    rows = metric_rows(folder)
    assert set().union(*rows) >= METRICS
    assert [int(row["step"]) for row in rows if "train/loss" in row] == [0, 1]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2
    hparams = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert (hparams["dataset"], hparams["method"]) == ("toy", "StepByStep")
    assert (hparams["label_source"], hparams["train_fraction"], hparams["seed_everything"]) == ("gold", 1.0, 0)


def test_a_runs_name_tells_it_from_others(here: Path, student_folder: Path) -> None:
    data = ["--data=ANLIDataModule", f"--data.data_dir={write_release(here / 'release')}", "--data.batch_size=4"]
    more = ["--data.label_source=teacher", "--data.train_fraction=0.5", "--seed_everything=7"]
    run("fit", small_toy(student_folder)[:5], data, more, small_trainer(1), "--test_after_fit=false")
    [folder] = run_folders()
    assert folder.parent.name == "anli1-StepByStep-teacher-0.5-seed7"


def test_tensorboard_holds_scalars_and_samples(student_folder: Path) -> None:
    run("fit", small_toy(student_folder), f"--config={CONFIGS / 'logger' / 'tensorboard.yaml'}")
    [folder] = run_folders()
    assert folder.parent.name == "toy-StepByStep-gold-1-seed0"
    events: Any = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= METRICS
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert [event.step for event in events.Scalars("val/accuracy")] == [0, 1]
    for split, rows in (("val", 4), ("test", 5)):
        text = events.Tensors(f"{split}/samples/text_summary")[-1].tensor_proto.string_val[0].decode()
        lines = text.splitlines()
        assert lines[0] == "| " + " | ".join(COLUMNS) + " |"
        assert len(lines) == 2 + rows
        assert f"| toy-{split}-0 |" in text


# wandb 0.31 has no public reader of its `.wandb` files (`wandb.sdk.internal.datastore` is gone), and offline it writes
# neither config.yaml nor wandb-summary.json: the records are read here by the file's own format, LevelDB's log with
# another header and zlib's CRC, and parsed by wandb's own protobuf. The tables lie as JSON under `files/media`.
def wandb_records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, joined = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + body) == checksum
        position += 7 + length
        # whole, first, middle, last
        joined = body if kind in (1, 2) else joined + body
        if kind in (1, 4):
            record = getattr(wandb_internal_pb2, "Record")()  # noqa: B009 - chosen by version, without types
            record.ParseFromString(joined)
            yield record


@pytest.fixture(scope="module")
def wandb_folder(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import wandb

    with pytest.MonkeyPatch.context() as patch, at_work_in(tmp_path_factory.mktemp("wandb"), patch) as folder:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        more = [f"--config={CONFIGS / 'logger' / 'wandb.yaml'}", "--data.train_fraction=0.5", "--seed_everything=3"]
        run("fit", small_toy(student_folder), more)
        assert wandb.run is None  # it ended with the command
        [found] = (folder / "runs" / "wandb").glob("offline-run-*")
        # the process that writes the files; on a busy machine the last records are not there before it has ended
        wandb.teardown()
        yield found


@pytest.fixture(scope="module")
def records(wandb_folder: Path) -> list[Any]:
    [path] = wandb_folder.glob("*.wandb")
    return list(wandb_records(path))


def items(updates: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def test_wandb_runs_compare_without_set_up(records: list[Any]) -> None:
    [record] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert re.fullmatch(r"toy-StepByStep-gold-0.5-tiny-[0-9a-f]{8}", record.run_group)
    assert record.display_name == f"{record.run_group}-seed3"
    assert record.job_type == "fit"
    assert set(record.tags) == {"toy", "StepByStep", "tiny", "gold labels", "fraction 0.5", "seed 3"}
    assert record.project == "lit_distill"


def test_wandb_holds_the_config(records: list[Any], student_folder: Path) -> None:
    config: dict[str, Any] = {}
    for record in records:
        config |= items(record.config.update)
    wanted = {
        "dataset": "toy", "method": "StepByStep", "label_source": "gold", "train_fraction": 0.5, "seed_everything": 3,
        "student": str(student_folder), "rationale_weight": 1.0, "learning_rate": 5e-5, "effective_batch": 4,
        "trainer.max_steps": 2, "validation.every_n_steps": 1, "data.init_args.train_size": 12,
        "model.class_path": "lit_distill.modules.StepByStepModule",
        "train_rows": 6, "train_rationales": 6, "val_rows": 4, "test_rows": 5,
    }  # fmt: skip
    assert {key: config.get(key) for key in wanted} == wanted


def test_wandb_holds_the_metrics_and_its_summary(records: list[Any]) -> None:
    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert set().union(*history) >= METRICS
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == [0, 1]
    summary: dict[str, Any] = {}
    for record in records:
        summary |= items(record.summary.update)
    assert summary.keys() >= METRICS
    # the last of the history
    for name in ("val/accuracy", "test/loss", "train/grad_norm"):
        assert summary[name] == [row[name] for row in history if name in row][-1]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_wandb_holds_a_table_of_samples_an_evaluation(records: list[Any], wandb_folder: Path) -> None:
    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    for split, evaluations, rows in (("val", 2, 4), ("test", 1, 5)):
        paths = [row[key] for row in history for key in row if key == f"{split}/samples/path"]
        assert len(paths) == evaluations
        for path in paths:
            table = json.loads((wandb_folder / "files" / path).read_text())
            assert table["columns"] == COLUMNS
            assert [row[0] for row in table["data"]] == [f"toy-{split}-{number}" for number in range(rows)]
            assert all(isinstance(row[COLUMNS.index("rationale")], str) for row in table["data"])


def test_a_wandb_run_that_fails_says_so(
    here: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    import wandb

    # its process writes to relative paths from the folder that it was started in
    wandb.teardown()
    request.addfinalizer(wandb.teardown)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def fault(*args: object, **kwargs: object) -> None:
        raise FloatingPointError

    monkeypatch.setattr("lit_distill.modules.evaluating.summarise", fault)
    with pytest.raises(FloatingPointError):
        run("fit", small_toy(student_folder), f"--config={CONFIGS / 'logger' / 'wandb.yaml'}")
    # of a run that failed wandb does not wait for the last records to be written
    wandb.teardown()
    [path] = here.glob("runs/wandb/offline-run-*/*.wandb")
    codes = [r.exit.exit_code for r in wandb_records(path) if r.WhichOneof("record_type") == "exit"]
    assert codes == [1]


def test_a_resumed_run_is_the_same_wandb_run(
    here: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    import wandb

    wandb.teardown()
    request.addfinalizer(wandb.teardown)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # in W&B's own project; that of the config is in a test of its own
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=runs"]
    same = [*small_toy(student_folder), *logger, "--resume"]

    def fault(*args: object, **kwargs: object) -> None:
        raise FloatingPointError

    with monkeypatch.context() as patch:
        patch.setattr("lit_distill.callbacks.SampleTable.on_test_end", fault)
        with pytest.raises(FloatingPointError):
            run("fit", same)
    run("fit", same)
    [record] = here.glob("runs/**/run.json")
    wandb.teardown()
    runs = [
        found.run
        for path in here.glob("runs/wandb/offline-run-*/*.wandb")
        for found in wandb_records(path)
        if found.WhichOneof("record_type") == "run"
    ]
    assert {run.run_id for run in runs} == {record.parent.name}
    assert len(list(here.glob("runs/wandb/offline-run-*"))) == 2
