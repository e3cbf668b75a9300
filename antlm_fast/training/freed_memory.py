"""What glibc does with memory that is freed: a training step frees and asks for the same sizes again and again.

By default glibc maps every large tensor anew and gives it back when it is freed, so that in each step the system clears
and maps tens of thousands of pages again. While `freed_memory_is_kept` is open, the process keeps what it once had.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

# mallopt(3): parameter -> (value that keeps memory, glibc's default)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {
    _MMAP_MAX: (0, 65536),  # large pieces come from the heap too, and can be used again
    _TRIM_THRESHOLD: (-1, 128 * 1024),  # the end of the heap is never given back
    _TOP_PAD: (64 * 2**20, 128 * 1024),  # and grows by so much at a time
}


@contextlib.contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """While this is open, memory that is freed stays with the process; then it is given back.

    Nothing is done where the allocator is not glibc's, or where the environment already says how it shall work
    (MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_, or GLIBC_TUNABLES with a glibc.malloc in it).
    """
    libc = _tunable_libc()
    if libc is None:
        yield
        return
    for parameter, (keeping, _) in _SETTINGS.items():
        libc.mallopt(parameter, keeping)
    try:
        yield
    finally:
        for parameter, (_, default) in _SETTINGS.items():
            libc.mallopt(parameter, default)
        libc.malloc_trim(0)


def _tunable_libc() -> ctypes.CDLL | None:
    """glibc, if how it allocates is for us to say."""
    told = any(name in os.environ for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"))
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc
