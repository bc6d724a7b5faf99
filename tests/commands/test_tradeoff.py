"""``tradeoff``: what it writes, prints and refuses."""

import csv
import json
from pathlib import Path

import matplotlib.image
import pytest

from tests.runs import refusal, run, small_model, toy_data
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def student(here: Path) -> Path:
    return add_weights(make_student_folder(here / "student"))


def test_a_table_and_a_figure(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = ["--exits=[1,all]", "--keep=[0.5]", "--after=2"]
    run("tradeoff", student, small_model(student), toy_data(), "--rows=5", points, "--out=curve")
    assert sorted(path.name for path in Path("curve").iterdir()) == [
        f"tradeoff.{kind}" for kind in ("csv", "json", "png", "svg")
    ]
    found = json.loads(Path("curve/tradeoff.json").read_text())
    assert (found["rows"], found["after"], found["device"]) == (5, 2, "cpu")
    # the whole student is always there
    assert [(one["exit"], one["keep"]) for one in found["points"]] == [(2, 1.0), (1, 0.5), (2, 0.5)]
    with Path("curve/tradeoff.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in table] == found["points"]
    height, width, _ = matplotlib.image.imread("curve/tradeoff.png").shape
    assert (width, height) == (1800, 900)
    assert "bars: 95 % interval" in Path("curve/tradeoff.svg").read_text()
    shown = capsys.readouterr().out
    assert "accuracy against speed, greedy" in shown
    assert shown.splitlines()[-1].strip() == "curve"


def test_refusals(student: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = add_weights(make_causal_folder(here / "llama"), make_causal_tokenizer())
    t5, out = [student, *toy_data()], "--out=curve"
    for arguments, line in [
        ([], "student: must be given first, as in `lit-distill tradeoff RUN --out FOLDER`"),
        ([t5], "out: must be given, as --out FOLDER"),
        ([t5, out, "--exits=[last]"], "exits: all, or else each must be an integer in [1, 2], got 'last'"),
        ([t5, out, "--keep=[0.5,0]"], "keep must be in (0, 1], got 0.0"),
        ([t5, out, "--after=3"], "after must be an integer in [1, 2], got 3"),
        ([llama, *toy_data(), out, "--keep=[0.5]"], "keep: a decoder-only student has no encoder"),
        ([t5, out], "rows: test has 5 rows, 200 are needed; --rows 5 takes all of them"),
    ]:
        assert refusal(capsys, "tradeoff", arguments).startswith(line)
        assert not Path("curve").exists()
