"""Several processes at one run: how they are arranged, which SAEs each trains, what they exchange by torch.distributed.

A process alone has no process group: every exchange is then the identity. Each exchange is a collective: all processes
of the group must come to it, in the same order.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed as dist

from sae_train.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # that processes wait for one that looks; where one has died, the launcher ends the others


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`, of which `on_machine` run on this machine.

    They are all processes of the run, or those along one axis of a mesh.
    """

    rank: int = 0
    size: int = 1
    on_machine: int = 1
    mesh: DeviceMesh | None = None
    """the axis; None for all processes"""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes, as torch.distributed wants them."""
        return self.mesh and self.mesh.get_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first process, the only one to run it; its UserError is raised on all."""
        if self.size == 1:
            return make()
        outcome = [_outcome(make) if self.is_first else None]
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order; small ones only, since they are pickled."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.gather(None)

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any process; waits for the processes, not for their devices."""
        if self.size == 1:
            return list(flags)
        seen = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in seen.tolist()]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes, the same bits on each; the memory of `x` may be used for it."""
        if self.size == 1:
            return x
        total = x.detach().contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all processes, as `sum` does."""
        return x if self.size == 1 else self.sum(x).div_(self.size)

    def add_up(self, part: Tensor) -> Tensor:
        """Return the sum of everybody's parts, differentiable: the gradient of the sum is that of each part.

        For what all go on to compute alike from the sum.
        """
        if self.size == 1:
            return part
        from torch.distributed.tensor import DTensor, Partial

        return DTensor.from_local(part, self.mesh, [Partial()], run_check=False).full_tensor()

    def stack(self, x: Tensor) -> Tensor:
        """Return the tensors of all processes, which have one shape, in order: (size, …)."""
        every = x.new_empty(self.size, *x.shape)
        if self.size == 1:
            return every.copy_(x[None])
        dist.all_gather(list(every.unbind()), x.contiguous(), group=self.group)
        return every

    def bring(self, x: Tensor, into: Sequence[Tensor] | None) -> None:
        """Bring the tensors of all processes, which have one shape, into those of the first, which alone has any."""
        dist.gather(x, list(into) if self.is_first else None, group=self.group, group_dst=0)

    def collect(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, in order, of which each may have another number."""
        if self.size == 1:
            return x
        counts = self.stack(torch.tensor(len(x), device=x.device)).tolist()
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([theirs[:n] for theirs, n in zip(self.stack(padded), counts, strict=True)])

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
                dist.broadcast(parts[i], group=self.group, group_src=rank)


def current() -> Ranks:
    """Return the processes of the group that `choose_device` opened, or this one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@dataclass(frozen=True)
class Mesh:
    """The processes in rows and columns: SAEs, or the rows of batches, are split over `data`, latents over `width`.

    The processes along `width` are a team: each holds as many latents of the team's SAEs.
    """

    data: Ranks = field(default_factory=Ranks)
    width: Ranks = field(default_factory=Ranks)

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.data.size * self.width.size

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes, as `Ranks.sum` does."""
        return self.width.sum(self.data.sum(x))

    def collect(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, as `Ranks.collect` does."""
        return self.data.collect(self.width.collect(x))


def arrange(ranks: Ranks, n_shards: int) -> Mesh:
    """Put the processes into teams of n_shards that follow one another; UserError where that leaves some over."""
    if ranks.size % n_shards:
        raise UserError(
            f"shard_width {n_shards} is for {n_shards} processes or a multiple of that, and {ranks.size} were started: "
            "start as many (torchrun --nproc-per-node), or take another --shard-width"
        )
    if n_shards == 1:
        return Mesh(ranks)
    return _open_mesh(ranks.size // n_shards, n_shards)


@functools.cache
def _open_mesh(n_teams: int, n_shards: int) -> Mesh:
    """Open the groups along the two axes of a mesh, once."""
    from torch.distributed.device_mesh import DeviceMesh

    numbers = torch.arange(n_teams * n_shards).view(n_teams, n_shards)
    # Made here and not by init_device_mesh, whose groups give up after minutes: a look may take hours.
    lines = numbers.t().tolist(), numbers.tolist()
    groups = [dist.new_subgroups_by_enumeration(each, timeout=PATIENCE)[0] for each in lines]
    kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    mesh = DeviceMesh.from_group(groups, kind, mesh=numbers, mesh_dim_names=("data", "width"))
    axes = (mesh["data"], mesh["width"])
    return Mesh(*(Ranks(axis.get_local_rank(), axis.size(), mesh=axis) for axis in axes))


@dataclass(frozen=True)
class Division:
    """Which process, or team, looks at each SAE and saves it, and whether all of them train every SAE together.

    Together each one steps on its share of every batch; otherwise the owner alone trains its SAEs on whole batches.
    """

    owners: tuple[int, ...]
    together: bool


def divide(costs: Sequence[float], ranks: Ranks, batch_tokens: int) -> Division:
    """Spread SAEs of these costs over processes, or teams; where there are fewer SAEs than those, all train together.

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
