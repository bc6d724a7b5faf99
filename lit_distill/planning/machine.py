"""The memory that a run may take: as stated, of a GPU, or free on this machine; and what is in it beside tensors."""

import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lit_distill.errors import UserError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

CPU_FRAMEWORK = 150 * 2**20
"""What Lightning and PyTorch themselves take for a run on the CPU, measured by `benchmarks/plan_memory.py`."""

GPU_FRAMEWORK = 700 * 2**20
"""CUDA's context with PyTorch's kernels, and cuBLAS's workspaces: an assumption."""

GPU_HOLES = 0.05
"""Rounding and holes of CUDA's caching allocator, as a share of what comes and goes in a step: an assumption."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    kind: Literal["cpu", "gpu"]
    memory: int  # bytes

    def overhead(self, coming: int, live: int, heap: int | None) -> dict[str, int]:
        """Bytes by part beside the tensors of a step, ``coming`` of which come and go, and ``heap`` holds."""
        if self.kind == "gpu":
            return {"allocator": int(GPU_HOLES * coming), "framework": GPU_FRAMEWORK}
        return {"allocator": max(0, (heap or live) - live), "framework": CPU_FRAMEWORK}


def read_memory(text: str) -> int:
    """Bytes of a text such as ``24GiB``. Raises a ``UserError`` that names the units."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    size = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0
    if size < 1:
        raise UserError(f"memory: got {text!r}; allowed is a number above 0 with a unit, as 24GiB (MB, MiB, GB, ...)")
    return int(size)


def find_machine(accelerator: object, memory: str | None) -> Machine:
    """The device that the config's accelerator names, with the stated memory or its own."""
    stated = None if memory is None else read_memory(memory)
    has_gpu = torch.cuda.is_available()
    if accelerator == "cpu" or (accelerator == "auto" and not has_gpu and stated is None):
        return Machine("cpu", free_memory() if stated is None else stated)
    if stated is None and not has_gpu:
        raise UserError("memory: there is no GPU here to read it of; give it, as in --memory 24GiB")
    return Machine("gpu", torch.cuda.mem_get_info()[1] if stated is None else stated)


def free_memory() -> int:
    """Bytes that this process may still take, by the system, its control group and its own limit."""
    free = [_field("/proc/meminfo", "MemAvailable:") or torch.iinfo(torch.int64).max]
    if (most := _number("/sys/fs/cgroup/memory.max")) is not None:
        free.append(most - (_number("/sys/fs/cgroup/memory.current") or 0))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - (_field("/proc/self/status", "VmSize:") or 0))
    return max(0, min(free))


def _field(path: str, name: str) -> int | None:
    """A line of a file of Linux's, given there in KiB."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith(name)), None)


def _number(path: str) -> int | None:
    text = Path(path).read_text().strip() if Path(path).is_file() else ""
    return int(text) if text.isdigit() else None
