"""The C library's memory."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_memory"]

# mallopt's parameters and values, which are C integers
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
VALUES = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}  # no mapping of its own for any tensor


def keep_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU free, for the tensors to come.

    glibc gives much of it back to the system, and the next training step pays a page fault for every 4 KiB that it
    writes anew: up to a seventh of the time of an int8 step of GPT blocks, less of a float32 step (the page on speed).
    Afterwards the process stays as large as it once was. The command `lowbit` does this by itself; results do not
    depend on it.

    Returns:
        Whether the C library took it: True with glibc, False on other systems, where nothing changes.
    """
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):
        return False
    return all(mallopt(name, value) for name, value in VALUES.items())
