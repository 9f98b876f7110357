"""The C library's allocator, set for tensors on the CPU."""

import ctypes
import sys

# glibc's parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 1 << 30  # bytes: larger tensors are returned to the system, and so is more free memory than that at the top


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for its next ones. Does nothing without glibc.

    glibc returns large freed blocks to the system, and the next tensors take their pages from it again, one by one and
    filled with zeros. That takes 15 % of a training step. The process then holds the memory of its largest step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(ctypes.c_int(parameter), ctypes.c_int(_KEPT))
