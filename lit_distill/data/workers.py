"""Work on many rows, shared by processes."""

import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from lit_distill.errors import UserError

_MAX_WORKERS = 8
_PARALLEL = 8  # chunks that are worth processes of their own

T = TypeVar("T")
U = TypeVar("U")


def in_order(work: Callable[[T], U], tasks: Iterable[T]) -> Iterator[U]:
    """What ``work`` gives for each task, in order; if there are many, forked processes share them.

    At most two tasks a process are under way, so that memory is bounded. Raises what ``work`` raises.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, _PARALLEL))
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, _MAX_WORKERS)
    if len(first) < _PARALLEL or workers < 2 or multiprocessing.current_process().daemon:
        yield from map(work, chain(first, tasks))
        return
    # each process uses one core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # forked, as neither a data module nor its tokenizer need be pickled then
    context = multiprocessing.get_context("fork")
    pending: deque[Future[U]] = deque()
    with ProcessPoolExecutor(workers, context, _begin, (work,)) as pool:
        try:
            for task in chain(first, tasks):
                pending.append(pool.submit(_run, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a process that prepared rows was killed: is there enough memory?") from error
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # looking for garbage among what was imported would copy it, and takes a third of the time
    gc.freeze()


def _run(task: Any) -> Any:
    return _work(task)
