"""Memory of the host: what one step frees, the next one takes again."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_AS_MUCH_AS_IT_TAKES = 2**30


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory in the process.

    By default it hands large blocks back to the system, which clears each page again when the next step asks for it:
    time on one core, a tenth of a step and more where the system is a virtual machine. The process holds what its steps
    needed once, and gaps between blocks; it does not shrink before it ends.

    Returns:
        Whether the C library is one that takes the request.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, _AS_MUCH_AS_IT_TAKES) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
