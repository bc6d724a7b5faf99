"""The libraries without their chatter."""

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers


@contextmanager
def quiet(threads: int | None) -> Iterator[list[str]]:
    """Run without the libraries' chatter and with so many threads; everything is as before afterwards.

    Yields:
        What lit_distill has to say of its fast path: where another is taken, something else is measured than was meant.
    """
    notes = _Notes()
    lightning, told = (
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    )
    told_before = told.level, told.propagate
    before = (
        lightning.level,
        transformers.logging.get_verbosity(),
        torch.get_num_threads(),
        torch.random.get_rng_state(),
    )
    python_random = random.getstate()
    variable = os.environ.get("TOKENIZERS_PARALLELISM")
    lightning.setLevel(logging.ERROR)
    told.addHandler(notes)
    told.setLevel(logging.INFO)
    told.propagate = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            # torch says so of Lightning's own code
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging")
            # neither side gets workers: a batch takes a millisecond to make
            warnings.filterwarnings("ignore", message=r".*does not have many workers")
            yield notes.kept
    finally:
        told.removeHandler(notes)
        told.setLevel(told_before[0])
        told.propagate = told_before[1]
        lightning.setLevel(before[0])
        transformers.logging.set_verbosity(before[1])
        torch.set_num_threads(before[2])
        torch.random.set_rng_state(before[3])
        random.setstate(python_random)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if variable is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = variable


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it if it is of the fast path."""
        message = record.getMessage()
        if message.startswith("fast:") and message not in self.kept:
            self.kept.append(message)
