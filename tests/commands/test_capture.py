"""``capture``: a teacher's distributions on disk, begun, killed, shared among processes, and trained from."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
import yaml

from lit_distill.commands import capture
from lit_distill.teachers.capture import Capturer
from lit_distill.teachers.store import read_shard, shards
from tests.commands import capture_runs
from tests.ranks import on_ranks
from tests.runs import break_off, metric_rows, refusal, run, run_folders, small_model, small_trainer, write_release
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder, make_tokenizer

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), rows=20)


def settings(student: Path, release: Path, data: str = "CQA") -> list[str]:
    batches = [f"--data.data_dir={release}", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    return [*small_model(student), f"--data={data}DataModule", *batches]


def kept(folder: Path | str) -> dict[bytes, dict[str, Any]]:
    """What is stored of each row, in whichever file."""
    rows = [row for path in shards(folder) for row in read_shard(path).to_pylist()]
    found = {row.pop("key"): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SHARD", 8)


FROM_STORE = ["--model.objectives+=ForwardKL", "--model.objectives.teacher=kept"]


@pytest.mark.parametrize(("family", "data"), [("t5", "CQA"), ("llama", "ESNLI")])
def test_a_student_trains_from_it_with_no_teacher(
    tmp_path: Path, release: Path, family: str, data: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: dict[str, tuple[Any, dict[str, int], Any]] = {
        "t5": (make_student_folder, {"d_model": 24}, None),
        "llama": (make_causal_folder, {"hidden_size": 24}, make_causal_tokenizer()),
    }
    make, wide, tokenizer = made[family]
    own = settings(make(tmp_path / "student"), release, data)
    teacher = add_weights(make(tmp_path / "teacher", **wide), tokenizer)
    run("capture", own, f"--teacher={teacher}", "--out=kept", "--temperature=2")
    said = capsys.readouterr().out
    assert "4 most likely ids, 12 drawn from the rest; temperature 2" in said
    assert f"{data.lower()} train" in said
    assert "44 in memory" in said
    shutil.rmtree(teacher)
    store = [*FROM_STORE, "--model.objectives.temperature=2", "--data.train_fraction=0.5", "--data.seed=3"]
    trainer = [*small_trainer(4, 2), "--model.dropout=0.2", "--test_after_fit=false"]
    run("fit", own, store, trainer)
    [folder] = run_folders()
    rows = metric_rows(folder)
    assert [row["step"] for row in rows if "train/kl_loss" in row] == ["0", "1", "2", "3"]
    assert all(float(row["val/kl_loss"]) > 0 for row in rows if "val/kl_loss" in row)
    assert any("val/kl_loss" in row for row in rows)
    # resumed, bit by bit
    break_off(monkeypatch, 3, own, store, trainer, "--data.num_workers=0", saving=False)
    run("fit", own, store, trainer, "--resume")
    whole, resumed = (
        torch.load(each / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for each in run_folders()
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def stopped_after(batches: int, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """A capture that dies in the midst of a file."""
    right = Capturer.capture
    done: list[int] = []

    def dies(self: Capturer, rows: pa.Table) -> Any:
        if len(done) == batches:
            raise FloatingPointError
        done.append(len(rows))
        return right(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Capturer, "capture", dies)
        with pytest.raises(FloatingPointError):
            run("capture", *arguments)


@pytest.mark.usefixtures("small_shards")
def test_a_capture_goes_on_where_it_was_broken_off(
    student_folder: Path, weights_folder: Path, release: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    own = [*settings(student_folder, release), f"--teacher={weights_folder}"]
    run("capture", own, "--out=whole")
    stopped_after(5, monkeypatch, own, "--out=resumed")
    files = shards("resumed")
    assert len(files) == 2
    begun = {path: path.stat().st_mtime_ns for path in files}
    # what a process that was killed while it wrote leaves
    Path("resumed", f".{files[0].name}.elsewhere.1.tmp").write_bytes(b"PAR1")
    shutil.copytree("resumed", "kept")
    refused = refusal(capsys, "fit", settings(student_folder, release), FROM_STORE, small_trainer())
    assert re.match(r"kept: lacks \d+ of the \d+ training targets of \w+: .* not to the end; capture with", refused)
    run("capture", own, "--out=resumed")
    assert begun == {path: path.stat().st_mtime_ns for path in files}
    assert kept("resumed") == kept("whole")
    assert [path.name for path in shards("resumed")] == [path.name for path in shards("whole")]
    # a torn file, which is named, and whose rows alone are captured again
    files[1].write_bytes(files[1].read_bytes()[:-9])
    assert refusal(capsys, "capture", own, "--out=resumed").startswith(f"{files[1]}: torn or no captured")
    files[1].unlink()
    run("capture", own, "--out=resumed")
    assert kept("resumed") == kept("whole")


@pytest.mark.usefixtures("small_shards")
def test_one_store_serves_other_rows_tasks_and_orders(
    student_folder: Path, weights_folder: Path, release: Path
) -> None:
    own, teacher = settings(student_folder, release), f"--teacher={weights_folder}"
    run("capture", own, teacher, "--out=whole")
    # half of the rows in another order, then the rest
    run("capture", own, teacher, "--out=parts", "--data.train_fraction=0.4", "--data.seed=5", "--splits=[train]")
    part = kept("parts")
    run("capture", own, teacher, "--out=parts")
    both, whole = kept("parts"), kept("whole")
    assert part.items() <= both.items()
    assert both.keys() == whole.keys()
    for key, row in whole.items():
        assert row["ids"] == both[key]["ids"]
        # batches of other lengths round otherwise
        assert np.allclose(row["entropy"], both[key]["entropy"], rtol=0, atol=1e-5)
    splits = [one["split"] for one in json.loads(Path("parts/store.json").read_text())["data"].values()]
    assert sorted(splits) == ["train", "train", "val"]


@pytest.mark.slow
def test_two_processes_store_what_one_does(
    student_folder: Path, weights_folder: Path, release: Path, tmp_path_factory: pytest.TempPathFactory, here: Path
) -> None:
    own = ["capture", *settings(student_folder, release), f"--teacher={weights_folder}"]
    folder = Path(on_ranks(capture_runs.capture, tmp_path_factory, own)[0]["folder"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "SHARD", 8)
        run(*own, "--out=one")
    assert kept(folder) == kept("one")
    assert [path.name for path in shards(folder)] == [path.name for path in shards("one")]


def test_workers_of_ray_store_the_same(
    student_folder: Path, weights_folder: Path, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's side is played, by functions of the documented signatures."""
    asked: dict[str, Any] = {}

    class Dataset:
        def __init__(self, items: list[dict[str, Any]]) -> None:
            self.items = items

        def map_batches(self, kind: Callable[..., Any], *, fn_constructor_args: Any, batch_size: int, **kw: Any) -> Any:
            asked.update(kw)
            worker, made = kind(*fn_constructor_args), []
            for start in range(0, len(self.items), batch_size):
                part = self.items[start : start + batch_size]
                done = worker({"rows": np.array([item["rows"] for item in part], dtype=object)})
                made += [{"rows": int(rows)} for rows in done["rows"]]
            return SimpleNamespace(iter_rows=lambda: iter(made))

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    data.__dict__.update(from_items=lambda items, override_num_blocks: Dataset(items))
    ray.__dict__.update(data=data, init=lambda ignore_reinit_error: None, cluster_resources=lambda: {"CPU": 4.0})
    own = [*settings(student_folder, release), f"--teacher={weights_folder}"]
    monkeypatch.setattr(capture, "SHARD", 8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setitem(sys.modules, "ray.data", data)
        run("capture", own, "--out=ray", "--ray=3")
    run("capture", own, "--out=one")
    assert kept("ray") == kept("one")
    assert asked == {"concurrency": 3, "num_gpus": 0}


def test_a_dry_run_writes_nothing(
    student_folder: Path, weights_folder: Path, release: Path, here: Path, capsys: Any
) -> None:
    own = [*settings(student_folder, release), f"--teacher={weights_folder}"]
    run("capture", own, "--dry_run", "--out=none")
    said = capsys.readouterr().out
    assert not Path("none").exists()
    run("capture", own, "--out=kept")
    done = capsys.readouterr().out
    for name in ("cqa train", "cqa val", "rows", "target positions"):
        [(first,), (second,)] = (re.findall(rf"^│ {name} +│ +(\S.*?) +│$", text, re.MULTILINE) for text in (said, done))
        assert first == second
    assert "hours of one process" in said
    assert len(kept("kept")) == int(re.findall(r"^│ rows +│ +(\d+) ", done, re.MULTILINE)[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out=kept"], "teacher: must be given, as --teacher"),
        (["--teacher=TEACHER"], "out: must be given, as --out"),
        (["--teacher=TEACHER", "--out=kept", "--temperature=0"], "temperature must be above 0, got 0"),
        (["--teacher=TEACHER", "--out=kept", "--draws=-1"], "draws must be an integer"),
        (["--teacher=TEACHER", "--out=kept", "--head=0", "--draws=0"], "head: 0 and draws: 0 store nothing"),
        (["--teacher=TEACHER", "--out=kept", "--head=99"], "head: 99 is more than the 64 ids of the vocabulary"),
        (["--teacher=TEACHER", "--out=kept", "--splits=[]"], "splits: must name train or val, or both"),
        (["--teacher=TEACHER", "--out=kept", "--splits=[tset]"], "splits"),
        (["--teacher=.", "--out=kept"], "teacher: "),
        (["--teacher=.", f"--out={__file__}"], f"out: {__file__!r} is a file; give a folder"),
        (["--teacher=TEACHER", "--out=kept", "--draw=3"], "draw: no such argument (did you mean draws?)"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    student_folder: Path, weights_folder: Path, release: Path, arguments: list[str], said: str, capsys: Any
) -> None:
    given = [each.replace("TEACHER", str(weights_folder)) for each in arguments]
    assert refusal(capsys, "capture", settings(student_folder, release), given).startswith(said)
    assert not Path("kept").exists()


def test_a_folder_of_another_capture_is_refused(
    student_folder: Path, weights_folder: Path, teacher_folder: Path, release: Path, tmp_path: Path, capsys: Any
) -> None:
    own = [*settings(student_folder, release), "--out=kept"]
    run("capture", own, f"--teacher={weights_folder}")
    other = refusal(capsys, "capture", own, f"--teacher={weights_folder}", "--temperature=2")
    assert other == "out: kept was captured with temperature 1.0, not 2.0: give that, or another folder"
    assert refusal(capsys, "capture", own, f"--teacher={teacher_folder}").startswith(
        "out: kept was captured with teach"
    )
    alien = add_weights(make_causal_folder(tmp_path / "alien"), make_causal_tokenizer())
    said = refusal(capsys, "capture", own, f"--teacher={alien}")
    assert said.startswith(f"teacher: {str(alien)!r} has another vocabulary (65 entries) than the student (64): its")
    same = add_weights(make_causal_folder(tmp_path / "same", vocab_size=64), make_tokenizer())
    said = refusal(capsys, "capture", own, f"--teacher={same}")
    assert said.startswith(
        f"teacher: {str(same)!r} has causal rows, which end in token 1, the student seq2seq rows, which end in token 1;"
    )


def test_the_short_help_says_what_is_parsed(student_folder: Path, release: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run("capture", "--help")
    shown = dict(
        re.findall(r"^  --([\w.]+) +.*?(?:\n {34}.*?)*?(?: \[(.*)\])?$", capsys.readouterr().out, re.MULTILINE)
    )
    with pytest.raises(SystemExit):
        run("capture", settings(student_folder, release), "--print_config")
    parsed = yaml.safe_load(capsys.readouterr().out)
    options = [name for name, *_ in capture._OPTIONS]
    assert set(options) <= shown.keys()
    for name in options:
        if shown[name]:
            assert yaml.safe_load(shown[name]) == parsed[name], name
