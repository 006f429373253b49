"""A training step on a GPU, recorded once and played again for later batches.

The host launches one graph where it would launch a hundred kernels, which take longer to launch than to run where an
SAE is small. What is played is what was recorded, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

Step = Callable[[Tensor], dict[str, Tensor]]
# Steps that are made as they come before one is recorded: kernels are compiled and libraries opened by then.
WARM_UP_STEPS = 3
# Room for entries is this times the most that were found of late, which is forgotten by a hundredth a step. It is made
# anew where less than SPARE of it, or more than WASTE times that, was left.
MARGIN, FORGETTING, SPARE, WASTE = 1.25, 0.99, 1.1, 3.0
ROOM_STEP = 1024


class Recorder:
    """Makes steps as they come at first and where they cannot be played, and plays a recording of one otherwise."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, since tensors that the step keeps its state in are others now."""
        self.recording: Recording | None = None
        self.n_warm = 0
        self.kind: Hashable = None

    def make(self, step: Step, x: Tensor, may_play: bool, kind: Hashable = None) -> dict[str, Tensor]:
        """Make the step, of one kind the same each time, on x; what is recorded is the last kind that may be played."""
        if may_play and kind != self.kind:
            self.forget()
            self.kind = kind
        if not may_play or self.n_warm < WARM_UP_STEPS:
            self.n_warm += 1
            return step(x)
        if self.recording is None or not self.recording.fits(x):
            self.recording = Recording(step, x)
        return self.recording.play(x)


class Room:
    """For how many entries a step is given room, where the host cannot wait for their number: by those of late."""

    def __init__(self) -> None:
        self.most = 0.0
        self.size: int | None = None

    def take_in(self, n: int) -> None:
        """Take in how many entries a step found."""
        self.most = max(float(n), FORGETTING * self.most)
        if self.size is None or not SPARE * self.most <= self.size <= WASTE * self.most + ROOM_STEP:
            self.size = ROOM_STEP * math.ceil(max(1.0, MARGIN * self.most) / ROOM_STEP)


class Late:
    """A number on the device that the host reads later: it then waits for what was launched before, not after."""

    def __init__(self, number: Tensor):
        self.event = torch.cuda.Event() if number.is_cuda else None
        self.number = torch.zeros((), dtype=number.dtype, pin_memory=number.is_cuda)
        self.number.copy_(number, non_blocking=True)
        if self.event:
            self.event.record()

    def read(self) -> int:
        """Return the number."""
        if self.event:
            self.event.synchronize()
        return int(self.number)


class Recording:
    """`step` for batches of the shape of x; it must not wait for the device, and must keep its state in place.

    Recording makes no step. The batch is copied in; the numbers that `step` returned come out as float32.
    """

    def __init__(self, step: Step, x: Tensor):
        self.x = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is theirs.
        with torch.cuda.graph(self.graph, pool=_memory_owner(x.device).pool(), capture_error_mode="thread_local"):
            numbers = step(self.x)
            self.names, self.numbers = list(numbers), torch.stack([value.float() for value in numbers.values()])

    def fits(self, x: Tensor) -> bool:
        """Whether x has the shape that was recorded."""
        return x.shape == self.x.shape and x.dtype == self.x.dtype

    def play(self, x: Tensor) -> dict[str, Tensor]:
        """Make the step on x."""
        self.x.copy_(x)
        self.graph.replay()
        return dict(zip(self.names, self.numbers.clone().unbind(), strict=True))


@cache
def _memory_owner(device: torch.device) -> torch.cuda.CUDAGraph:
    """Whose memory all recordings on a device share: one is played after another, none needs what another left.

    It is kept, since memory that no recording holds any more cannot be shared again.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
    return graph
