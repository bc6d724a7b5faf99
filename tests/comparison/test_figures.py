"""Figures: which there are, that all in them can be read, and that they come out the same."""

from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from lit_distill.comparison.comparing import Comparison, compare_runs
from lit_distill.comparison.figures import Plot, draw
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
        for fraction in (0.05, 0.8, 0.9, 1.0):
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


def costs(root: Path) -> None:
    """Tokens of training and inference, and votes of two methods, of which one needs many tokens."""
    settings = [("Standard", 0.6, 2e6, 4.0, 0), ("StepByStep", 0.63, 9e6, 4.2, 8), ("SingleTask", 0.64, 8e6, 61.5, 8)]
    for method, accuracy, read, written, samples in settings:
        for fraction in (0.1, 0.5, 1.0):
            for seed in (0, 1):
                own = accuracy - 0.1 * (1 - fraction) + 0.01 * seed
                votes = answers(own + 0.03, 400, seed + 9) if samples else None
                metrics = {"test/tokens": written, "test/worst_group_accuracy": own - 0.2, "test/group_macro_f1": own}
                metrics |= {"test/vote_tokens": written * samples} if samples else {}
                write_run(
                    root / f"{method}{fraction}{seed}", correct=answers(own, 400, seed), votes=votes, further=metrics,
                    method=method, train_fraction=fraction, seed=seed, train_tokens=int(read),
                    model={"vote": {"samples": samples}} if samples else {},
                )  # fmt: skip


CASES = [few, like_the_paper, many, tiny, extremes, costs]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> "Drawn":
    """The comparison of a case and its figures, which no test changes."""

    @cache
    def draw_case(case: Callable[[Path], None]) -> tuple[Comparison, list[Plot]]:
        root = tmp_path_factory.mktemp(case.__name__)
        case(root)
        comparison = compare_runs(*find_runs([root]), resamples=200)
        return comparison, draw(comparison)

    return draw_case


Drawn = Callable[[Callable[[Path], None]], tuple[Comparison, list[Plot]]]


def plots_of(root: Path, **how: Any) -> list[Plot]:
    return draw(compare_runs(*find_runs([root]), **({"resamples": 200} | how)))


def texts_of(figure: Figure) -> list[Text]:
    """All that is written."""
    figure.canvas.draw()
    beyond = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = (text for text in figure.findobj(Text) if isinstance(text, Text) and text not in beyond)
    return [text for text in texts if text.get_visible() and text.get_text()]


def test_numbers_of_rows_stand_beside_fractions(tmp_path: Path) -> None:
    for part in (0.5, 1, 100, 1000):
        for method in ("Standard", "StepByStep"):
            write_run(tmp_path / f"{method}{part}", method=method, train_fraction=part)
    comparison = compare_runs(*find_runs([tmp_path]), resamples=200)
    assert list(comparison.settings.train_fraction[::2]) == [100, 1000, 0.5, 1]
    plots = {plot.name.rpartition("-")[2]: plot for plot in draw(comparison)}
    assert "all training rows" in plots["methods"].title
    places = plots["training_rows"].sheet.axes.get_xticks()
    assert list(places) == [100, 1000, 4383, 8766]
    few = [tmp_path / f"{method}{part}" for method in ("Standard", "StepByStep") for part in (100, 1000)]
    titles = [plot.title for plot in draw(compare_runs(*find_runs(few), resamples=200))]
    assert any(" · 1,000 training rows" in title for title in titles)


@pytest.mark.parametrize("case", CASES)
def test_everything_can_be_read_and_lies_within_its_figure(drawn: Drawn, case: Callable[[Path], None]) -> None:
    _, found = drawn(case)
    assert found
    for plot in found:
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(plot.sheet.figure)]
        assert len(boxes) > 6
        for (one, box), (other, second) in combinations(boxes, 2):
            assert not box.overlaps(second), f"{plot.name}: {one!r} and {other!r}"
        whole = plot.sheet.figure.bbox
        for one, box in boxes:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
            assert inside, f"{plot.name}: {one!r} is cut off"
        for axes in plot.sheet.figure.axes:
            data = axes.get_window_extent()
            for one, box in boxes:
                assert not box.overlaps(data), f"{plot.name}: {one!r} lies in the data"
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            for line in axes.get_lines():
                xs, ys = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
                if line.get_transform().contains_branch(axes.transData) and len(xs) > 2:
                    assert ((xs >= left) & (xs <= right)).all()
                    assert ((ys >= low) & (ys <= high)).all()


def labels_of(plot: Plot) -> list[str]:
    """The legend, from the top."""
    return [text.get_text().replace("\n", " ") for legend in plot.sheet.figure.legends for text in legend.get_texts()]


def test_there_is_a_figure_for_each_question_that_runs_answer(drawn: Drawn) -> None:
    comparison, (by_rows, by_size, variants) = drawn(like_the_paper)
    assert by_rows.name == "cqa-gold-t5-v1_1-base-training_rows"
    assert by_size.name == "cqa-gold-t5-v1_1-student_size"
    assert variants.name == "cqa-gold-t5-v1_1-base-methods"
    assert labels_of(by_size)[0] == "teacher's labels, 77.2 %"
    ticks = [label.get_text() for label in by_rows.sheet.second.get_xticklabels()]
    assert ticks == ["12.5 %\n1,096", "25 %\n2,192", "50 %\n4,383", "100 %\n8,766"]
    ticks = [label.get_text() for label in by_size.sheet.second.get_xticklabels()]
    assert ticks == ["77M\nt5-v1_1-small", "248M\nt5-v1_1-base", "783M\nt5-v1_1-large"]
    assert variants.sheet.figure.axes[0].get_xlabel() == "test accuracy (%)"
    # another metric than accuracy has no level of the teacher's labels
    of_loss = draw(compare_runs(comparison.runs, metric="test/loss"))
    assert labels_of(of_loss[1])[0] != "teacher's labels, 77.2 %"
    assert of_loss[0].sheet.figure.axes[0].get_ylabel() == "test loss"


def test_a_setting_of_fewer_rows_alone_is_in_a_figure_of_them(tmp_path: Path) -> None:
    for fraction in (500, 1000, 2000):
        for method in ("Standard", "StepByStep"):
            write_run(tmp_path / f"{method}{fraction}", method=method, train_fraction=fraction)
    write_run(tmp_path / "control", method="StepByStep", train_fraction=1000, rationales="shuffled")
    plots = {plot.name.removeprefix("cqa-gold-t5-v1_1-base-"): plot for plot in plots_of(tmp_path)}
    # all settings of 500 rows are in the figure of rows
    assert list(plots) == ["training_rows", "methods-1000", "methods-2000"]
    rows = plots["methods-1000"].sheet.axes.get_yticklabels()
    assert {row.get_text() for row in rows} >= {"step-by-step, shuffled rationales", "standard finetuning"}
    assert "1,000 training rows" in plots["methods-1000"].title


def test_costs_have_a_figure_each_and_votes_a_point_each(drawn: Drawn) -> None:
    comparison, plots = drawn(costs)
    names = [plot.name.removeprefix("cqa-gold-t5-v1_1-base-") for plot in plots]
    assert names == ["training_rows", "methods", "training_tokens", "inference_tokens"]
    whole = comparison.settings[comparison.settings.train_fraction == 1]
    for plot, tokens in zip(plots[2:], ("train_tokens", "test/tokens"), strict=True):
        expected = {(further[tokens][0], mean) for further, mean in zip(whole.further, whole["mean"], strict=True)}
        if tokens == "test/tokens":
            expected |= {
                (further["test/vote_tokens"][0], further["test/vote_accuracy"][0])
                for further in whole.further
                if "test/vote_tokens" in further
            }
            assert len(expected) == 5
        lines: list[Any] = list(plot.sheet.figure.axes[0].get_lines())
        points = {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines if line.get_marker() in "os^"
        }
        assert points == expected
    # a line from each setting to its vote
    assert len([line for line in lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1]) == 2


def test_the_points_and_bars_are_the_results(drawn: Drawn) -> None:
    comparison, plots = drawn(like_the_paper)
    results = comparison.settings[comparison.settings.student == "t5-v1_1-base"]
    by_rows, _, variants = (plot.sheet for plot in plots)
    whole = results[results.train_fraction == 1]
    # the others have one number of rows
    results = results[results.name.isin(["standard finetuning", "step-by-step"])]
    assert set(results["mean"].round(9)) <= drawn_at(by_rows.axes, 1)
    assert ends_of(by_rows.axes, 1) == rounded(results["mean"] - results.error, results["mean"] + results.error)
    compared = results[results.difference.notna()]
    assert set(compared.difference.astype(float).round(9)) <= drawn_at(by_rows.second, 1)
    assert ends_of(by_rows.second, 1) == rounded(compared.low, compared.high)
    compared = whole[whole.difference.notna()]
    of_seeds = {round(one, 9) for differences in compared.seed_differences for one in differences}
    assert set(compared.difference.astype(float).round(9)) | of_seeds <= drawn_at(variants.second, 0)
    assert ends_of(variants.second, 0) == rounded(compared.low, compared.high)


def drawn_at(axes: Axes, dimension: int) -> set[float]:
    """The coordinates of all points of lines and marks."""
    points = (np.asarray(line.get_data()[dimension], float) for line in axes.get_lines())
    return {round(float(value), 9) for values in points for value in values}


def ends_of(axes: Axes, dimension: int) -> set[tuple[float, float]]:
    """The ends of all error bars."""
    bars = [bars for bars in axes.collections if isinstance(bars, LineCollection)]
    ends = [
        (segment[:, dimension].min(), segment[:, dimension].max()) for some in bars for segment in some.get_segments()
    ]
    return rounded(*zip(*ends, strict=True))


def rounded(lows: Any, highs: Any) -> set[tuple[float, float]]:
    return {(round(float(low), 6), round(float(high), 6)) for low, high in zip(lows, highs, strict=True)}


def test_a_difference_of_a_metric_without_answers_has_no_bar(drawn: Drawn) -> None:
    comparison, _ = drawn(like_the_paper)
    of_loss = compare_runs(comparison.runs, metric="test/loss")
    differences = draw(of_loss)[0].sheet.second
    assert not [bars for bars in differences.collections if isinstance(bars, LineCollection)]
    compared = of_loss.settings[of_loss.settings.name == "step-by-step"].seed_difference.dropna()
    assert set(compared.astype(float).round(9)) <= drawn_at(differences, 1)
    assert differences.get_ylabel() == "difference"


def test_differences_of_settings_without_a_common_seed_have_a_panel_of_their_own(tmp_path: Path) -> None:
    write_runs(tmp_path, [0, 1], 0.6, method="Standard")
    write_runs(tmp_path, [2, 3], 0.65, method="StepByStep")
    [plot] = plots_of(tmp_path)
    assert ends_of(plot.sheet.second, 0)
    assert plot.sheet.second is not plot.sheet.axes
    assert "differences: from standard finetuning, bars: 95 %" in plot.sheet.figure.get_supxlabel().replace("\n", " ")


def test_settings_that_write_as_many_tokens_have_no_figure_of_them(tmp_path: Path) -> None:
    for method, tokens in (("Standard", 2.0), ("StepByStep", 2.01)):
        write_run(tmp_path / method, method=method, further={"test/tokens": tokens})
    assert [plot.name.rpartition("-")[2] for plot in plots_of(tmp_path)] == ["methods"]


def test_there_is_none_without_two_values(tmp_path: Path) -> None:
    write_runs(tmp_path, [0, 1], 0.6, method="Standard")
    assert plots_of(tmp_path) == []
    # two fractions, but of one method each: no line
    write_runs(tmp_path, [0, 1], 0.6, method="StepByStep", train_fraction=0.5)
    assert plots_of(tmp_path) == []


def test_a_key_that_follows_the_axis_does_not_break_a_line(tmp_path: Path) -> None:
    for fraction, steps in ((0.5, 500), (1.0, 1000)):
        for method in ("Standard", "StepByStep"):
            how: dict[str, Any] = {"method": method, "train_fraction": fraction, "model": {"warmup": steps}}
            write_run(tmp_path / f"{method}{fraction}", **how)
    plot = plots_of(tmp_path)[0]
    assert sorted(labels_of(plot)) == ["standard finetuning", "step-by-step"]


def test_methods_look_apart_without_colour_and_the_same_in_all_figures(drawn: Drawn) -> None:
    _, (lines, dots) = drawn(many)
    looks = {bars.get_label(): bars.lines[0] for bars in lines.sheet.figure.axes[0].containers}  # type: ignore[attr-defined]
    assert len({(line.get_marker(), line.get_linestyle()) for line in looks.values()}) == len(looks) == 9
    found = {(line.get_marker(), line.get_color()) for line in dots.sheet.figure.axes[0].get_lines()}
    assert {(line.get_marker(), line.get_color()) for line in looks.values()} <= found
