"""Several processes at one run: which SAEs each trains, and what they exchange by torch.distributed.

A process alone has no process group: every exchange is then the identity. Each exchange is a collective: all processes
must come to it, in the same order.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed as dist

from sae_train.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # that processes wait for one that looks; where one has died, the launcher ends the others


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`, of which `on_machine` run on this machine."""

    rank: int = 0
    size: int = 1
    on_machine: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first process, the only one to run it; its UserError is raised on all."""
        if self.size == 1:
            return make()
        outcome = [_outcome(make) if self.is_first else None]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order; small ones only, since they are pickled."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.gather(None)

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any process; waits for the processes, not for their devices."""
        if self.size == 1:
            return list(flags)
        seen = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return [bool(flag) for flag in seen.tolist()]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes, the same bits on each; the memory of `x` may be used for it."""
        if self.size == 1:
            return x
        total = x.detach().contiguous()
        dist.all_reduce(total)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all processes, as `sum` does."""
        return x if self.size == 1 else self.sum(x).div_(self.size)

    def share(self, n: int, rank: int | None = None) -> slice:
        """Return which of n things in a row belong to this process (or to `rank`): contiguous, as equal as can be."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def fill(self, parts: Sequence[Tensor], compute: Callable[[int], Tensor]) -> None:
        """Fill parts[i] with compute(i): each process computes its share of the parts and sends it to the others."""
        numbers = range(len(parts))
        for i in numbers[self.share(len(parts))]:
            parts[i].copy_(compute(i))
        for rank in range(self.size):
            for i in numbers[self.share(len(parts), rank)]:
                dist.broadcast(parts[i], src=rank)


def current() -> Ranks:
    """Return the processes of the group that `choose_device` opened, or this one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@dataclass(frozen=True)
class Division:
    """Which process looks at each SAE and saves it, and whether all processes train every SAE together.

    Together each one steps on its share of every batch; otherwise the owner alone trains its SAEs on whole batches.
    """

    owners: tuple[int, ...]
    together: bool


def divide(costs: Sequence[float], ranks: Ranks, batch_tokens: int) -> Division:
    """Spread SAEs of these costs over the processes; where there are fewer SAEs than processes, all train together.

    The costly come first, each to the process with the least so far. Batches that cannot be shared are a UserError.
    """
    together = len(costs) < ranks.size
    if together and batch_tokens % ranks.size:
        raise UserError(
            f"batch_tokens {batch_tokens} cannot be shared by {ranks.size} processes: take a multiple of {ranks.size}, "
            "another number of processes, or at least as many SAEs as processes"
        )
    load, owners = [0.0] * ranks.size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks.size), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return Division(tuple(owners), together)


def _outcome(make: Callable[[], T]) -> T | UserError:
    try:
        return make()
    except UserError as error:
        return error


def choose_device(asked: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda' or 'cuda:1' into a device through Accelerate; UserError if it is not there.

    A process that a launcher such as torchrun started among several gets one of its own, and the group is opened.
    """
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _join_processes(asked)
    if asked == "auto":
        return PartialState().device
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {asked!r} is not available on this machine: use auto, cpu or cuda") from None
    return device


def _join_processes(asked: str) -> torch.device:
    """Open the group of processes: gloo on CPUs, with one GPU each NCCL for what lies there and gloo for the rest."""
    from accelerate import PartialState

    n_gpus, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if asked == "cpu" or (asked == "auto" and not n_gpus):
        return _close_at_exit(PartialState(cpu=True, timeout=PATIENCE)).device
    if asked not in ("auto", "cuda"):
        raise UserError(f"device {asked!r} is not for several processes: use auto, cpu or cuda (one GPU each)")
    if n_here > n_gpus:
        raise UserError(
            f"{n_here} processes were started and there are {n_gpus} GPUs: start one process a GPU, or use --device cpu"
        )
    return _close_at_exit(PartialState(backend="cuda:nccl,cpu:gloo", timeout=PATIENCE)).device


@functools.cache
def _close_at_exit(state: PartialState) -> PartialState:
    """Close the group when the process ends: gloo's threads, left running, now and then abort it at exit."""
    atexit.register(state.destroy_process_group)
    return state
