"""The memory that the C library has had from the system."""

import ctypes
import os
import platform

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 1 << 30  # bytes of a block that is kept


def keep_freed_memory() -> None:
    """Keep what is freed for what is allocated next, as each step of a training does it alike:
    memory that is new from the system has to be cleared by it, page by page. The peak stays as it
    is. Without glibc, or where a variable MALLOC_* says how, nothing changes."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
