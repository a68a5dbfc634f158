"""Keeping a worker's memory flat, and used over again: how glibc's allocator is to treat what streams take and free."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

MMAP_THRESHOLD_BYTES = 1024 * 1024
TRIM_THRESHOLD_BYTES = 4 * 1024 * 1024
ARENAS_MAX = 1

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def tune_allocator() -> None:
    """Map the buffers of whole parts on their own; keep and share the memory of all that is smaller.

    glibc begins with a threshold of 128 KiB for what it maps on its own, but raises it with every large buffer that is
    freed, up to 32 MiB; the buffers of parts then come from the heap, which they fragment (measured: 20 MB more for
    one stream). Left at 128 KiB, every batch and every window of the parser is mapped, cleared by the kernel and
    unmapped again, and so it is with a heap that is trimmed at once, and with a heap for each thread: 600,000 page
    faults a gigabyte, where there are 20,000 so. Other C libraries have no such settings and are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)
