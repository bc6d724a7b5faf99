"""Freed memory stays in the process: seen from outside, by the pages that the system has to give."""

import subprocess
import sys

import pytest

from lit_distill.students.fast import memory

PROGRAM = """
import resource, sys, torch
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    from lit_distill.students.fast.memory import keep_freed_memory
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# the heap grows until a freed block always fits the next one
for _ in range(30):
    faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_memory_that_was_freed_is_not_cleared_again() -> None:
    found = {
        kind: int(subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, check=True).stdout)  # noqa: S603
        for kind in ("kept", "given back")
    }
    # 64 MiB are 16,384 pages of 4 KiB
    assert found["given back"] > 10_000
    assert found["kept"] < 100


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
