"""A folder that an earlier version wrote: its format stays readable, and none of its questions is asked again."""

import json
import shutil
from pathlib import Path

import pytest

from lit_distill.annotation.store import FILE, METADATA, PARQUET, read_rows
from lit_distill.data import JSONLDataModule
from tests.runs import at_work_in, run
from tests.teachers.servers import serving

FROZEN = Path(__file__).parent / "frozen"


def test_its_files_are_read_as_they_stand() -> None:
    lines = [json.loads(line) for line in (FROZEN / "out" / FILE).read_text().splitlines()]
    for name in (FILE, PARQUET):
        found = [(annotation, row) for annotation, row in read_rows(FROZEN / "out" / name)]
        assert [row for _, row in found] == lines
        assert {one.kind for one, _ in found} == {"rationale"}
        assert [(one.id, one.label, one.cost, one.key) for one, _ in found] == [
            (line["id"], line["label"], line["cost"], line["key"]) for line in lines
        ]
    assert [job["rows"] for job in json.loads((FROZEN / "out" / METADATA).read_text())["jobs"]] == [3, 3, 1]
    joined = JSONLDataModule(train=str(FROZEN / "rows.jsonl"), rationales=str(FROZEN / "out")).released("train")
    assert joined is not None
    assert [(row.id, row.rationale, row.teacher_label) for row in joined] == [
        ("r0", "It is 0.", "0"),
        ("r1", None, None),
        ("r2", "It is two.", "2"),
    ]


def test_nothing_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FROZEN, tmp_path / "job")
    before = [json.loads(line) | {"kind": "rationale"} for line in (FROZEN / "out" / FILE).read_text().splitlines()]
    # of what is parsed nothing is said twice by one teacher
    given = {"given_rationale": None, "given_label": None}
    before = [line | given | {"distinct": True if line["parsed"] else None} for line in before]
    with at_work_in(tmp_path / "job", monkeypatch), serving() as server:
        asked = ["--data=JSONLDataModule", "--data.train=rows.jsonl", "--teacher=OpenAITeacher", "--out=out"]
        asked += [f"--teacher.base_url={server.url}", "--teacher.model=org/tiny", "--teacher.input_price=1"]
        asked += ["--teacher.output_price=2", "--prompt=prompt.yaml"]
        run("annotate", asked, "--num_samples=2")
        run("annotate", asked, "--structured")
        second = ["--teacher.layout=completion", "--teacher.name=second", "--teacher.logprobs=true", "--limit=1"]
        run("annotate", asked, second)
        assert server.requests == []
        assert [json.loads(line) for line in Path("out", FILE).read_text().splitlines()] == before
        # what failed is asked once that is wanted
        run("annotate", asked, "--num_samples=2", "--retry_errors")
        assert [request.body["seed"] for request in server.requests] == [1]
