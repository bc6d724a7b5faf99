"""The C library's heap, replayed."""

import sys

import pytest

from lit_distill.planning.machine import free_memory, read_memory
from lit_distill.planning.trace import replay

MIB = 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")


def test_blocks_in_turn_need_one_at_least() -> None:
    in_turn = [event for number in range(20) for event in ((number, 8 * MIB), (number, 0))]
    for keeps in (True, False):
        grown = replay(in_turn, keeps=keeps)
        assert grown is not None
        assert 8 * MIB <= grown < 20 * 8 * MIB


def test_blocks_that_live_together_add_up() -> None:
    assert replay([(number, MIB) for number in range(50)], keeps=True) == pytest.approx(50 * MIB, rel=0.05)


def test_holes_that_are_too_small_stay() -> None:
    small = [(number, MIB) for number in range(40)]
    freed = [(number, 0) for number in range(0, 40, 2)]
    larger = [(100 + number, 2 * MIB) for number in range(10)]
    # 40 MiB, of which 20 are free in pieces of one, and 20 more
    assert replay(small + freed + larger, keeps=True) == pytest.approx(60 * MIB, rel=0.05)


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("512mib", 2**29)])
def test_memory_with_a_unit(text: str, size: int) -> None:
    assert read_memory(text) == size


@pytest.mark.parametrize("text", ["24", "24 G", "GiB", "-1GiB", "0GiB", "24 GiB of it", "nanGiB"])
def test_memory_without_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"memory: got .*; allowed is a number above 0 with a unit, as 24GiB"):
        read_memory(text)


def test_what_is_free() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 2**10
    assert 0 < free_memory() < total
