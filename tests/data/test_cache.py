"""The cache: what is made once, and when it is made again."""

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from transformers import PreTrainedTokenizerFast

from lit_distill.data import CQADataModule, JSONLDataModule, RationaleDataModule, cache, store
from lit_distill.data.cache import code_of, prepare
from lit_distill.data.store import CHUNK, Stored
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.tasks import Row, TeacherOutput
from tests.data.conftest import WriteCQA, WriteLines, cqa_output
from tests.rows import make_row

BOTH = ("label", "rationale")


def write(folder: Path) -> dict[str, Any]:
    assert list(store.written(folder / "x.arrow", {"x": pa.int64()}, [([pa.array([1, 2, 3])], "all")], "t")) == ["all"]
    np.save(folder / "y.npy", np.arange(3))
    return {"said": "yes"}


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("made again")


def test_a_folder_is_made_once() -> None:
    first, second = prepare("t", "key", write), prepare("t", "key", never)
    assert first == second
    assert (second.meta["said"], second.array("y").tolist()) == ("yes", [0, 1, 2])
    assert Stored(second.folder / "x.arrow").values("x", np.array([2, 0])) == [3, 1]
    with pytest.raises(AssertionError, match="made again"):
        prepare("t", "other", never)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("x.arrow", lambda content: content[: len(content) // 2]),
        ("x.arrow", lambda content: b""),
        ("x.arrow", lambda content: b"x" * len(content)),
        ("y.npy", lambda content: content + b"x"),
        ("y.npy", lambda content: bytes(len(content))),
        ("meta.json", lambda content: content[:-3]),
        ("meta.json", lambda content: b"[]"),
        ("y.npy", None),
        ("meta.json", None),
    ],
)
def test_a_damaged_folder_is_made_again(name: str, damage: Callable[[bytes], bytes] | None) -> None:
    path = prepare("t", "key", write).folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AssertionError, match="made again"):
        prepare("t", "key", never)
    found = prepare("t", "key", write)
    assert found.array("y").tolist() == [0, 1, 2]


def test_without_a_key_the_content_is_one() -> None:
    first = prepare("t", None, write)
    assert prepare("t", None, write) == first == prepare("t", first.key, never)


def test_what_a_killed_process_left_is_cleared(token_cache: Path) -> None:
    def killed(folder: Path) -> dict[str, Any]:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("t", "key", killed)
    (token_cache / f".t-key.{socket.gethostname().partition('.')[0]}.999999999.tmp").mkdir()
    prepare("t", "key", write)
    assert sorted(path.name for path in token_cache.iterdir()) == ["t-key", "t-key.lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^prepared rows cannot be kept in .*; set LIT_DISTILL_CACHE$"):
        prepare("t", "key", write)


def test_two_that_start_together_make_it_once() -> None:
    calls = []

    def slow(folder: Path) -> dict[str, Any]:
        calls.append(1)
        time.sleep(0.05)
        return write(folder)

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(prepare, "t", "key", slow) for _ in range(2)]
        assert both[0].result() == both[1].result()
    assert len(calls) == 1


def made_again(make: Callable[[], RationaleDataModule]) -> bool:
    """Whether a start tokenises."""
    with patch("lit_distill.data.tokenize.encode_rows", side_effect=AssertionError("made again")):
        try:
            make().setup("fit")
        except AssertionError:
            return True
    return False


def test_train_is_made_again_for_all_that_decides_it(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    data = write_cqa()

    def start(kind: type[CQADataModule] = CQADataModule, **arguments: Any) -> Callable[[], RationaleDataModule]:
        given: dict[str, Any] = {"data_dir": data, "tokenizer": tokenizer, "tasks": BOTH}
        return lambda: kind(**given | arguments)

    class Other(CQADataModule):
        def read_row(self, row: dict[str, Any]) -> Row:
            return super().read_row(row | {"question": f"other {row['question']}"})

    start()().setup("fit")
    same: list[dict[str, Any]] = [{}, {"seed": 1}, {"batch_size": 2}, {"batching": "by_length"}]
    assert [made_again(start(**arguments)) for arguments in same] == [False] * len(same)
    changed: list[dict[str, Any]] = [
        {"tasks": ("label",)},
        {"label_source": "teacher"},
        {"rationale_filter": "label_agrees"},
        {"train_fraction": 0.5},
        {"rationale_pairing": "shuffled"},
        {"max_source_length": 5},
    ]
    assert [made_again(start(**arguments)) for arguments in changed] == [True] * len(changed)
    assert made_again(start(Other))


def test_code_that_a_class_imports_is_part_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "texts.py").write_text("from lit_distill import errors\nSUFFIX = 'one'\n")
    (tmp_path / "own" / "parts.py").write_text("import numpy\nfrom .texts import SUFFIX\n")
    (tmp_path / "late.py").write_text("from own import last\n")
    (tmp_path / "own" / "last.py").write_text("")
    own = "import own.parts\nimport json\nclass Own:\n def read(self):\n  from late import last"
    (tmp_path / "own" / "rows.py").write_text(own)

    monkeypatch.syspath_prepend(tmp_path)

    def key() -> list[str] | None:
        """As in another process."""
        for name in [name for name in sys.modules if name.partition(".")[0] in ("own", "late")]:
            del sys.modules[name]
        cache._imported.cache_clear()
        return code_of(importlib.import_module("own.rows").Own)

    seen = [key()]
    assert seen == [key()] != [None]
    for name in ("own/texts.py", "late.py", "own/last.py"):
        with (tmp_path / name).open("a") as file:
            file.write("SUFFIX = 'two'\n")
        assert key() not in seen
        seen.append(key())


def test_code_is_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited_rows.py"
    path.write_text("class Own: ...\n")
    module = importlib.import_module("edited_rows")
    before = code_of(module.Own)
    path.write_text("class Own: x = 1\n")
    assert code_of(module.Own) == before
    assert code_of(importlib.reload(module).Own) != before


def test_a_class_with_variables_of_a_function_is_unknown() -> None:
    def build(text: str) -> type:
        class Own:
            def read(self) -> str:
                return text

        return Own

    assert code_of(build("a")) is None


def test_changed_files_are_read_again(tokenizer: PreTrainedTokenizerFast, write_cqa: WriteCQA) -> None:
    data = write_cqa()

    def rationales() -> set[str | None]:
        return {row.rationale for row in CQADataModule(data_dir=data).used_rows("train").rows}

    path = data / "cqa" / "llm" / "train_CoT_0.json"
    os.utime(path, (1e9, 1e9))
    before = rationales()
    # as long as before, and perhaps at the same time by the file system's clock
    path.write_text(path.read_text().replace("Because", "Whereas"))
    os.utime(path, (1e9, 1e9))
    assert {str(text)[:7] for text in rationales()} == {"Because", "Whereas"}
    write_cqa(outputs=[cqa_output(i) for i in range(20)])
    assert rationales() == before
    for path in (data / "cqa" / "llm").iterdir():
        path.unlink()
    assert rationales() == {None}
    (data / "cqa" / "cqa_train.json").unlink()
    with pytest.raises(UserError, match="cqa has no train split"):
        rationales()


def test_rows_of_unknown_origin_are_loaded_at_each_start(tokenizer: PreTrainedTokenizerFast) -> None:
    class Own(RationaleDataModule):
        name = "own"
        texts: ClassVar = ["a", "b"]

        def load_rows(self, split: Split) -> Iterator[Row] | None:
            return None if split == "test" else (make_row(f"{split} {text}", text, "yes") for text in self.texts)

    def start() -> RationaleDataModule:
        return Own(tokenizer=tokenizer)

    start().setup("fit")
    assert not made_again(start)
    Own.texts[0] = "c"
    assert made_again(start)
    assert [row.input for row in start().used_rows("train").rows] == ["c", "b"]


@pytest.mark.parametrize("row", [Row(1, "x", "a"), Row("", "x", 1), Row("", "x", "a", {"a"}), Row("", "x", "a", "a")])  # type: ignore[arg-type]
def test_a_row_of_other_types_is_shown(row: Row, tokenizer: PreTrainedTokenizerFast) -> None:
    class Own(RationaleDataModule):
        name = "own"

        def load_rows(self, split: Split) -> list[Row]:
            return [row]

    with pytest.raises(UserError, match=r"^own train: a row's id and input have to be texts, .* got Row\(id="):
        Own(tokenizer=tokenizer).setup("fit")


def test_large_files_are_as_small_ones(tmp_path: Path, write_lines: WriteLines) -> None:
    count = 3 * CHUNK + 7
    lines = [
        {"input": f"in {i % 5000}", "label": str(i % 3), "rationale": f"so {i}", "teacher_label": str(i % 2)}
        for i in range(count)
    ]
    path = write_lines(tmp_path / "x.jsonl", lines)
    module = JSONLDataModule(train=path, test=path, rationale_filter="label_agrees", tasks=BOTH)
    rows, train, val = (module.split_rows(split) or [] for split in ("test", "train", "val"))
    for i in (0, CHUNK, count - 1):
        output = TeacherOutput(f"so {i}", str(i % 2), "released")
        assert rows[i] == Row(f"jsonl-test-{i}", f"in {i % 5000}", str(i % 3), None, (output,))
    held = {row.input for row in val}
    assert (len(held), len(train) + len(val)) == (500, count)
    expected = [i for i in range(count) if f"in {i % 5000}" not in held]
    used = module.used_rows("train")
    assert [row.id for row in used.rows] == [f"jsonl-train-{i}" for i in expected]
    agreeing = [position for position, i in enumerate(expected) if i % 3 == i % 2]
    assert used.with_rationale.tolist() == agreeing
    assert used.counts["rationale_filtered"] == len(expected) - len(agreeing)
    labels = [str(i % 3) for i in expected]
    assert module.majority_label == max(sorted(set(labels), key=labels.index), key=labels.count)
    assert module.repeated_rows("test") == len(expected)
    lines[-1] = {"label": "x"}
    with pytest.raises(UserError, match=rf"x\.jsonl:{count}: column 'input' is empty"):
        JSONLDataModule(train=write_lines(path, lines)).released("train")
    lines[-1] = lines[0] | {"id": "jsonl-train-5"}
    with pytest.raises(UserError, match=f"rows 5 and {count - 1} share the id 'jsonl-train-5'"):
        JSONLDataModule(train=write_lines(path, lines)).released("train")
