"""Download and check the released data; a dataset's folder appears atomically."""

import http.client
import os
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from lit_distill.errors import UserError
from lit_distill.files import atomic_folder
from lit_distill.progress import ticker
from lit_distill.reading import json_lines

RELEASE_URL = "https://github.com/google-research/distilling-step-by-step/raw/main/datasets.zip"
"""The archive of the paper's reference code, with all four datasets."""

MAX_BYTES = 4 * 2**30  # of the archive and of its content; the datasets have well below 1 GiB
MAX_MEMBERS = 10_000  # of the archive
TIMEOUT = 30.0  # seconds without data until a download is given up


def fetch_release(url: str, data_dir: Path, folder: str, expected: Mapping[str, int]) -> None:
    """Download the release archive and unpack the folder of one dataset, at any depth, to ``data_dir / folder``.

    ``expected`` maps the dataset's files to their numbers of rows. Raises a ``UserError`` if there is no connection, or
    the archive is not as expected; no file is left behind then.
    """
    target = data_dir / folder
    absent = f"data_dir: none of {', '.join(expected)} is in {target}"
    advice = f"set data_dir to the folder that holds {folder}/"
    if not url.startswith(("https://", "http://")):
        raise UserError(f"the release must be at an http or https address, got {url!r}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{absent}, and HF_HUB_OFFLINE forbids to download the release; {advice}")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{absent}, but other files are, which a download would not overwrite; {advice}")
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / f".{folder}.lock"):
        if any((target / name).is_file() for name in expected):
            return  # another process was faster
        with tempfile.TemporaryFile(dir=data_dir) as archive, atomic_folder(target) as tmp_folder:
            try:
                _download(url, archive)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()  # it is the response, with an open socket
                raise UserError(f"{absent}, and {url} cannot be downloaded ({error}); {advice}") from error
            try:
                _unpack(archive, tmp_folder, folder, expected)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
                # NotImplementedError and RuntimeError: an unknown compression, a password
                raise UserError(f"{url}: cannot be unpacked to {data_dir} ({error})") from error


def _download(url: str, file: IO[bytes]) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # noqa: S310 - the caller has checked it
        # `None` where the header is missing or no number
        total = response.length
        with ticker("Downloading the release", total, unit="B") as advance:
            while chunk := response.read(2**16):
                file.write(chunk)
                advance(len(chunk))
                if file.tell() > MAX_BYTES:
                    raise UserError(f"{url}: more than {MAX_BYTES} bytes, which is not the release")
        if total is not None and file.tell() != total:
            raise ConnectionError(f"it broke off after {file.tell()} of {total} bytes")


def _unpack(archive: IO[bytes], target: Path, folder: str, expected: Mapping[str, int]) -> None:
    """Unpack the only folder of that name that has the expected files."""
    with zipfile.ZipFile(archive) as zipped:
        members = {_checked_path(member): member for member in zipped.infolist() if not member.is_dir()}
        first, *others = expected
        roots = [path.parent for path in members if path.parts[-2:] == (folder, first)]
        root = next((path for path in roots if all(path / name in members for name in others)), None)
        if root is None:
            raise UserError(f"the release has no folder {folder!r} with {', '.join(expected)}")
        chosen = {path: member for path, member in members.items() if path.is_relative_to(root)}
        # zipfile refuses a member larger than its header says
        size = sum(member.file_size for member in chosen.values())
        if len(members) > MAX_MEMBERS or size > MAX_BYTES:
            raise UserError(f"not the release: {len(members)} members, which unpack to {size} bytes")
        for path, member in chosen.items():
            unpacked = target / path.relative_to(root)
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, unpacked.open("wb") as file:
                shutil.copyfileobj(source, file)
    for name, rows in expected.items():
        found = sum(1 for _ in json_lines(target / name))
        if found != rows:
            raise UserError(f"{name} has {found} rows in this archive, and {rows} in the release; nothing was kept")


def _checked_path(member: zipfile.ZipInfo) -> PurePosixPath:
    name, path = member.filename, PurePosixPath(member.filename)
    is_file = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not is_file:
        raise UserError(f"the archive's member {name!r} is a link or device, or outside of it; nothing was unpacked")
    return path
