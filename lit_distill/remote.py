"""Files at fsspec URLs (``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://``, ...), read as local ones are."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

from lit_distill.errors import UserError

_COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: _arrow_stream(file, "zstd"),
}

# a file's version, by the names that file systems give it; not its time of access
_VERSION = {
    *("etag", "mtime", "last_modified", "lastmodified", "last-modified", "modified", "modificationtime", "updated"),
    *("created", "generation", "blob_id", "content-md5"),
}
_BUFFER = 2**20  # bytes to read at once: fsspec's own files look for the end of each line in a block of megabytes


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at an fsspec URL, with what reading needs of `Path`.

    Each method raises a ``UserError`` that names the URL if there is no such file system, or no access to it. Its
    settings, such as an endpoint, are those of fsspec's own configuration and environment variables.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, part: str | Path) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{part}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def absolute(self) -> "RemotePath":
        return self

    def info(self) -> dict[str, Any] | None:
        """What the file system tells of it; ``None`` if it does not exist."""
        return cast(dict[str, Any] | None, self._call(lambda files, path: files.info(path)))

    def exists(self) -> bool:
        return self.info() is not None

    def is_file(self) -> bool:
        return (self.info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self.info() or {}).get("type") == "directory"

    def open(self, mode: Literal["rb"] = "rb") -> IO[bytes]:
        """Open it for reading. Raises a ``FileNotFoundError`` if it does not exist."""
        file = self._call(_open)
        if file is None:
            raise FileNotFoundError(2, "No such file or directory", self.url)
        return io.BufferedReader(file, _BUFFER)

    def glob(self, pattern: str) -> list["RemotePath"]:
        """The files below it that match a pattern, in order."""
        return (self / pattern).matching()

    def matching(self) -> list["RemotePath"]:
        """The files that match it as a pattern, in order."""
        found = self._call(lambda files, path: [files.unstrip_protocol(name) for name in files.glob(path)])
        return [RemotePath(url) for url in sorted(found or ())]

    def _call(self, use: Callable[[Any, str], Any]) -> Any:
        """What ``use`` of the file system and the path in it gives; ``None`` if there is no such file."""
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # not needed for local files

        try:
            return use(*url_to_fs(self.url))
        except Exception as error:
            # each file system has exceptions of its own; that of HTTP finds no file on a server that is not there
            found = error
            if isinstance(error, FileNotFoundError):
                cause = error.__cause__
                if not type(cause).__module__.startswith("aiohttp") or getattr(cause, "status", None) == 404:
                    return None
                found = cast(Exception, cause)
            reason = " ".join(str(found).split())[:300] or type(found).__name__
            raise UserError(f"{self.url} cannot be read ({reason})") from error


def _open(files: Any, path: str) -> Any:
    if path.startswith(("http://", "https://")) and not files.info(path).get("partial"):
        # a server without byte ranges
        return io.BytesIO(files.cat_file(path))
    return files.open(path, "rb")


AnyPath = Path | RemotePath


def as_path(place: str | AnyPath) -> AnyPath:
    """The path of a local file, or of an fsspec URL; ``file://`` is local."""
    text = str(place)
    if "://" not in text or isinstance(place, RemotePath):
        return place if isinstance(place, RemotePath) else Path(place)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else RemotePath(text)


def version_of(path: AnyPath) -> list[str] | None:
    """Size and version of a file, which change with its content; ``None`` if its file system tells no version."""
    if isinstance(path, Path):
        found = path.stat()
        # a copy may keep the time of the content, not that of the file
        return [str(found.st_size), str(found.st_mtime_ns), str(found.st_ctime_ns)]
    told = path.info() or {}
    version = [f"{key}={value}" for key, value in sorted(told.items()) if key.lower() in _VERSION]
    return [str(told.get("size")), *version] if version else None


def format_of(path: AnyPath) -> str:
    """The ending that names a file's format: ``.jsonl`` of ``x.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(Path(path.name).stem).suffix.lower() if suffix in _COMPRESSED else suffix


@contextmanager
def open_bytes(path: AnyPath) -> Iterator[IO[bytes]]:
    """Open a file for reading; one that ends in .gz, .bz2, .xz or .zst decompressed.

    Raises a ``UserError`` if it is found damaged while it is read.
    """
    decompress = _COMPRESSED.get(path.suffix.lower())
    with path.open("rb") as file:
        if decompress is None:
            yield file
            return
        try:
            with decompress(file) as text:
                yield text
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error})") from error


def read_lines(path: AnyPath, longest: int | None = None) -> Iterator[bytes]:
    """The lines of a file.

    Raises a ``UserError`` if it is damaged, has a line of more than ``longest`` bytes, or reading it from a URL breaks
    off.
    """
    try:
        with open_bytes(path) as file:
            if longest is None:
                yield from file
                return
            for number, line in enumerate(iter(partial(file.readline, longest + 1), b""), start=1):
                if len(line) > longest:
                    raise UserError(f"{path}:{number}: the line has more than {longest >> 20} MiB; cut it into several")
                yield line
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        # each file system has exceptions of its own
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:300]})") from error


def _arrow_stream(file: IO[bytes], compression: str) -> io.BufferedReader:
    import pyarrow as pa  # type: ignore[import-untyped]

    return io.BufferedReader(pa.CompressedInputStream(file, compression))
