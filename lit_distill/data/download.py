"""Fetch the released data: the archive is checked member by member, and a dataset's folder appears whole or not."""

import http.client
import os
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lit_distill.data.sources import read_json_lines
from lit_distill.errors import UserError

RELEASE_URL = "https://github.com/google-research/distilling-step-by-step/raw/main/datasets.zip"
"""The archive released with the paper's reference code (all four datasets)."""

MAX_BYTES = 4 * 2**30
"""Of the archive, and of what is unpacked; the four datasets together are well below 1 GiB."""

MAX_MEMBERS = 10_000
"""Of the archive."""

TIMEOUT = 30.0
"""Seconds without a byte after which a download is given up."""

_CHUNK = 2**16


def fetch_release(url: str, data_dir: Path, folder: str, expected: Mapping[str, int]) -> None:
    """Download the release archive and unpack one dataset of it to ``data_dir / folder``.

    Args:
        url: the archive, over http or https.
        data_dir: the folder of the datasets; created where it is absent.
        folder: the dataset's folder, at whatever depth it lies in the archive.
        expected: the files that the dataset must have -> their number of rows.

    Raises:
        UserError: there is no connection, or the archive is not what it should be; nothing is left behind.
    """
    target = data_dir / folder
    absent = f"data_dir: none of {', '.join(expected)} is in {target}"
    advice = f"set data_dir to the folder that holds {folder}/"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{absent}, and HF_HUB_OFFLINE forbids to download the release; {advice}")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{absent}, but other files are, which a download would not overwrite; {advice}")
    is_new = not data_dir.exists()
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = data_dir / f".{folder}.lock"
    try:
        _fetch(url, data_dir, folder, expected, FileLock(lock), absent, advice)
    except UserError:
        if is_new:  # a misspelt folder does not come into being
            lock.unlink(missing_ok=True)
            with suppress(OSError):
                data_dir.rmdir()
        raise


def _fetch(
    url: str, data_dir: Path, folder: str, expected: Mapping[str, int], lock: FileLock, absent: str, advice: str
) -> None:
    target = data_dir / folder
    with lock:
        if any((target / name).is_file() for name in expected):
            return  # another process was here first
        tmp_folder = data_dir / f".{folder}.tmp"
        shutil.rmtree(tmp_folder, ignore_errors=True)  # of a process that was killed
        try:
            tmp_folder.mkdir()
            try:
                _download(url, tmp_folder / "release.zip")
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()  # it is the response, with an open socket
                raise UserError(f"{absent}, and {url} cannot be downloaded ({error}); {advice}") from error
            _unpack(tmp_folder / "release.zip", tmp_folder / folder, folder, list(expected), url)
            _check_rows(tmp_folder / folder, expected, url)
            if target.exists():
                target.rmdir()
            (tmp_folder / folder).rename(target)
        finally:
            shutil.rmtree(tmp_folder, ignore_errors=True)


def _download(url: str, path: Path) -> None:
    if not url.startswith(("https://", "http://")):
        raise UserError(f"the release must be at an http or https address, got {url!r}")
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:  # noqa: S310 - checked above
        total = int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        done = 0
        with tqdm(total=total, unit="B", unit_scale=True, desc="Downloading the release") as bar:
            while chunk := response.read(_CHUNK):
                done += len(chunk)
                if done > MAX_BYTES:
                    raise UserError(f"{url}: more than {MAX_BYTES} bytes, which is not the release")
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and done != total:
            raise ConnectionError(f"it broke off after {done} of {total} bytes")


def _unpack(archive: Path, target: Path, folder: str, expected: list[str], url: str) -> None:
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = zipped.infolist()
            _check_members(members, url)
            chosen = _below(members, folder, expected, url)
            left = MAX_BYTES
            for inner, member in chosen.items():
                path = target / inner
                path.parent.mkdir(parents=True, exist_ok=True)
                # counted while unpacking: the sizes in the archive's directory are only claims
                with zipped.open(member) as source, path.open("wb") as file:
                    while chunk := source.read(_CHUNK):
                        left -= len(chunk)
                        if left < 0:
                            raise UserError(f"{url}: unpacks to more than {MAX_BYTES} bytes, which is not the release")
                        file.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        # NotImplementedError and RuntimeError: an unknown compression, a password
        raise UserError(f"{url}: cannot be unpacked to {target.parent} ({error})") from error


def _check_members(members: list[zipfile.ZipInfo], url: str) -> None:
    if len(members) > MAX_MEMBERS:
        raise UserError(f"{url}: {len(members)} members, which is not the release")
    for member in members:
        name = member.filename
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise UserError(f"{url}: the member {name!r} points outside its archive; nothing was unpacked")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{url}: the member {name!r} is a link or a device; nothing was unpacked")


def _below(
    members: list[zipfile.ZipInfo], folder: str, expected: list[str], url: str
) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files below the one folder of that name that holds the expected files, by their paths in it."""
    roots: dict[PurePosixPath, dict[PurePosixPath, zipfile.ZipInfo]] = {}
    for member in members:
        path = PurePosixPath(member.filename)
        if member.is_dir() or folder not in path.parts[:-1]:
            continue
        depth = path.parts.index(folder) + 1
        inner = PurePosixPath(*path.parts[depth:])
        roots.setdefault(PurePosixPath(*path.parts[:depth]), {})[inner] = member
    for found in roots.values():
        if all(PurePosixPath(name) in found for name in expected):
            return found
    raise UserError(f"{url}: no folder {folder!r} with {', '.join(expected)} is in the archive")


def _check_rows(folder: Path, expected: Mapping[str, int], url: str) -> None:
    for name, rows in expected.items():
        found = sum(1 for _ in read_json_lines(folder / name))
        if found != rows:
            raise UserError(f"{url}: {name} has {found} rows, the released one has {rows}; nothing was kept")
