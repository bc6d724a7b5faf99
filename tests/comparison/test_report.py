"""The report: all that was found is in it, twice the same, in files that need no other."""

import base64
import csv
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from lit_distill.comparison.comparing import Comparison, compare_runs
from lit_distill.comparison.report import (
    DAGGER,
    DOUBLE_DAGGER,
    cells,
    change,
    further_cells,
    number,
    to_markdown,
    write_report,
)
from lit_distill.comparison.runs import find_runs
from tests.comparison.runs import answers, write_run, write_runs
from tests.comparison.test_figures import costs


def two_datasets(root: Path) -> None:
    """What there can be: variants, seeds, gaps, skipped and repeated runs, odd names."""
    for method, accuracy in (("Standard", 0.62), ("StepByStep", 0.64), ("SingleTask", 0.61)):
        write_runs(root, [0, 1, 2], accuracy, 1221, method=method)
    write_runs(root, [0], 0.63, 1221, method="StepByStep", rationales="shuffled")
    write_runs(root, [0, 1], 0.7, 1221, method="StepByStep", label_source="teacher")
    write_run(root / "again", correct=answers(0.5, 1221, 3), started="2027-01-01T00:00:00+00:00")
    write_run(root / "odd", dataset="my|set", method="A<b>B", student="x_y_z", versions={"torch": "9"}, git={})
    write_run(root / "metrics only", dataset="my|set", seed=5, predictions=False, train_rows=0)
    (root / "begun").mkdir()
    (root / "begun" / "config.yaml").touch()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs``, and the report of them in ``out``."""
    root = tmp_path_factory.mktemp("report")
    two_datasets(root / "runs")
    return root


@pytest.fixture(scope="module")
def comparison(root: Path) -> Comparison:
    return compare_runs(*find_runs([root / "runs"]), resamples=300)


@pytest.fixture(scope="module")
def figures(root: Path, comparison: Comparison) -> list[Path]:
    return write_report(comparison, root / "out")


@pytest.fixture
def out(root: Path, figures: list[Path]) -> Path:
    assert figures
    return root / "out"


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def rows_of_markdown(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_setting_and_number_is_in_both(comparison: Comparison, out: Path) -> None:
    markdown = (out / "report.md").read_text(encoding="utf-8")
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    # the same cells in both, in the same order
    assert page.rows == rows_of_markdown(markdown)
    expected = [
        list(row.values())
        for _, settings in comparison.settings.groupby(["dataset", "label_source"])
        for row in cells(settings, "test/accuracy")
    ]
    assert len(expected) == 7
    for own in expected:
        assert any(set(own) <= set(row) for row in page.rows), own
    assert page.open == []


def test_what_was_not_compared_is_said(comparison: Comparison, out: Path) -> None:
    text = " ".join(Page((out / "report.html").read_text(encoding="utf-8")).words)
    runs = out.parent / "runs"
    for part in (
        f"{runs}/begun: no run.json: the run has not ended",
        f"again as {runs}/again",
        f"{runs}/metrics only: no test_predictions.jsonl",
        "step-by-step, GPT-NeoX 20B rationales",
        "No interval: no baseline with its student, labels and fraction: step-by-step (t5-v1_1-base, 100 %)",
        "300 resamples, seed 0",
        "but not the choice of seeds",
        "covers seeds and not test rows",
        "If these very students were equally good on the population of test rows",
        "41 % had p < 0.05",
        "\N{DOUBLE DAGGER} Only over the seeds that both it and its baseline have.",
    ):
        assert part in text, part
    for run in comparison.compared:
        assert shlex.join(run.record.command) in text


def test_nothing_is_said_of_what_does_not_occur(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", correct=answers(0.6, 50, 0), student="mine", git={})
    one = compare_runs(*find_runs([tmp_path / "runs"]), resamples=100)
    text = to_markdown(one)
    meaning = text[text.index("What the numbers mean") :]
    assert "mean ± se" in meaning
    for term in ("bootstrap", "by seed", "p-values", "published", "chance", DOUBLE_DAGGER):
        assert term not in meaning, term
    write_run(tmp_path / "runs" / "two", correct=answers(0.7, 50, 0), method="StepByStep", student="mine", git={})
    text = to_markdown(compare_runs(*find_runs([tmp_path / "runs"]), resamples=100))
    assert all(term in text for term in ("bootstrap", "by seed", "p-values"))


def test_chance_is_in_table_and_notes(tmp_path: Path) -> None:
    for seed in (0, 1):
        for method, accuracy in (("Standard", 0.3), ("StepByStep", 0.36)):
            folder = tmp_path / "runs" / f"{method}{seed}"
            write_run(folder, correct=answers(accuracy, 50, seed), method=method, seed=seed, chance=0.34)
    found = compare_runs(*find_runs([tmp_path / "runs"]), resamples=100)
    report = to_markdown(found)
    assert re.search(r"^\| chance \|.* 34\.00 \|", report, re.MULTILINE)
    assert "without reading the input" in report
    assert list(found.settings.chance) == [0.34, 0.34]
    # a loss has no chance
    assert compare_runs(*find_runs([tmp_path / "runs"]), metric="test/loss").settings.chance.count() == 0


def test_floors_are_in_table_and_notes_and_who_is_below_is_told(tmp_path: Path) -> None:
    for seed, level in ((0, 0.5), (1, 0.52)):
        for method, accuracy in (("Standard", 0.4), ("StepByStep", 0.7)):
            floors = {"words": 0.3, "second_part_words": level}
            folder = tmp_path / "runs" / f"{method}{seed}"
            write_run(folder, correct=answers(accuracy, 50, seed), method=method, seed=seed, floors=floors)
    found = compare_runs(*find_runs([tmp_path / "runs"]), resamples=100)
    assert list(found.settings.floor) == pytest.approx([0.51, 0.51])
    report = to_markdown(found)
    below = (
        f"standard finetuning, t5-v1_1-base: accuracy {found.settings['mean'].iloc[0]:.3f} is below the floor, 0.510"
    )
    assert below in report
    assert report.count("is below the floor") == 1
    assert "- floor: the accuracy" in report
    assert re.search(r"\| 51\.00 \|", report)
    # a loss has no floor, and a run without one leaves its setting without
    assert compare_runs(*find_runs([tmp_path / "runs"]), metric="test/loss").settings.floor.count() == 0
    # of the tested rows alone
    assert compare_runs(*find_runs([tmp_path / "runs"]), metric="val/accuracy").settings.floor.count() == 0
    write_run(tmp_path / "runs" / "old", correct=answers(0.4, 50, 3), method="Standard", seed=2)
    assert compare_runs(*find_runs([tmp_path / "runs"]), resamples=100).settings.floor.count() == 1


def test_costs_and_further_metrics_have_a_table(tmp_path: Path) -> None:
    costs(tmp_path)
    comparison = compare_runs(*find_runs([tmp_path]), resamples=100)
    rows = further_cells(comparison.settings, "test/accuracy")
    assert list(rows[0]) == [
        "setting", "training rows", "training tokens", "tokens a row", "tokens of a vote", "accuracy by vote",
        "worst group", "group macro-F1", "lost at 10 %",
    ]  # fmt: skip
    (row,) = [row for row in rows if row["setting"] == "step-by-step" and row["training rows"].startswith("100 %")]
    assert list(row.values())[2:] == [
        "9M", "4.2", "33.6", "66.50 ± 0.50", "43.50 ± 0.50", "63.50 ± 0.50", "9.00 ± 0.00 (2)"
    ]  # fmt: skip
    # the votes of a method that has none, and a fraction of its own
    assert [row["accuracy by vote"] for row in rows if row["setting"] == "standard finetuning"] == [""] * 3
    text = to_markdown(comparison)
    assert "- tokens: of training" in text
    assert "- worst group:" in text
    assert "- lost at:" in text


def test_with_several_baselines_each_setting_names_its_own(tmp_path: Path) -> None:
    for method, kl in (("Standard", False), ("Standard", True), ("StepByStep", False), ("StepByStep", True)):
        model = {"objectives": [{"class_path": "ForwardKL"}]} if kl else {}
        write_run(tmp_path / f"{method}{kl}", method=method, model=model)
    comparison = compare_runs(*find_runs([tmp_path]), resamples=100)
    found = {row["setting"]: row["compared with"] for row in cells(comparison.settings, comparison.metric)}
    with_kl = "standard finetuning, objectives ForwardKL"
    assert found == {
        "standard finetuning": "",
        with_kl: "standard finetuning",
        "step-by-step": "standard finetuning",
        "step-by-step, objectives ForwardKL": with_kl,
    }
    text = to_markdown(comparison)
    assert "| compared with |" in text
    assert "Baseline:" not in text


def test_without_costs_there_is_no_such_table(comparison: Comparison, out: Path) -> None:
    assert further_cells(comparison.settings, "test/accuracy") == []
    assert "worst group" not in (out / "report.md").read_text(encoding="utf-8")


def test_a_number_of_training_rows_is_told_as_one(tmp_path: Path) -> None:
    for rows in (1250, 10_000):
        for method in ("Standard", "StepByStep"):
            write_run(tmp_path / f"{method}{rows}", method=method, train_fraction=rows)
    comparison = compare_runs(*find_runs([tmp_path]), resamples=300)
    assert [row["training rows"] for row in cells(comparison.settings, comparison.metric)] == [
        *("1,250", "1,250", "10,000", "10,000")
    ]


def test_the_page_needs_no_other_file(figures: list[Path], out: Path) -> None:
    content = (out / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    assert len(figures) == len(page.links) > 0
    for link, png in zip(page.links, figures, strict=True):
        head, _, data = link.partition(",")
        assert head == "data:image/svg+xml;base64"
        assert base64.b64decode(data) == png.with_suffix(".svg").read_bytes()
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in content
    assert "url(" not in content
    assert "<b>B" not in content
    assert "prefers-color-scheme: dark" in content
    assert "@media print" in content


def test_the_figures_of_the_markdown_are_there(figures: list[Path], out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert len(links) == len(figures)
    assert all((out / link).is_file() and not link.startswith("/") for link in links)


def test_the_table_is_in_both_formats(comparison: Comparison, out: Path) -> None:
    table = pq.read_table(out / "runs.parquet").to_pylist()
    assert len(table) == len(comparison.compared) + 1 == 15
    with (out / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["folder"] for row in rows] == [row["folder"] for row in table]
    assert list(rows[0]) == list(table[0])
    for row, other in zip(rows, table, strict=True):
        assert float(row["test/accuracy"]) == other["test/accuracy"]
    (again,) = [row for row in table if row["duplicate_of"]]
    assert again["duplicate_of"].endswith("/again")


def test_the_same_runs_give_the_same_bytes_whatever_the_users_settings(
    comparison: Comparison, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mpl.rcParams, "font.size", 30.0)
    before = {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}
    write_report(comparison, tmp_path)
    assert {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"} == before
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in (out, tmp_path)
    )
    assert len(first) >= 6
    assert first == second


def test_numbers() -> None:
    assert number(0.62191, "test/accuracy") == "62.19"
    assert number(0.62191, "test/loss") == "0.6219"
    assert number(None, "test/accuracy") == ""
    assert change(-0.00501, "test/accuracy") == "\N{MINUS SIGN}0.50"
    assert change(0.012, "test/accuracy") == "+1.20"
    assert change(-0.00001, "test/accuracy") == "0.00"
    assert change(0.0, "test/loss") == "0.0000"


def test_what_rests_on_few_rows_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "a", correct=[True] * 50 + [False] * 50)
    write_run(tmp_path / "b", method="StepByStep", correct=[True] * 59 + [False] * 41)
    settings = compare_runs(*find_runs([tmp_path]), resamples=10_000).settings
    assert cells(settings, "test/accuracy")[1]["p"] == f"< 0.001 {DAGGER}"
    write_run(tmp_path / "b", method="StepByStep", correct=[True] * 60 + [False] * 40)
    settings = compare_runs(*find_runs([tmp_path]), resamples=10_000).settings
    assert cells(settings, "test/accuracy")[1]["p"] == "< 0.001"


def test_odd_names_spoil_neither_figures_nor_files(tmp_path: Path) -> None:
    for method in ("Standard", "StepByStep"):
        # on some file systems these two names are one
        for student in ("dir$a$^{x" + "y" * 300, "DIR$a$^{x" + "y" * 300):
            write_run(tmp_path / "runs" / f"{method}{student[:8]}", method=method, student=student, parameters=5)
    figures = write_report(compare_runs(*find_runs([tmp_path / "runs"]), resamples=100), tmp_path / "out")
    assert len({str(png).lower() for png in figures}) == len(figures) == 2
    assert all(png.is_file() and png.with_suffix(".svg").is_file() for png in figures)


@pytest.mark.parametrize(
    "name", ["a\nb &lt; c", "![x](y)", "<img src=x onerror=y>", "_a_ *b* `c` ~d~", "x|y\\|z", "$a$ # h"]
)
def test_a_name_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "runs", dataset=name, student=name, method=name)
    comparison = compare_runs(*find_runs([tmp_path / "runs"]), resamples=100)
    write_report(comparison, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert {"img", "em", "strong", "code", "a"} & set(page.tags) <= {"code"}
    assert [row[0] for row in page.rows[1:2]] == [" ".join(name.split("\n"))]
    assert "## " + name not in to_markdown(comparison)
