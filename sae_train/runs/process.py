"""What is set once for a process before its first large allocation: CPU steps are then fast, and always the same."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# malloc.h of glibc; 32 MB is the largest threshold that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_BLOCK = 32 * 2**20
MOST_ARENAS = 2  # heaps that threads take blocks from: each keeps what was freed in it, 4 GB more without this limit


@functools.cache
def prepare_process() -> None:
    """Ask for huge pages and a fixed number of threads, and let freed memory be kept; every start comes through here.

    torch reads the first variable at its first large allocation on a CPU: without huge pages a training step took 12 %
    more time, for page faults. MKL reads the second at its first product: without it MKL may take fewer threads than it
    has, and Intel promises the same bits from run to run for a fixed number alone ("Reproducibility Conditions" in the
    developer guide of oneMKL). Values that are set already stay.
    """
    for name, value in {"THP_MEM_ALLOC_ENABLE": "1", "MKL_DYNAMIC": "FALSE"}.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


@contextmanager
def without_collection() -> Iterator[None]:
    """Let Python look for no unreachable cycles meanwhile.

    While a run opens, thousands of modules are imported, and all that they hold was searched again and again: 1 s of
    the 9 s until a short run's first row.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back_memory() -> None:
    """Let glibc hand back to the system what is freed and was kept; elsewhere do nothing.

    A run comes here at every save, some ten times. Kept blocks are split, and where no free piece is large enough for
    the next one the heap grows: by some 90 MiB an hour of steps whose blocks vary in size (topk, 4k latents, batches of
    2048), and by what looks have used. Handing back takes 7 ms, and the next step some 40 ms more.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB for the next step; elsewhere do nothing.

    It would hand them back to the system, and each page be cleared again at its next use: a third of the loss on dead
    latents, 3 % of a whole step (12 topk SAEs, widths 1k to 4k).
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, MOST_ARENAS)
