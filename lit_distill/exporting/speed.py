"""Rows a second and latencies of engines, measured in turns."""

import time
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from lit_distill.exporting.engine import BATCH_SIZE
from lit_distill.exporting.parity import Rows
from lit_distill.exporting.predictor import Predictor
from lit_distill.tasks import answer_task

SINGLES, ROUNDS = 100, 3


def measure_speed(predictors: Mapping[str, Predictor], rows: Rows) -> dict[str, dict[str, Any]]:
    """Of each predictor its accuracy and speed in greedy decoding of the answer task.

    ``rows_a_second`` is a batch's size over the median time of a batch, tokenisation included; latencies are of a batch
    of 1 and of 32 rows, in milliseconds. Predictors take turns at each batch, so that a busy machine slows all of them.
    """
    size = min(BATCH_SIZE, len(rows.inputs))
    batches = [rows.inputs[start : start + size] for start in range(0, len(rows.inputs) - size + 1, size)] * ROUNDS
    singles = [[text] for text in rows.inputs[:SINGLES]]
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in predictors}
    found: dict[str, dict[str, Any]] = {}
    for name, own in predictors.items():
        # also a first use, which is not timed
        texts = own.generate(rows.inputs, answer_task(own.tasks).name, num_beams=1)
        found[name] = {"accuracy": float(np.mean(rows.right(own, texts)))}
    for batch in chain(singles, batches):
        for name, own in predictors.items():
            started = time.perf_counter()
            own.generate(batch, answer_task(own.tasks).name, num_beams=1)
            seconds[name].setdefault(len(batch), []).append(time.perf_counter() - started)
    for name, of_sizes in seconds.items():
        found[name]["rows_a_second"] = size / float(np.median(of_sizes[size]))
        for length, times in of_sizes.items():
            for share in (50, 99):
                found[name][f"batch_{length}_p{share}_ms"] = 1000 * float(np.percentile(times, share))
    return found
