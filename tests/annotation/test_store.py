"""The file of samples: what is in it stays in it, whatever ends the process that writes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pandas as pd  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from lit_distill.annotation.record import COLUMNS, Annotation, to_line
from lit_distill.annotation.store import FILE, METADATA, PARQUET, AnnotationStore, read_rows
from lit_distill.errors import UserError

ORDER = {("train", row): place for place, row in enumerate("abc")}


def key_of(row: str, sample: int = 0) -> str:
    """Some 32 hexadecimal digits that no other question has."""
    return row.encode().hex().zfill(30) + f"{sample:02x}"


def keys(*of: tuple[str, int]) -> set[str]:
    return {key_of(row, sample) for row, sample in of}


def answer(row: str, sample: int = 0, label: str | None = "yes", **columns: Any) -> Annotation:
    """What a teacher said; without a label it does not parse."""
    columns = {"text": f"Said of {row}. {label}", "teacher": "T", "split": "train"} | columns
    parsed = label is not None
    return Annotation(
        row,
        sample=sample,
        label=label,
        parsed=parsed,
        rationale="Said." if parsed else None,
        **key(row, sample),
        **columns,
    )


def failure(row: str, sample: int = 0, error: str = "timed out") -> Annotation:
    return Annotation(row, "train", sample, "T", error=error, **key(row, sample))


def key(row: str, sample: int) -> dict[str, Any]:
    return {"prompt": "p", "settings": "s", "input": "i", "key": key_of(row, sample)}


def plainly(label: str, other: str) -> bool:
    return label.strip("()") == other.strip("()")


def finish(store: AnnotationStore) -> None:
    store.finish(lambda found: ORDER.get((found.split or "", found.id)), plainly)


def samples_of(folder: Path) -> list[Annotation]:
    return [sample for sample, _ in read_rows(folder / FILE)]


def write(folder: Path, samples: Iterable[Annotation]) -> Path:
    """A store's file, closed."""
    with AnnotationStore(folder) as store:
        for sample in samples:
            store.append(sample)
    return folder / FILE


def kept(folder: Path) -> list[Annotation]:
    with AnnotationStore(folder):
        return samples_of(folder)


def raw(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_bytes().splitlines()]


def without_votes(samples: Iterable[Annotation]) -> list[Annotation]:
    nothing: dict[str, Any] = dict.fromkeys(("votes", "majority_label", "vote_share", "in_majority", "distinct"))
    return [replace(sample, **nothing) for sample in samples]


THREE = [answer("a"), failure("b"), answer("c", label=None, text="tschüß\n")]


def test_what_is_appended_is_there_at_once_and_when_it_is_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    with AnnotationStore(folder) as store:
        for number, sample in enumerate(THREE, start=1):
            store.append(sample)
            assert (folder / FILE).read_bytes() == b"".join(map(to_line, THREE[:number]))
            assert samples_of(folder) == THREE[:number]
    more = [answer("a", 1), answer("b", 1)]
    write(folder, more)
    assert kept(folder) == THREE + more


def test_samples_are_shown_those_in_the_file_first(tmp_path: Path) -> None:
    write(tmp_path, THREE[:2])
    seen: list[Annotation] = []
    with AnnotationStore(tmp_path, seen.append) as store:
        assert seen == THREE[:2]
        store.append(THREE[2])
    assert seen == THREE


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b"\n" + b"\n \r\n".join(map(to_line, THREE)) + b"\n\n")
    assert kept(tmp_path) == THREE
    with AnnotationStore(tmp_path) as store:
        finish(store)
    assert without_votes(samples_of(tmp_path)) == THREE
    assert path.read_bytes().count(b"\n") == 3


def test_a_torn_line_of_any_length_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path, THREE)
    whole = path.read_bytes()
    start = len(b"".join(map(to_line, THREE[:-1])))
    # its last byte is its end, the one before that closes the object
    for length in [*range(0, len(whole) - start - 1, 7), len(whole) - start - 2]:
        path.write_bytes(whole[: start + length])
        torn: list[str] = []
        assert [annotation for annotation, _ in read_rows(path, torn.append)] == THREE[:-1]
        assert torn == [f"{path}:3"] * (length > 0)
        with AnnotationStore(tmp_path) as store:
            assert path.read_bytes() == whole[:start]
            store.append(THREE[-1])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("before", [[], THREE])
def test_a_whole_line_that_lacks_its_end_is_given_one(before: list[Annotation], tmp_path: Path) -> None:
    samples = [*before, answer("z", text="x" * 300_000)]
    whole = b"".join(map(to_line, samples))
    (tmp_path / FILE).write_bytes(whole[:-1])
    assert kept(tmp_path) == samples
    assert (tmp_path / FILE).read_bytes() == whole


DAMAGED = [b'{"id": "x', b"[]", b'{"text": "no id"}', b'{"id": 3}', b'{"id": "x", "text": "\xff"}', b"\x00\x00"]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_elsewhere_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / FILE
    content = to_line(THREE[0]) + line + b"\n" + to_line(THREE[1])
    path.write_bytes(content)
    for _ in range(2):  # the folder is free again after an error
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2: not "):
            AnnotationStore(tmp_path)
    assert path.read_bytes() == content


def test_a_last_line_that_is_whole_is_not_taken_off_though_it_is_no_sample(tmp_path: Path) -> None:
    # somebody wrote that, it was not torn
    path = tmp_path / FILE
    path.write_bytes(to_line(THREE[0]) + b'{"id": 3, "label": "yes"}')
    with pytest.raises(
        UserError, match=r"rationales\.jsonl:2: not a sample: id: Input should be a valid string, got 3"
    ):
        AnnotationStore(tmp_path)
    assert path.read_bytes().rstrip(b"\n").endswith(b'{"id": 3, "label": "yes"}')


OTHER = """
import sys, time
from lit_distill.annotation.store import AnnotationStore
from lit_distill.errors import UserError
try:
    store = AnnotationStore(sys.argv[1])
except UserError as error:
    print(error, flush=True)
else:
    print("open", flush=True)
    time.sleep(60)
"""


def in_another_process(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", OTHER, str(folder)], stdout=subprocess.PIPE, text=True)  # noqa: S603


def test_a_folder_is_open_for_one_store_of_one_process(tmp_path: Path) -> None:
    message = f"out: another process writes {str(tmp_path)!r}; let it end, or take another folder"
    with AnnotationStore(tmp_path) as store:
        with pytest.raises(UserError) as error:
            AnnotationStore(tmp_path)
        assert str(error.value) == message
        with in_another_process(tmp_path) as other:
            assert other.communicate(timeout=30)[0] == message + "\n"
        store.append(THREE[0])
    assert kept(tmp_path) == THREE[:1]


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    with in_another_process(tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process writes"):
            AnnotationStore(tmp_path)
        other.send_signal(signal.SIGKILL)
        assert other.wait(timeout=30) == -signal.SIGKILL
    write(tmp_path, THREE)
    assert kept(tmp_path) == THREE


def test_questions_are_settled_by_an_answer_or_a_failure(tmp_path: Path) -> None:
    samples = [
        answer("a", 0, agrees=True),
        answer("a", 1, agrees=False),
        answer("b", 0, label=None, agrees=False),
        failure("c"),
        Annotation("d", text="without a key", agrees=True),
    ]
    answered = keys(("a", 0), ("a", 1), ("b", 0))
    with AnnotationStore(tmp_path) as store:
        for sample in samples:
            store.append(sample)
        appended = dict(store.answered)
    for ask_failed, settled in ((False, answered | keys(("c", 0))), (True, answered)):
        with AnnotationStore(tmp_path, ask_failed=ask_failed) as store:
            assert store.answered == {key: key in keys(("a", 0)) for key in settled}
    assert appended == {key: key in keys(("a", 0)) for key in answered | keys(("c", 0))}


def test_of_a_question_that_was_asked_again_the_last_answer_counts(tmp_path: Path) -> None:
    write(tmp_path, [failure("a", error="first"), answer("b")])
    with AnnotationStore(tmp_path, ask_failed=True) as store:
        store.append(failure("a", error="second"))
        assert keys(("a", 0)).isdisjoint(store.answered)
        store.append(answer("a"))
        assert keys(("a", 0)) <= store.answered.keys()
        finish(store)
    assert without_votes(samples_of(tmp_path)) == [answer("a"), answer("b")]
    with AnnotationStore(tmp_path, ask_failed=True) as store:
        assert store.answered.keys() == keys(("a", 0), ("b", 0))


VOTED = ("id", "sample", "votes", "majority_label", "vote_share", "in_majority")
MIXED = [
    answer("c", 1, "no"),
    answer("a", 2, "yes"),
    failure("b"),
    answer("c", 0, None),
    answer("a", 0, "(no)"),
    answer("elsewhere", 0, split="test"),
    answer("c", 2, "(no)"),
    answer("a", 1, "no"),
    answer("gone", 0),
]


def test_the_file_is_put_in_order_and_voted_on(tmp_path: Path) -> None:
    others = [replace(answer("a", 0, "yes"), teacher="U", key="ab"), replace(answer("a", 0), settings="t", key="cd")]
    samples = [*MIXED, *others]
    write(tmp_path, samples)
    with AnnotationStore(tmp_path) as store:
        finish(store)
    assert [tuple(row[name] for name in VOTED) for row in raw(tmp_path)] == [
        ("a", 0, 3, "(no)", 2 / 3, True),
        ("a", 1, 3, "(no)", 2 / 3, True),
        ("a", 2, 3, "(no)", 2 / 3, False),
        ("a", 0, 1, "yes", 1.0, True),  # of another teacher
        ("a", 0, 1, "yes", 1.0, True),  # with other settings
        ("b", 0, None, None, None, None),
        ("c", 0, 3, "no", 2 / 3, None),  # did not parse
        ("c", 1, 3, "no", 2 / 3, True),
        ("c", 2, 3, "no", 2 / 3, True),
        ("elsewhere", 0, 1, "yes", 1.0, True),
        ("gone", 0, 1, "yes", 1.0, True),
    ]
    assert sorted(map(repr, without_votes(kept(tmp_path)))) == sorted(map(repr, samples))


def test_nothing_that_parses_has_no_majority(tmp_path: Path) -> None:
    write(tmp_path, [answer("a", 0, None), answer("a", 1, None), failure("a", 2)])
    with AnnotationStore(tmp_path) as store:
        finish(store)
    assert [tuple(row[name] for name in VOTED[2:]) for row in raw(tmp_path)] == [
        (2, None, 0.0, None),
        (2, None, 0.0, None),
        (2, None, 0.0, None),
    ]


def test_the_same_id_in_another_split_is_another_row(tmp_path: Path) -> None:
    samples = [replace(answer("a", 0, "no"), split="test", key="ab"), answer("a", 0, "yes")]
    write(tmp_path, samples)
    with AnnotationStore(tmp_path) as store:
        finish(store)
    assert without_votes(samples_of(tmp_path)) == samples[::-1]
    assert [(row["split"], row["votes"], row["majority_label"]) for row in raw(tmp_path)] == [
        ("train", 1, "yes"),
        ("test", 1, "no"),
    ]


def test_what_follows_from_a_text_is_read_again(tmp_path: Path) -> None:
    write(tmp_path, [answer("a", 0, "old"), answer("a", 1, "older"), failure("b")])
    with AnnotationStore(tmp_path, read=lambda found: replace(found, label="new") if found.text else found) as store:
        finish(store)
    assert [(row["label"], row["majority_label"], row["vote_share"]) for row in raw(tmp_path)] == [
        ("new", "new", 1.0),
        ("new", "new", 1.0),
        (None, None, None),
    ]


def test_finishing_again_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, MIXED)
    contents = []
    for _ in range(3):
        with AnnotationStore(tmp_path) as store:
            finish(store)
            finish(store)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", FILE, PARQUET]


def test_lines_without_a_key_or_a_sample_s_number_all_vote(tmp_path: Path) -> None:
    lines = [f'{{"id": "a", "rationale": "R", "label": "{label}"}}\n' for label in ("x", "x", "y")]
    (tmp_path / FILE).write_text("".join(lines))
    with AnnotationStore(tmp_path) as store:
        finish(store)
    assert [tuple(row[name] for name in VOTED[2:]) for row in raw(tmp_path)] == [
        (3, "x", 2 / 3, True),
        (3, "x", 2 / 3, True),
        (3, "x", 2 / 3, False),
    ]


def test_a_user_s_own_columns_stay(tmp_path: Path) -> None:
    rows = [asdict(answer("b")) | {"score": 3}, asdict(answer("a")) | {"checked": ["by", "me"]}]
    (tmp_path / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with AnnotationStore(tmp_path) as store:
        store.append(answer("c"))
        finish(store)
    assert [(row.get("score"), row.get("checked")) for row in raw(tmp_path)] == [
        (None, ["by", "me"]),
        (3, None),
        (None, None),
    ]


def test_a_job_goes_on_after_it_was_finished(tmp_path: Path) -> None:
    with AnnotationStore(tmp_path) as store:
        store.append(answer("b"))
        finish(store)
        store.append(answer("a", 0, "no"))
        store.append(answer("a", 1, "no"))
        assert [found.votes for found in samples_of(tmp_path)] == [1, None, None]
        finish(store)
    assert [(row["id"], row["votes"]) for row in raw(tmp_path)] == [("a", 2), ("a", 2), ("b", 1)]
    assert store.answered.keys() == keys(("a", 0), ("a", 1), ("b", 0))


def test_a_store_without_a_sample_is_finished_too(tmp_path: Path) -> None:
    with AnnotationStore(tmp_path) as store:
        finish(store)
        store.write_card()
    assert (tmp_path / FILE).read_bytes() == b""
    assert pq.read_table(tmp_path / PARQUET).num_rows == 0


class Crash(Exception):
    """The machine goes down."""


def crash(*_: Any, **__: Any) -> Any:
    raise Crash


@pytest.mark.parametrize("while_reading", [False, True])
def test_a_crash_while_a_job_is_finished_leaves_the_old_file(
    while_reading: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, MIXED)
    before = path.read_bytes()
    with AnnotationStore(tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(*((store, "_read", crash) if while_reading else (Path, "replace", crash)))
            with pytest.raises(Crash):
                finish(store)
        assert path.read_bytes() == before
        store.append(answer("b", 5))
    assert kept(tmp_path) == [*MIXED, answer("b", 5)]


@pytest.mark.parametrize("taken", ["a file", "under a file", "the samples' name", "the lock's name"])
def test_a_folder_that_cannot_be_written_is_named(taken: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if taken in ("a file", "under a file"):
        folder.write_text("x")
        folder = folder / "deeper" if taken == "under a file" else folder
    else:
        (folder / (FILE if taken == "the samples' name" else ".lock")).mkdir(parents=True)
    with pytest.raises(OSError, match=re.escape(str(folder))):
        AnnotationStore(folder)


def short(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """The disk has room for so many bytes more."""
    write_all = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write_all(file, line[:length]))


def test_a_full_disk_is_said_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # questions under way are answered all the same, and the job is finished whatever ended it
    with AnnotationStore(tmp_path) as store:
        store.append(THREE[0])
        with monkeypatch.context() as patched:
            short(patched, 9)
            with pytest.raises(OSError, match=re.escape(str(store.path))):
                store.append(THREE[1])
        assert store.answered.keys() == keys(("a", 0))
        assert store.path.read_bytes() == to_line(THREE[0])
        store.append(THREE[2])
        finish(store)
    assert without_votes(kept(tmp_path)) == [THREE[0], THREE[2]]


def test_metadata_is_kept_beside_the_samples(tmp_path: Path) -> None:
    with AnnotationStore(tmp_path) as store:
        store.note({"started": "1", "ended": "1"})
        store.note({"started": "2", "teacher": "Ünal's"})
        store.note({"started": "1", "ended": "3"})
    jobs = [{"started": "2", "teacher": "Ünal's"}, {"started": "1", "ended": "3"}]
    assert json.loads((tmp_path / METADATA).read_text()) == {"format": 1, "jobs": jobs}
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", METADATA, FILE]


@pytest.mark.parametrize("content", [b"", b'{"jobs": [', b"\xff", b"[1]", b'{"jobs": 5}', b'{"jobs": [1]}'])
def test_damaged_metadata_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with AnnotationStore(tmp_path) as store, pytest.raises(UserError, match=re.escape(str(tmp_path / METADATA))):
        store.note({"started": "1"})
    assert (tmp_path / METADATA).read_bytes() == content


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A finished job with its Parquet file."""
    samples: Sequence[Annotation] = [
        *MIXED,
        replace(answer("c", 7), input_tokens=3, cost=0.5, logprob=-1.25, structured=True, text="tschüß\n🦉"),
    ]
    write(tmp_path, samples)
    with AnnotationStore(tmp_path) as store:
        finish(store)
    return tmp_path


def test_parquet_holds_the_same_rows(exported: Path) -> None:
    path, rows = exported / PARQUET, raw(exported)
    assert len(rows) == len(MIXED) + 1
    table = pq.read_table(path)
    assert table.column_names == list(COLUMNS)
    assert table.to_pylist() == rows
    found = pd.read_parquet(path, dtype_backend="pyarrow")
    assert found.astype(object).where(found.notna(), None).to_dict("records") == rows
    assert list(datasets.Dataset.from_parquet(str(path), cache_dir=str(exported / "cache"))) == rows
    assert [annotation for annotation, _ in read_rows(path)] == kept(exported)
    assert [row for _, row in read_rows(path)] == rows


def test_parquet_s_columns_have_their_types(exported: Path) -> None:
    types = {field.name: str(field.type) for field in pq.read_schema(exported / PARQUET)}
    whole = ("sample", "length", "votes", "input_tokens", "output_tokens")
    numbers = ("logprob", "vote_share", "cost")
    yes_or_no = ("parsed", "agrees", "contains_label", "in_majority", "distinct", "structured")
    expected = dict.fromkeys(COLUMNS, "string") | dict.fromkeys(whole, "int64") | dict.fromkeys(numbers, "double")
    assert types == expected | dict.fromkeys(yes_or_no, "bool")


def test_parquet_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_distill.annotation.store._CHUNK", 2)
    samples = [answer("a", number) for number in range(5)]
    write(tmp_path, samples)
    with AnnotationStore(tmp_path) as store:
        finish(store)
    assert without_votes(annotation for annotation, _ in read_rows(tmp_path / PARQUET)) == samples


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"id": "a"}\n'])
def test_what_is_no_parquet_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / PARQUET
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: not a Parquet file"):
        list(read_rows(path))


def test_a_row_of_parquet_that_is_no_sample_is_named(tmp_path: Path) -> None:
    path = tmp_path / PARQUET
    pd.DataFrame({"id": ["a", None], "label": ["yes", "no"]}).to_parquet(path)
    rows = read_rows(path)
    assert next(rows)[0] == Annotation("a", label="yes")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}, row 1: not a sample: id: Field required"):
        next(rows)


def test_samples_of_another_input_are_another_row(tmp_path: Path) -> None:
    old = replace(answer("a", 0, "no"), input="old", key="ab")
    write(tmp_path, [old, answer("a", 0, "yes")])
    with AnnotationStore(tmp_path) as store:
        store.finish(lambda found: 0 if found.input == "i" else None, plainly)
    assert [(row["input"], row["votes"], row["majority_label"]) for row in raw(tmp_path)] == [
        ("i", 1, "yes"),
        ("old", 1, "no"),
    ]


def test_what_agrees_is_read_anew_when_it_is_opened(tmp_path: Path) -> None:
    write(tmp_path, [answer("a", agrees=True), answer("b", agrees=False)])
    with AnnotationStore(tmp_path, read=lambda found: replace(found, agrees=not found.agrees)) as store:
        assert store.answered == {key_of("a"): False, key_of("b"): True}


def test_the_file_that_a_link_leads_to_is_written(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "kept.jsonl"
    write(real.parent, MIXED).rename(real)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).symlink_to(real)
    with AnnotationStore(tmp_path / "out") as store:
        finish(store)
        store.append(answer("b", 5))
    assert (tmp_path / "out" / FILE).is_symlink()
    assert len(real.read_bytes().splitlines()) == len(MIXED) + 1


def test_a_key_twice_in_one_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"id": "a", "text": "t"}\n{"id": "a", "text": "t", "text": "u"}\n')
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / FILE}:2: the key 'text' is there twice")):
        AnnotationStore(tmp_path)
