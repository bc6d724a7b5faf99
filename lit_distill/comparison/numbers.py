"""Numbers as a report writes them."""

from collections.abc import Sequence

from lit_distill.comparison.comparing import ACCURACY, Row
from lit_distill.comparison.plots import is_share
from lit_distill.comparison.statistics import FEW, ExampleDifference, SeedDifference

DOUBLE_DAGGER = "\u2021"
"""Marks a difference that leaves seeds out."""

MINUS = "\u2212"
"""As wide as a plus."""

DAGGER = "\u2020"
"""Marks an interval that rests on few rows."""


def value(number: float | None, metric: str) -> str:
    """A metric: in %, or as it is."""
    if number is None:
        return ""
    return f"{100 * number:.2f}" if is_share(metric) else f"{number:.4f}"


def change(number: float, metric: str) -> str:
    """A difference of two, with its sign: in points, or as it is."""
    shown = f"{100 * number:+.2f}" if is_share(metric) else f"{number:+.4f}"
    zero = not shown.strip("+-0.")
    return shown.lstrip("+-") if zero else shown.replace("-", MINUS)


def mean_and_error(row: Row, metric: str) -> str:
    """62.31 ± 0.45; no standard error for a single seed."""
    error = row.summary.standard_error
    return value(row.summary.mean, metric) + ("" if error is None else f" ± {value(error, metric)}")


def seed_difference(found: SeedDifference | None, metric: str) -> str:
    """+1.20 ± 0.30 (4)."""
    if found is None:
        return ""
    error = found.standard_error
    spread = "" if error is None else f" ± {value(error, metric)}"
    return f"{change(found.mean, metric)}{spread} ({found.n})"


def difference(row: Row, metric: str) -> str:
    """+1.20, marked where seeds were left out; nothing where there is no difference."""
    if row.examples is None:
        return ""
    return change(row.examples.difference, metric) + left_out(row)


def by_seed(row: Row, metric: str) -> str:
    """`seed_difference`, marked where seeds were left out."""
    return "" if row.seeds is None else seed_difference(row.seeds, metric) + left_out(row)


def left_out(row: Row) -> str:
    """The mark of a row whose differences leave seeds out."""
    return f" {DOUBLE_DAGGER}" if any(row.left_out) else ""


def interval(found: ExampleDifference, metric: str) -> str:
    """[+0.40, +2.10]."""
    return f"[{change(found.low, metric)}, {change(found.high, metric)}]"


def p_value(found: ExampleDifference) -> str:
    """A p-value, marked where few rows differ."""
    shown = "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    return f"{shown} {DAGGER}" if found.differing < FEW else shown


def pooled(rows: Sequence[Row], metric: str) -> list[str]:
    """The pooled accuracies, where one is not the mean: of seeds on as many rows the two are the same."""
    if metric != ACCURACY:
        return [""] * len(rows)
    shown = [value(row.summary.pooled, metric) for row in rows]
    same = all(not text or text == value(row.summary.mean, metric) for text, row in zip(shown, rows, strict=True))
    return [""] * len(rows) if same else shown
