"""Figures: which there are, that all in them can be read, and that they come out the same."""

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lit_distill.comparison.comparing import compare_runs
from lit_distill.comparison.figures import draw, figure_of, keep_apart, styles_of
from lit_distill.comparison.plots import DotPlot, LinePlot, plots
from lit_distill.comparison.runs import find_runs
from tests.comparison.runs import answers, write_run, write_runs

LONG = "my-very-long-student-name-of-an-experiment-with-adapters-t5-base"


def few(root: Path) -> None:
    """Two methods, one seed, a few percent."""
    for fraction in (0.1, 1.0):
        write_run(root / f"s{fraction}", train_fraction=fraction, correct=answers(0.5 + fraction / 10, 200, 1))
        write_run(root / f"o{fraction}", method="StepByStep", train_fraction=fraction)


def like_the_paper(root: Path) -> None:
    """Fractions, sizes, variants, seeds, what was published, a teacher."""
    for fraction, accuracy in ((0.125, 0.49), (0.25, 0.55), (0.5, 0.59), (1.0, 0.62)):
        for method in ("Standard", "StepByStep"):
            write_runs(root, [0, 1], accuracy, 1221, method=method, train_fraction=fraction)
    write_runs(root, [0, 1], 0.614, 1221, method="SingleTask")
    write_runs(root, [0, 1], 0.627, 1221, method="StepByStep", rationales="shuffled")
    for student, accuracy in (("t5-v1_1-small", 0.45), ("t5-v1_1-large", 0.7)):
        write_runs(root, [0], accuracy, 1221, method="Standard", student=student)


def many(root: Path) -> None:
    """Long names, nine lines, fractions that are close."""
    methods = ["Standard", "StepByStep", "MutualInformationChainOfThoughtWithFiveRationales", "TinyLLM", "Mixed"]
    for i, method in enumerate(methods):
        for fraction in (0.05, 0.1, 0.7, 0.8, 0.9, 1.0):
            how: dict[str, Any] = {
                "method": method,
                "train_fraction": fraction,
                "student": LONG,
                "dataset": "my_own_set_of_questions",
            }
            write_runs(root, [0, 1], 0.5 + 0.02 * i, 100, **how)
            if method == "StepByStep":
                for weight in (0.1, 0.5, 2.0, 10.0):
                    write_runs(root, [0, 1], 0.55, 100, model={"rationale_weight": weight}, **how)


def tiny(root: Path) -> None:
    """Nothing apart; two families of students of the same sizes."""
    for student in ("t5-v1_1-small", "t5-v1_1-base", "flan-t5-small", "flan-t5-base"):
        size = 77_000_000 if "small" in student else 248_000_000
        for method in ("Standard", "StepByStep"):
            correct = answers(0.6201, 2000, 1)
            how: dict[str, Any] = {
                "method": method,
                "student": student,
                "label_source": "teacher",
                "teacher_accuracy": 0.6203,
            }
            write_run(root / f"{method}-{student}", correct=correct, parameters=size, **how)


def extremes(root: Path) -> None:
    """All right, all wrong, one row."""
    for fraction in (0.001, 1.0):
        write_run(root / f"s{fraction}", train_fraction=fraction, correct=[False])
        write_run(root / f"o{fraction}", method="StepByStep", train_fraction=fraction, correct=[True])


CASES = [few, like_the_paper, many, tiny, extremes]


def plots_of(root: Path, **how: Any) -> list[LinePlot | DotPlot]:
    return plots(compare_runs(find_runs([root]), resamples=200, **how))


def texts_of(figure: Figure) -> list[Text]:
    """All that is written."""
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible() and text.get_text()]


@pytest.mark.parametrize("metric", ["test/accuracy", "test/loss"])
@pytest.mark.parametrize("case", CASES)
def test_no_text_is_over_another_or_cut_off(tmp_path: Path, case: Callable[[Path], None], metric: str) -> None:
    case(tmp_path)
    found = plots_of(tmp_path, metric=metric)
    assert found
    for plot in found:
        figure = figure_of(plot, styles_of(found), percent=metric == "test/accuracy")
        texts = texts_of(figure)
        assert len(texts) > 6
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        for (one, box), (other, second) in combinations(boxes, 2):
            assert not box.overlaps(second), f"{plot.name}: {one!r} and {other!r}"
        whole = figure.bbox
        for one, box in boxes:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
            assert inside, f"{plot.name}: {one!r} is cut off"
        for axes in figure.axes:
            data = axes.get_window_extent()
            for one, box in boxes:
                assert not box.overlaps(data), f"{plot.name}: {one!r} lies in the data"


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_drawn_lies_within_the_axes(tmp_path: Path, case: Callable[[Path], None]) -> None:
    case(tmp_path)
    found = plots_of(tmp_path)
    for plot in found:
        for axes in figure_of(plot, styles_of(found), percent=True).axes:
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            for line in axes.get_lines():
                xs, ys = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
                if line.get_transform().contains_branch(axes.transData) and len(xs) > 2:
                    assert ((xs >= left) & (xs <= right)).all()
                    assert ((ys >= low) & (ys <= high)).all()


def test_there_is_a_figure_for_each_question_that_runs_answer(tmp_path: Path) -> None:
    like_the_paper(tmp_path)
    assert [plot.name for plot in plots_of(tmp_path)] == [
        "cqa-gold-t5-v1_1-base-training_rows",
        "cqa-gold-student_size",
        "cqa-gold-t5-v1_1-base-methods",
    ]
    # the figure of sizes has no teacher where another metric than its own is shown
    assert all(not plot.levels for plot in plots_of(tmp_path, metric="test/loss") if isinstance(plot, LinePlot))


def test_sides_are_named_where_there_are_two(tmp_path: Path) -> None:
    # of two variants neither is compared with the other
    for rationales in ("own", "shuffled"):
        write_runs(tmp_path, [0, 1], 0.6, method="StepByStep", rationales=rationales)
    [alone] = plots_of(tmp_path)
    assert isinstance(alone, DotPlot)
    assert alone.baseline is None
    assert len(figure_of(alone, styles_of([alone]), percent=True).axes) == 1
    assert not any("left" in note or "right" in note for note in alone.notes)
    write_runs(tmp_path, [0, 1], 0.5, method="Standard")
    [beside] = plots_of(tmp_path)
    assert [note.partition(":")[0] for note in beside.notes][::2] == ["left", "right"]


def test_there_is_none_without_two_values(tmp_path: Path) -> None:
    write_runs(tmp_path, [0, 1], 0.6, method="Standard")
    assert plots_of(tmp_path) == []
    # two fractions, but of one method each: no line
    write_runs(tmp_path, [0, 1], 0.6, method="StepByStep", train_fraction=0.5)
    assert plots_of(tmp_path) == []
    assert draw([], tmp_path / "figures", percent=True) == []
    assert not (tmp_path / "figures").exists()


def test_the_points_are_the_rows(tmp_path: Path) -> None:
    like_the_paper(tmp_path)
    comparison = compare_runs(find_runs([tmp_path]), resamples=200)
    first, sizes, dots = plots(comparison)
    rows = comparison.sections[0].rows
    assert isinstance(first, LinePlot)
    (standard,) = [line for line in first.lines if line.label == "standard finetuning"]
    own = [row for row in rows if row.name == "standard finetuning" and row.setting.student == "t5-v1_1-base"]
    assert [(point.x, point.mean, point.error) for point in standard.points] == [
        (row.setting.train_fraction, row.summary.mean, row.summary.standard_error) for row in own
    ]
    assert [point.published for point in standard.points] == [None, None, None, 0.6219]
    assert [text for _, text in first.ticks] == ["12.5 %\n1,096", "25 %\n2,192", "50 %\n4,383", "100 %\n8,766"]
    assert isinstance(sizes, LinePlot)
    assert sizes.levels == ((0.7723, "teacher's labels"),)
    assert [text for _, text in sizes.ticks] == [
        "77M\nt5-v1_1-small",
        "248M\nt5-v1_1-base",
        "783M\nt5-v1_1-large",
    ]
    assert isinstance(dots, DotPlot)
    assert [dot.mean for dot in dots.dots] == sorted((dot.mean for dot in dots.dots), reverse=True)
    assert dots.baseline == "standard finetuning"
    assert [dot.difference is None for dot in dots.dots] == [dot.is_baseline for dot in dots.dots]


def axes_of(plot: LinePlot | DotPlot) -> Axes:
    return figure_of(plot, styles_of([plot]), percent=True).axes[0]


def test_what_is_drawn_is_in_percent_with_error_bars(tmp_path: Path) -> None:
    like_the_paper(tmp_path)
    plot = plots_of(tmp_path)[0]
    assert isinstance(plot, LinePlot)
    axes = axes_of(plot)
    assert axes.get_ylabel() == "test accuracy (%)"
    drawn = {round(float(y), 6) for line in axes.get_lines() for y in np.asarray(line.get_ydata(), float)}
    points = [point for line in plot.lines for point in line.points]
    assert {round(100 * point.mean, 6) for point in points} <= drawn
    assert {round(100 * point.published, 6) for point in points if point.published} <= drawn
    bars = {
        (round(float(a), 4), round(float(b), 4))
        for collection in axes.collections
        for a, b in (segment[:, 1] for segment in collection.get_segments())  # type: ignore[attr-defined]
    }
    expected = {
        (round(100 * (point.mean - point.error), 4), round(100 * (point.mean + point.error), 4))
        for point in points
        if point.error is not None
    }
    assert expected == bars


def test_a_key_that_follows_the_axis_does_not_break_a_line(tmp_path: Path) -> None:
    for fraction, steps in ((0.5, 500), (1.0, 1000)):
        for method in ("Standard", "StepByStep"):
            how: dict[str, Any] = {"method": method, "train_fraction": fraction, "model": {"warmup": steps}}
            write_run(tmp_path / f"{method}{fraction}", **how)
    plot = plots_of(tmp_path)[0]
    assert isinstance(plot, LinePlot)
    assert {line.label: len(line.points) for line in plot.lines} == {"standard finetuning": 2, "step-by-step": 2}
    assert plot.notes[0] == "warmup differs between points (see the table)"


def test_methods_look_apart_without_colour_and_the_same_in_all_figures(tmp_path: Path) -> None:
    many(tmp_path)
    found = plots_of(tmp_path)
    styles = styles_of(found)
    assert styles[("Standard", "")] == styles_of([])[("Standard", "")]
    assert len({(style.marker, style.stroke) for style in styles.values()}) == len(styles)
    line_plot, dot_plot = found
    assert isinstance(line_plot, LinePlot)
    assert isinstance(dot_plot, DotPlot)
    assert {line.style for line in line_plot.lines} == {dot.style for dot in dot_plot.dots}


def settings_of_matplotlib() -> dict[str, Any]:
    """Without the backend, which is chosen by being looked at."""
    return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}


def test_drawing_needs_no_pyplot_and_planning_no_matplotlib(tmp_path: Path) -> None:
    few(tmp_path / "runs")
    code = f"""
import sys
from pathlib import Path
from lit_distill.comparison import comparing, figures, plots, report, runs
comparison = comparing.compare_runs(runs.find_runs([{str(tmp_path / "runs")!r}]), resamples=200)
found = plots.plots(comparison)
assert not {{"matplotlib", "pyarrow", "wandb", "pandas", "torch"}} & set(sys.modules), "too early"
assert figures.draw(found, Path({str(tmp_path / "figures")!r}), percent=True)
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)  # noqa: S603 - our own program


def test_files_are_the_same_each_time_and_leave_matplotlib_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(tmp_path / "runs")
    found = plots_of(tmp_path / "runs")
    before = settings_of_matplotlib()
    first = draw(found, tmp_path / "a", percent=True)
    assert settings_of_matplotlib() == before
    monkeypatch.setitem(mpl.rcParams, "font.size", 30.0)
    second = draw(found, tmp_path / "b", percent=True)
    assert [drawn.png.name for drawn in first] == [drawn.png.name for drawn in second]
    for one, other in zip(first, second, strict=True):
        assert one.png.read_bytes() == other.png.read_bytes()
        assert one.svg.read_bytes() == other.svg.read_bytes()
        assert one.png.read_bytes().startswith(b"\x89PNG")
        assert "62.00" in one.alt


def test_labels_of_an_axis_are_kept_from_the_right() -> None:
    assert keep_apart([0, 1, 2], [0.5, 0.5, 0.5]) == [0, 1, 2]
    assert keep_apart([0, 1.9, 2], [0.5, 0.5, 0.5]) == [0, 2]
