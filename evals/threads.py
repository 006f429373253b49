"""How a CPU works on many small steps: on one thread, and without denormal numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep the small steps inside on one CPU thread, then put the number of threads back.

    Two threads gain a quarter on an idle machine of two cores; where anything else runs, the thousands of waits for
    the slower thread make these steps fifty times slower (measured).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Take numbers below 1e-38 as 0 on this thread, where the processor can, then go back to what was.

    Each operation on such a number takes a hundred times as long. Where classes are told apart with great confidence
    most gradients of a probe become so small: its fit on 37,663 words of SmolLM2 took ten times as long.
    """
    before = bool(torch.full((), torch.finfo(torch.float32).tiny).mul(0.5) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
