"""The process's memory allocator, told to keep what it will need again."""

import ctypes
from functools import lru_cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT = 256 * 2**20  # bytes
_MAPPED = 32 * 2**20  # bytes; what is larger goes back to the system at once


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Keep up to 256 MiB of freed memory in this process; tell whether the C library could be asked to.

    Every step of training frees its activations and asks for as much again. By itself glibc hands them back to the
    system in between, which then clears every page anew: a sixth of a small model's training time. Elsewhere than
    under glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAPPED)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
