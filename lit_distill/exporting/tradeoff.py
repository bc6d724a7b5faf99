"""Accuracy against speed of a student that ends after fewer layers or reads fewer tokens."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_distill.comparison.statistics import paired_bootstrap
from lit_distill.evaluation.metrics import wilson_interval
from lit_distill.exporting.engine import BATCH_SIZE, Engine, TransformersEngine
from lit_distill.exporting.parity import Rows
from lit_distill.exporting.predictor import Predictor
from lit_distill.exporting.speed import speeds, time_in_turns
from lit_distill.sheet import Sheet, looks, own_style, show_metric
from lit_distill.students import Student
from lit_distill.tasks import answer_task


@dataclass(frozen=True)
class Point:
    """How a student is shortened."""

    exit: int  # layer of the decoder after which it ends
    keep: float  # share of the source tokens that stay

    def __str__(self) -> str:
        return f"exit {self.exit}, keep {self.keep:g}"


class _Counter(TorchDispatchMode):
    """Counts the operations of matrix products and attention; torch's own counter hooks every module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_linear_pointwise":
            self.flops += 2 * args[0].numel() * len(args[1])
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            # scores of all queries and keys of each head, and as many products with values
            self.flops += 2 * args[0][..., 0].numel() * args[1].shape[2] * (args[1].shape[3] + args[2].shape[3])
        elif (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def count_flops(predictor: Predictor, inputs: Sequence[str]) -> int:
    """The operations of matrix products and attention in greedy decoding of the answer task."""
    counter = _Counter()
    with counter:
        predictor.generate(inputs, answer_task(predictor.tasks).name, num_beams=1)
    return counter.flops


def measure_tradeoff(
    student: Student,
    points: Sequence[Point],
    after: int,
    predictor: Callable[[Engine], Predictor],
    rows: Rows,
) -> list[dict[str, Any]]:
    """Each point's accuracy and speed in greedy decoding, in plain values; the first point is the whole student.

    ``accuracy`` has Wilson's 95 % interval, ``difference`` to the whole student a paired bootstrap's. ``flops`` are
    relative to the whole student's, and ``speedup`` is the median over batches of its time by the point's own; both of
    a batch's texts as they are, which end sooner or later than the whole student's. Points take turns at each batch.

    Args:
        student: in evaluation mode.
        points: what to measure.
        after: layer of the encoder after which tokens are dropped.
        predictor: makes the student's predictor of an engine.
        rows: test rows.
    """
    sample = rows.inputs[:BATCH_SIZE]
    with ExitStack() as shortened:
        predictors: dict[str, Predictor] = {}
        for point in points:
            # one each, so that nothing that is known of its layers changes from batch to batch
            own = _with_same_weights(student)
            if point.exit < student.layers("decoder"):
                shortened.enter_context(own.exit_at(point.exit))
            shortened.enter_context(own.drop_tokens(after, point.keep))
            predictors[str(point)] = predictor(TransformersEngine(own))
        right, flops = {}, {}
        for name, one in predictors.items():
            texts = one.generate(rows.inputs, answer_task(one.tasks).name, num_beams=1)
            right[name] = np.array([rows.right(one, texts)], dtype=np.float64)
            flops[name] = count_flops(one, sample)
        seconds = time_in_turns(predictors, rows.inputs)
    whole = str(points[0])
    return [
        {"exit": point.exit, "keep": point.keep}
        | _accuracy(right[str(point)], right[whole])
        | {"flops": flops[str(point)] / flops[whole], "speedup": _speedup(seconds[str(point)], seconds[whole])}
        | speeds(seconds[str(point)])
        for point in points
    ]


def _with_same_weights(student: Student) -> Student:
    """A copy of the modules alone."""
    kept = [*student.parameters(), *student.buffers(), student.tokens]
    return copy.deepcopy(student, {id(one): one for one in kept})


def _accuracy(right: Any, whole: Any) -> dict[str, float]:
    low, high = wilson_interval(int(right.sum()), right.size)
    paired = paired_bootstrap(right, whole)
    return {
        "accuracy": float(right.mean()), "low": low, "high": high,
        "difference": paired.difference, "difference_low": paired.low, "difference_high": paired.high,
    }  # fmt: skip


def _speedup(seconds: Mapping[int, Sequence[float]], whole: Mapping[int, Sequence[float]]) -> float:
    size = max(seconds)
    return float(np.median(np.array(whole[size]) / np.array(seconds[size])))


def draw_tradeoff(found: Sequence[Mapping[str, Any]], title: str, after: int, path: Path) -> None:
    """Accuracy against rows a second as PNG and SVG, a line for each share of the tokens, a point for each exit."""
    with own_style():
        sheet = Sheet(4.5)
        for keep, look in zip(dict.fromkeys(one["keep"] for one in found), looks(), strict=False):
            own = sorted((one for one in found if one["keep"] == keep), key=lambda one: int(one["exit"]))
            xs, ys = [one["rows_a_second"] for one in own], [one["accuracy"] for one in own]
            errors = [[max(0.0, y - one["low"]), max(0.0, one["high"] - y)] for y, one in zip(ys, own, strict=True)]
            name = "all source tokens" if keep == 1 else f"{100 * keep:g} % of them\nafter layer {after}"
            sheet.heights[sheet.axes.errorbar(xs, ys, np.array(errors).T, label=name, **look)] = max(ys)
            for x, y, one in zip(xs, ys, own, strict=True):
                at = {"xytext": (5, 5), "textcoords": "offset points", "size": 8.5, "color": look["color"]}
                sheet.axes.annotate(str(one["exit"]), (x, y), **at)
        sheet.axes.set_xlabel("rows a second")
        show_metric(sheet.axes.yaxis, "test accuracy", share=True)
        notes = ["numbers: the layer of the decoder that it ends after", "bars: 95 % interval over the test rows"]
        sheet.finish(title, notes)
    sheet.save(path)
