"""Seconds of a block of work, peak memory of a process, and the spread of a ratio over pairs."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from workers import Turn


def now(device: str) -> float:
    """Seconds by a clock, once the device has done all that it was told."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    started = now(device)
    work()
    return now(device) - started


class Blocks:
    """Lets a trainer that runs from end to end train one block at a time, and takes its time.

    So each block begins where a user's training is after its first steps: with the optimizer's state, warm.

    Args:
        turn: where it is told to begin a block, and says when one is done.
        probe: the memory since before the student was built.
        device: ``cpu`` or ``cuda``.
        sizes: steps of each block, the first of which does not count.
        notes: what is said beside the figures of each.
    """

    def __init__(
        self, turn: Turn, probe: "MemoryProbe", device: str, sizes: Sequence[int], notes: Sequence[str]
    ) -> None:
        self._turn = turn
        self._probe = probe
        self._device = device
        self._left = list(sizes)
        self._notes = notes
        self._done, self._end = 0, 0

    def begin(self) -> None:
        """Wait for the next block's turn."""
        self._turn.wait()
        self._end += self._left.pop(0)
        self._started = now(self._device)

    def on_step(self, done: int) -> None:
        """To be called after each step, with the number of steps so far."""
        self._done += 1
        if done != self._done:
            raise RuntimeError(f"after {self._done} batches {done} optimizer steps were done, not as many")
        if done < self._end:
            return
        seconds = now(self._device) - self._started
        self._turn.answer({"seconds": seconds, "memory": self._probe.read(), "notes": list(self._notes)})
        if self._left:
            self.begin()
        else:
            # what a trainer does at its end has to wait for the other side's last block
            self._turn.wait()

    def check_end(self) -> None:
        """Raise if there were fewer steps than there should have been."""
        if self._left or self._done != self._end:
            raise RuntimeError(f"training ended after {self._done} optimizer steps")


class Spread(TypedDict):
    """A figure over several pairs."""

    median: float
    min: float
    max: float
    pairs: int


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "pairs": len(values)}


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names, another one first in each turn: none always follows the same one's caches and heat."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


# ---------------------------------------------------------------- memory


class Memory(TypedDict):
    """Peak memory of a process, in MiB."""

    before: float
    """What it held before the student was built: the interpreter, libraries, data."""
    peak: float
    """The most that it held afterwards."""
    growth: float
    """The difference: weights, gradients, optimizer state, activations, and what the trainer itself takes."""


_MIB = 2**20


class MemoryProbe:
    """Peak memory from its construction on: the resident set on CPU, the allocator's on CUDA.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.on_cuda = device == "cuda"
        if self.on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / _MIB
            return
        with contextlib.suppress(OSError):
            # lets Linux begin its record of the peak anew
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS") or _most()

    def read(self) -> Memory:
        """The peak so far."""
        if self.on_cuda:
            import torch

            peak = torch.cuda.max_memory_allocated() / _MIB
        else:
            peak = _status("VmHWM") or _most()
        return {"before": self.before, "peak": peak, "growth": peak - self.before}


def _status(field: str) -> float | None:
    """A field of Linux's account of this process, in MiB; ``None`` on other systems."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return None


def _most() -> float:
    """The most that this process ever held, in MiB: bytes on macOS, KiB elsewhere."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / _MIB if sys.platform == "darwin" else most / 1024
