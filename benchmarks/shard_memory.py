"""Memory of a process for an SAE's own part where its width is split over several: weights, gradients and moments.

    python benchmarks/shard_memory.py                # 1, 2 and 4 processes; a row each in results/shard_memory.csv

For each architecture, on the process that has the most: the bytes of those tensors in the midst of a step, and by how
much the memory of the process grew at the most from before the SAE was there to after some steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from torch import distributed as dist

from sae_train.config import SAESpec, TrainSettings
from sae_train.training.architectures import TRAINED
from sae_train.training.learner import Learner
from sae_train.training.ranks import Mesh, arrange, current

sys.path.insert(0, str(Path(__file__).parent))
from csv_rows import append, machine

RESULTS = Path(__file__).parent / "results" / "shard_memory.csv"
COLUMNS = ("arch", "width", "d_in", "processes", "tensors_mib", "tensors_share", "grown_mib", "grown_share", "machine")
MIB, STEPS, BATCH, L0 = 2**20, 3, 64, 32


class Measured(Learner):
    """A learner that counts the bytes of its weights, gradients and moments while all of them are there."""

    most = 0

    def _apply(self, *args) -> None:
        super()._apply(*args)
        of_adam = [value for p in self.trained.values() for value in self.optimiser.state[p].values() if value.ndim]
        tensors = [*self.leaves.values(), *(p.grad for p in self.trained.values()), *of_adam]
        self.most = sum(tensor.nbytes for tensor in tensors)


def train(arch: str, width: int, d_in: int, mesh: Mesh) -> int:
    """Make some steps; return the bytes of what is split."""
    spec, settings = SAESpec(arch=arch, width=width, l0=L0), TrainSettings(tokens=10**6, batch_tokens=BATCH)
    learner = Measured(spec, settings, d_in, 1000, mesh=mesh)
    x = torch.randn(STEPS, BATCH, d_in, generator=torch.Generator().manual_seed(0))
    learner.initialise(x.flatten(0, 1))
    for batch in x:
        learner.step(batch)
    return learner.most


def work(rank: int, n: int, arch: str, width: int, d_in: int, folder: str) -> None:
    """What each of n processes does; the first leaves the largest figures of all in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    mesh = arrange(current(), n)
    train(arch, 16 * L0, d_in, mesh)  # so that libraries are loaded
    before = psutil.Process().memory_info().rss
    tensors = train(arch, width, d_in, mesh)
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    figures = torch.tensor([tensors, grown])
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures.tolist()))
    dist.barrier()
    os._exit(0)


def measure(n: int, arch: str, width: int, d_in: int) -> tuple[float, float]:
    """MiB of the tensors, and by which a process grew, with the width over n processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (n, arch, width, d_in, folder), nprocs=n)
        tensors, grown = json.loads(Path(folder, "figures.json").read_text())
    return tensors / MIB, grown / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=list(TRAINED))
    parser.add_argument("--width", type=int, default=2**15)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    asked = parser.parse_args()
    for arch in asked.arch:
        alone = measure(1, arch, asked.width, asked.d_in)
        for n in asked.processes:
            tensors, grown = alone if n == 1 else measure(n, arch, asked.width, asked.d_in)
            shares = round(tensors / alone[0], 3), round(grown / alone[1], 3)
            values = arch, asked.width, asked.d_in, n, round(tensors, 1), shares[0], round(grown, 1), shares[1]
            append(RESULTS, COLUMNS, [dict(zip(COLUMNS, (*values, machine("cpu")), strict=True))])
            print(*values)


if __name__ == "__main__":
    main()
