"""Keeping a worker's memory flat: what a stream frees goes back to the system."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

MMAP_THRESHOLD_BYTES = 128 * 1024

_M_MMAP_THRESHOLD = -3  # <malloc.h> of glibc


def return_large_buffers() -> None:
    """Make glibc map each large buffer on its own, and unmap it when it is freed.

    glibc begins with this threshold, but raises it with every large buffer that is freed, up to 32 MiB; the parts of
    an upload then come from the heap, which they fragment (measured: 20 MB more for one stream). Other C libraries
    have no such setting and are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
