"""What is written is there whole or not at all, whatever ends the writer."""

import errno
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import save_file

from lit_distill.checkpoints import AtomicCheckpointIO, save_atomically
from lit_distill.files import atomic_folder, atomic_write, write_text


def killed(work: Callable[[], None]) -> None:
    """Do something in a process that is killed at its end."""
    child = os.fork()
    if child == 0:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_earlier_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    write_text(path, "earlier")

    def fill() -> None:
        with atomic_write(path) as file:
            file.write("new")
            file.flush()
            assert path.read_text() == "earlier"
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fill()
    assert (path.read_text(), names(tmp_path)) == ("earlier", ["a[1].txt"])
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_text(path, "earlier")

    def fill() -> None:
        with atomic_write(path) as file:
            file.write("ne")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    killed(fill)
    assert path.read_text() == "earlier"
    assert len(names(tmp_path)) == 2
    # of a process that still runs, and of one on another machine
    others = [
        f".run.json.elsewhere.{2**22 + 1}.tmp",
        f".run.json.{socket.gethostname().partition('.')[0]}.{os.getppid()}.tmp",
    ]
    for name in others:
        (tmp_path / name).write_text("other")
    write_text(path, "new")
    assert names(tmp_path) == sorted([*others, "run.json"])
    assert path.read_text() == "new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert names(tmp_path) == ["pipe"]


def test_a_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "text"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "student"

    def fill(content: str, *, ends_well: bool = True) -> None:
        with atomic_folder(folder) as half:
            (half / content).write_text(content)
            if not ends_well:
                raise FloatingPointError

    fill("first")
    with pytest.raises(FloatingPointError):
        fill("second", ends_well=False)
    assert names(folder) == ["first"]
    fill("third")
    assert names(folder) == ["third"]
    assert names(folder.parent) == ["student"]


def test_a_checkpoint_never_lies_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    save_atomically(trainer)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it may be on another file system, from which a move is a copy")

    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    # of a killed run, which was saving under another name
    (path.parent / ".best-step7.ckpt.123.tmp").write_bytes(b"PK")
    trainer.strategy.checkpoint_io.save_checkpoint({"weights": torch.arange(3)}, path)
    assert names(path.parent) == ["last.ckpt"]
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(3))


def test_a_folder_whose_writer_was_killed_between_its_renames_is_restored(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    with atomic_folder(folder) as tmp_folder:
        (tmp_folder / "a").write_text("earlier")
    original = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if to == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, to)

    def fill() -> None:
        with mock.patch.object(Path, "rename", rename), atomic_folder(folder) as tmp_folder:
            (tmp_folder / "a").write_text("new")

    killed(fill)
    assert not folder.exists()

    def stop() -> None:
        with atomic_folder(folder):
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        stop()
    assert (folder / "a").read_text() == "earlier"
    assert names(tmp_path) == ["student"]


def test_a_leftover_of_an_impossible_process_is_removed(tmp_path: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    (tmp_path / f".run.json.{host}.{10**30}.tmp").touch()
    write_text(tmp_path / "run.json", "whole")
    assert names(tmp_path) == ["run.json"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    class Unsaved:
        def __reduce__(self) -> str:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"weights": torch.zeros(1000), "other": Unsaved()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert names(tmp_path) == ["last.ckpt"]


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_space_for_weights_is_an_error_of_a_file(tmp_path: Path) -> None:
    before, weights = resource.getrlimit(resource.RLIMIT_FSIZE), {"weights": torch.zeros(1000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, atomic_folder(tmp_path / "student") as folder:
            save_file(weights, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "student"))
    assert not list(tmp_path.iterdir())
