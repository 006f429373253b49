"""How the C library treats freed memory: nothing comes in, nothing goes out, and steps on a CPU get faster."""

from __future__ import annotations

import ctypes

# malloc.h of glibc; 32 MB is the largest threshold that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BLOCK = 32 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB for the next step; elsewhere do nothing.

    It would hand them back to the system, and each page be cleared again at its next use: a third of the loss on dead
    latents, 3 % of a whole step (12 topk SAEs, widths 1k to 4k).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
