"""How far the C library's heap grows for a sequence of allocations, of which no byte is written.

A script of its own, since this process's heap already has holes: pairs of a number and a size on standard input, a size
of 0 where the allocation of that number ends; the bytes on standard output.
"""

import ctypes
import json
import sys

_ALIGNMENT = 64
"""Of PyTorch's tensors on the CPU."""

_LOOK = 2**18
"""Allocations from this size on can make the heap grow much."""


class _Info(ctypes.Structure):
    """As glibc's ``mallinfo2``: in it the bytes of the heap, and of blocks that are mapped by themselves."""

    _fields_ = [
        ("arena", ctypes.c_size_t),
        ("counts", ctypes.c_size_t * 3),
        ("hblkhd", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 5),
    ]


def grow(events: list[tuple[int, int]], *, keeps: bool) -> int:
    """The largest size of heap and mapped blocks, in bytes; ``keeps``: as after `keep_freed_memory`."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Info
    if keeps:
        for option in (-1, -3):
            libc.mallopt(option, 2**30)
    at: dict[int, ctypes.c_void_p] = {}
    most = 0
    start = libc.mallinfo2()
    for number, size in events:
        if not size:
            libc.free(at.pop(number))
            continue
        at[number] = ctypes.c_void_p()
        if libc.posix_memalign(ctypes.byref(at[number]), ctypes.c_size_t(_ALIGNMENT), ctypes.c_size_t(size)):
            raise MemoryError
        if size >= _LOOK:
            now = libc.mallinfo2()
            most = max(most, now.arena + now.hblkhd - start.arena - start.hblkhd)
    return most


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(grow(given["events"], keeps=given["keeps"]))
