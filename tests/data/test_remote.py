"""Data at fsspec URLs, here in memory, is read as local data is."""

import bz2
import gzip
import lzma
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from lit_distill.data import CQADataModule, JSONLDataModule
from lit_distill.data.sources import Placed, Table, read_file
from lit_distill.errors import UserError
from lit_distill.remote import RemotePath, as_path, read_lines, version_of
from tests.data.conftest import WriteCQA
from tests.data.test_jsonl import WRITERS

LINES = b'{"input": "one", "label": "a"}\n{"input": "two", "label": "b"}\n'


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of its own."""
    name, files = f"/{uuid4().hex}", fsspec.filesystem("memory")
    files.mkdir(name)
    yield f"memory:/{name}"
    files.rm(name, recursive=True)


def rows_of(table: Table) -> list[Placed]:
    return [row for some in table.chunks() for row in some]


def upload(folder: Path, url: str) -> None:
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe(f"{url.removeprefix('memory:/')}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file(write: Callable[[Path], Path], url: str, tmp_path: Path) -> None:
    local = write(tmp_path)
    upload(tmp_path, url)
    remote = as_path(f"{url}/{local.name}")
    assert isinstance(remote, RemotePath)
    here, there = read_file(local, "train"), read_file(remote, "train")
    assert there.columns([]) == here.columns([])
    assert rows_of(there) == [(place.replace(str(local), str(remote)), row) for place, row in rows_of(here)]
    assert rows_of(there)


def test_a_release(url: str, write_cqa: WriteCQA) -> None:
    folder = write_cqa(train=20)
    upload(folder, url)
    remote, beside = CQADataModule(data_dir=url), CQADataModule(data_dir=f"file://{folder}")
    remote.prepare_data()
    local = CQADataModule(data_dir=folder).released("train")
    assert local is not None
    assert local[3].rationale == "Because 3."
    assert remote.released("train") == local == beside.released("train")
    assert remote.hparams["data_dir"] == url


def test_own_rows_relative_to_data_dir(url: str) -> None:
    fsspec.filesystem("memory").pipe(f"{url.removeprefix('memory:/')}/rows.jsonl", LINES)
    for train in ("rows.jsonl", f"{url}/rows.jsonl"):
        data = JSONLDataModule(train=train, data_dir=url)
        data.prepare_data()
        assert [(row.input, row.label) for row in data.released("train") or ()] == [("one", "a"), ("two", "b")]


def zstd(text: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as file:
        file.write(text)
    return bytes(packed.getvalue())


PACKS = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]


@pytest.mark.parametrize(("ending", "pack"), PACKS)
def test_compressed_files(ending: str, pack: Callable[[bytes], bytes], url: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.jsonl.{ending}").write_bytes(pack(LINES))
    (tmp_path / f"torn.csv.{ending}").write_bytes(pack(b"input,label\n" * 9)[:-6])
    upload(tmp_path, url)
    for folder in (tmp_path, as_path(url)):
        table = read_file(folder / f"rows.jsonl.{ending}", "train")
        assert [row["label"] for _, row in rows_of(table)] == ["a", "b"]
        with pytest.raises(UserError, match=rf"torn\.csv\.{ending} is damaged \("):
            rows_of(read_file(folder / f"torn.csv.{ending}", "train"))


def test_a_server(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    # without byte ranges
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = as_path(f"http://127.0.0.1:{server.server_port}")
        for name in ("rows.jsonl", "rows.jsonl.gz"):
            assert list(read_lines(folder / name)) == LINES.splitlines(keepends=True)
            assert version_of(folder / name) == version_of(folder / name) is not None
        assert not (folder / "absent.jsonl").exists()
        server.shutdown()
    with pytest.raises(UserError, match=r"^http://127.* cannot be read \(Cannot connect to host "):
        (folder / "rows.jsonl").exists()


def test_a_version_changes_with_the_content(url: str, tmp_path: Path) -> None:
    for folder in (tmp_path, as_path(url)):
        path, before = folder / "x.jsonl", []
        for text in (LINES, LINES.replace(b"one", b"two")):
            with fsspec.open(str(path), "wb") as file:
                file.write(text)
            assert version_of(path) == version_of(path)
            assert version_of(path) not in before
            before.append(version_of(path))


def test_one_line_for_what_is_not_there(url: str, write_cqa: WriteCQA) -> None:
    with pytest.raises(UserError, match=rf"^train: there is no {url}/x\.jsonl, nor "):
        JSONLDataModule(train=f"{url}/x.jsonl").prepare_data()
    with pytest.raises(UserError, match=rf"^data_dir: none of cqa_train\.json, cqa_test\.json is in {url}/cqa$"):
        CQADataModule(data_dir=url).prepare_data()
    with pytest.raises(UserError, match=r"^nowhere://x/y cannot be read \(Protocol not known: nowhere\)$"):
        JSONLDataModule(train="nowhere://x/y").prepare_data()
    with pytest.raises(FileNotFoundError, match=f"{url}/x"):
        list(read_lines(as_path(f"{url}/x")))
