"""Atomic files and folders, and flattening of nested configs."""

import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from huggingface_hub.constants import HF_HOME

from lit_distill.errors import UserError

CACHE = "LIT_DISTILL_CACHE"
"""Environment variable of the cache folder; by default inside Hugging Face datasets' cache."""

_HOST = socket.gethostname().partition(".")[0]
_EARLIER = ".earlier."


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file (``w`` in UTF-8, or ``wb``) that replaces ``path`` if the block ends without an exception.

    It is made in the target's folder, as a rename across file systems would copy. A link's target is replaced, a pipe
    or a terminal is written to. Leftovers of killed processes are removed.
    """
    path, encoding = Path(path), None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with path.open(mode, encoding=encoding) as file:
            yield file
        return
    with _replacing(path) as tmp_path:
        with tmp_path.open(mode, encoding=encoding) as file:
            yield file
        _sync(tmp_path)
        tmp_path.replace(os.path.realpath(path))


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """As `atomic_write`, but a folder to fill."""
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(folder) as tmp_path:
        tmp_path.mkdir()
        yield tmp_path
        for path in (*tmp_path.rglob("*"), tmp_path):
            _sync(path)
        if folder.exists():
            # a folder cannot be renamed onto one that holds files
            earlier = tmp_path.with_name(f".{folder.name}{_EARLIER}{_HOST}.{os.getpid()}.tmp")
            folder.rename(earlier)
            tmp_path.rename(folder)
            shutil.rmtree(earlier)
        else:
            tmp_path.rename(folder)


def cache_folder() -> Path:
    """The folder of prepared rows and captured distributions."""
    if given := os.environ.get(CACHE):
        return Path(given)
    # as in datasets, which imports pandas
    given = os.environ.get("HF_DATASETS_CACHE")
    return (Path(given) if given else Path(HF_HOME) / "datasets") / "lit_distill"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text)


def flatten(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A config with dotted keys. Lists stay as they are, empty mappings are dropped."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path = Path(os.path.realpath(path))
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, process = stale.name.split(".")[-3:-1]
        # the processes of another machine are unknown
        if host != _HOST or _is_running(process):
            continue
        if _EARLIER in stale.name and not path.exists():
            # killed between the two renames of a folder
            stale.rename(path)
        else:
            _remove(stale)
    tmp_path = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")
    try:
        yield tmp_path
        _sync(path.parent)
    except OSError as error:
        # the error of a full disk names no file
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        # safetensors and tokenizers have errors of their own for a full disk
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, UserError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        _remove(tmp_path)


def _is_running(process: str) -> bool:
    """Whether another process with this id, which may be writing, exists."""
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
