"""Two processes that are the ranks of one run: all that a test file runs in one launch, as starting takes seconds."""

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch.multiprocessing.spawn import start_processes

WORLD = 2

Found = dict[str, Any]


def on_ranks(runs: Callable[..., Found], folders: pytest.TempPathFactory, *arguments: Any) -> list[Found]:
    """What ``runs(rank, out, *arguments)`` returns on each rank; of several workers of pytest one alone runs it."""
    root = folders.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # of all workers
        root = root.parent
    out = root / runs.__module__
    with FileLock(f"{out}.lock"):
        if not out.is_dir():
            out.mkdir()
            _run(runs, out, *arguments)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _run(runs: Callable[..., Found], out: Path, *arguments: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # importing takes longest: once, in a process that forks for each rank of each launch
    multiprocessing.set_forkserver_preload(["lit_distill.commands.dispatch"])
    context = start_processes(_rank, (port, runs, out, *arguments), nprocs=WORLD, join=False, start_method="forkserver")
    assert context is not None
    for process in context.processes:
        process.join(180)
    hung = [process for process in context.processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a rank waits for another for ever"
    # raises what a rank raised; their ends are told one by one
    while not context.join(1):
        pass


def _rank(rank: int, port: int, runs: Callable[..., Found], out: Path, *arguments: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD), NODE_RANK="0", LOCAL_RANK=str(rank)
    )
    # of another test's run; Lightning would seed each rank with it
    os.environ.pop("PL_GLOBAL_SEED", None)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.save(runs(rank, out, *arguments), out / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
