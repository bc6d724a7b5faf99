"""The download, from a server on this machine, with archives that the test makes."""

import json
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

from lit_distill.data import ANLIDataModule, CQADataModule, download
from lit_distill.errors import UserError
from tests.data.conftest import cqa_rows

Serve = Callable[..., type[CQADataModule]]

LINES = "".join(json.dumps(row) + "\n" for row in cqa_rows(3))
RELEASE = {
    "datasets/cqa/cqa_train.json": LINES,
    "datasets/cqa/cqa_test.json": LINES,
    "datasets/cqa/llm/train_CoT_0.json": json.dumps(["x"] * 3),
    "datasets/svamp/svamp_train.json": "",
    "datasets/readme.txt": "hello",
    "__MACOSX/datasets/cqa/._cqa_train.json": "junk",
}


def zipped(members: dict[str, str], *, mode: dict[str, int] | None = None) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (mode or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve some bytes; a data module whose release they are, and counts of the requests."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[ThreadingHTTPServer] = []

    def start(content: bytes, *, status: int = 200, claimed: int | None = None) -> type[CQADataModule]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        class Released(CQADataModule):
            release_url = f"http://127.0.0.1:{server.server_port}/datasets.zip"
            released_rows = {"train": 3, "test": 3}  # noqa: RUF012 - as in the class above

        return Released

    requests: list[str] = []
    start.requests = requests  # type: ignore[attr-defined]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def contents(folder: Path) -> list[str]:
    """What lies in a folder, but for the locks."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_only_the_dataset_is_unpacked_and_only_once(serve: Serve, tmp_path: Path) -> None:
    released = serve(zipped(RELEASE))
    module = released(data_dir=tmp_path / "new" / "data")
    module.prepare_data()
    expected = ["cqa/cqa_test.json", "cqa/cqa_train.json", "cqa/llm/train_CoT_0.json"]
    assert contents(tmp_path / "new" / "data") == expected
    assert (tmp_path / "new" / "data" / "cqa" / "cqa_train.json").read_text() == LINES
    module.prepare_data()
    released(data_dir=tmp_path / "new" / "data").prepare_data()
    assert len(serve.requests) == 1  # type: ignore[attr-defined]
    rows = module.released("train")
    assert rows is not None
    assert len(rows) == 3


def test_two_at_once_download_once(serve: Serve, tmp_path: Path) -> None:
    released = serve(zipped(RELEASE))
    threads = [threading.Thread(target=released(data_dir=tmp_path).prepare_data) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(serve.requests) == 1  # type: ignore[attr-defined]
    assert len(contents(tmp_path)) == 3


def test_an_empty_folder_is_filled(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "cqa").mkdir()
    serve(zipped(RELEASE))(data_dir=tmp_path).prepare_data()
    assert len(contents(tmp_path)) == 3


def test_what_is_there_is_not_overwritten(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "cqa").mkdir()
    (tmp_path / "cqa" / "mine.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"^data_dir: none of cqa_train\.json, cqa_test\.json is in .*cqa, but other files are"
    ):
        serve(zipped(RELEASE))(data_dir=tmp_path).prepare_data()
    assert contents(tmp_path) == ["cqa/mine.txt"]


HOSTILE = [
    ({"../evil.txt": "x"}, {}, "link or device, or outside"),
    ({"datasets/cqa/../../../evil.txt": "x"}, {}, "link or device, or outside"),
    ({"/evil.txt": "x"}, {}, "link or device, or outside"),
    ({"C:/evil.txt": "x"}, {}, "link or device, or outside"),
    ({"datasets/cqa/link": "/etc/passwd"}, {"datasets/cqa/link": stat.S_IFLNK | 0o777}, "link or device, or outside"),
]


@pytest.mark.parametrize(("members", "mode", "message"), HOSTILE)
def test_hostile_members(
    members: dict[str, str], mode: dict[str, int], message: str, serve: Serve, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        serve(zipped(RELEASE | members, mode=mode))(data_dir=tmp_path / "data").prepare_data()
    assert contents(tmp_path) == []
    assert not (tmp_path / "data" / "cqa").exists()


def test_a_bomb(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    bomb = RELEASE | {"datasets/cqa/llm/train_CoT_1.json": "0" * 1_000_000}
    with pytest.raises(UserError, match=r"not the release: .* which unpack to 1\d+ bytes"):
        serve(zipped(bomb))(data_dir=tmp_path).prepare_data()
    assert contents(tmp_path) == []


def test_too_many_members(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_MEMBERS", 5)
    with pytest.raises(UserError, match="not the release: 6 members"):
        serve(zipped(RELEASE))(data_dir=tmp_path).prepare_data()
    assert contents(tmp_path) == []


def test_too_long_a_download(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes, which is not the release"):
        serve(zipped(RELEASE))(data_dir=tmp_path).prepare_data()
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (zipped(RELEASE)[:300], {"claimed": len(zipped(RELEASE))}, "cannot be downloaded"),
        (zipped(RELEASE)[:300], {}, "cannot be unpacked"),
        (b"not found", {"status": 404}, r"cannot be downloaded \(HTTP Error 404"),
        (b"<html>", {}, "cannot be unpacked"),
        (zipped({"datasets/svamp/svamp_train.json": ""}), {}, "no folder 'cqa' with cqa_train.json, cqa_test.json"),
        (zipped({"cqa/cqa_train.json": LINES}), {}, "no folder 'cqa' with cqa_train.json, cqa_test.json"),
        (
            zipped(RELEASE | {"datasets/cqa/cqa_test.json": LINES * 2}),
            {},
            "cqa_test.json has 6 rows in this archive, and 3 in the release",
        ),
    ],
)
def test_a_download_that_is_not_the_release(
    content: bytes, settings: dict[str, int], message: str, serve: Serve, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        serve(content, **settings)(data_dir=tmp_path).prepare_data()
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == []
    assert not (tmp_path / "cqa").exists()


def test_a_damaged_member(serve: Serve, tmp_path: Path) -> None:
    content = bytearray(zipped(RELEASE))
    position = content.index(b"cqa_train.json") + len("cqa_train.json") + 10
    content[position : position + 8] = b"\xff" * 8
    with pytest.raises(UserError, match="cannot be unpacked"):
        serve(bytes(content))(data_dir=tmp_path).prepare_data()
    assert contents(tmp_path) == []


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    module = ANLIDataModule(data_dir=tmp_path / "d")
    monkeypatch.setattr(ANLIDataModule, "release_url", "http://127.0.0.1:9/datasets.zip")
    with pytest.raises(UserError) as caught:
        module.prepare_data()
    message = str(caught.value)
    assert message.startswith(f"data_dir: none of anli1_train.json, anli1_valid.json, anli1_test.json is in {tmp_path}")
    assert message.endswith("set data_dir to the folder that holds anli1/")
    assert contents(tmp_path) == []
    assert "\n" not in message


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline(value: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = serve(zipped(RELEASE))
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(UserError, match=r"^data_dir: .*data.cqa, and HF_HUB_OFFLINE forbids .*set data_dir to"):
        released(data_dir=tmp_path / "data").prepare_data()
    assert serve.requests == []  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_only_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="http or https"):
        download.fetch_release("file:///etc/passwd", tmp_path, "cqa", {"cqa_train.json": 1})
