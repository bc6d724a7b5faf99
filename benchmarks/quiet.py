"""The libraries without their chatter."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers
from lightning.pytorch.utilities.seed import isolate_rng


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
    before = lightning.level, transformers.logging.get_verbosity(), torch.get_num_threads()
    lightning.setLevel(logging.ERROR)
    told.addHandler(notes)
    told.setLevel(logging.INFO)
    told.propagate = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        variables = patch.dict(os.environ, TOKENIZERS_PARALLELISM="false")
        with warnings.catch_warnings(), variables, isolate_rng(include_cuda=False):
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


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it if it is of the fast path."""
        message = record.getMessage()
        if message.startswith("fast:") and message not in self.kept:
            self.kept.append(message)
