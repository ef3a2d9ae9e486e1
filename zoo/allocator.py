"""Keeps the C library from handing large buffers back to the kernel after each use."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process reuse what it freed, at the cost of never shrinking; False where the C library is not glibc.

    By default glibc maps large buffers anew and unmaps them when they are freed, so that the kernel pages in and zeroes
    each activation of a large batch every time it is made: up to half of a training step on a CPU
    (docs/performance.md). It changes the whole process, so programs call it, the library never does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1)])
