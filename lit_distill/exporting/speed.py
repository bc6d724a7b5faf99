"""Rows a second and latencies of engines, measured in turns."""

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from lit_distill.exporting.engine import BATCH_SIZE
from lit_distill.exporting.parity import Rows
from lit_distill.exporting.predictor import Predictor
from lit_distill.tasks import answer_task

SINGLES, ROUNDS = 100, 3


Seconds = dict[str, dict[int, list[float]]]
"""Predictor -> rows of a batch -> seconds of each batch."""


def measure_speed(predictors: Mapping[str, Predictor], rows: Rows) -> dict[str, dict[str, Any]]:
    """Of each predictor its accuracy, and its speed as in `speeds`."""
    found = {}
    for name, own in predictors.items():
        # also a first use, which is not timed
        texts = own.generate(rows.inputs, answer_task(own.tasks).name, num_beams=1)
        found[name] = {"accuracy": float(np.mean(rows.right(own, texts)))}
    return {name: found[name] | speeds(own) for name, own in time_in_turns(predictors, rows.inputs).items()}


def time_in_turns(predictors: Mapping[str, Predictor], inputs: Sequence[str]) -> Seconds:
    """Time greedy decoding of the answer task, tokenisation included, in batches of 1 and of 32 rows.

    Predictors take turns at each batch, so that a busy machine slows all of them.
    """
    size = min(BATCH_SIZE, len(inputs))
    batches = [inputs[start : start + size] for start in range(0, len(inputs) - size + 1, size)] * ROUNDS
    singles = [[text] for text in inputs[:SINGLES]]
    seconds: Seconds = {name: {} for name in predictors}
    for batch in chain(singles, batches):
        for name, own in predictors.items():
            started = time.perf_counter()
            own.generate(batch, answer_task(own.tasks).name, num_beams=1)
            seconds[name].setdefault(len(batch), []).append(time.perf_counter() - started)
    return seconds


def speeds(seconds: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """``rows_a_second``, of the larger batches by the median time of one, and latencies of each size in ms."""
    size = max(seconds)
    found = {"rows_a_second": size / float(np.median(seconds[size]))}
    for length, times in seconds.items():
        for share in (50, 99):
            found[f"batch_{length}_p{share}_ms"] = 1000 * float(np.percentile(times, share))
    return found
