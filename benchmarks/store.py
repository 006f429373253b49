"""Activations on disk as food for training: speed beside activations in memory, and memory over a long read.

    python benchmarks/store.py [--minutes 1] [--pairs 8] [--d-in 512] [--width 4096] [--batch-tokens 2048]

A store of random bfloat16 activations is written (its rate is printed). Then an SAE takes turns of steps on a block in
memory and on blocks of the store, in pairs whose order alternates; printed is the speed from the store over that from
memory, the median of the pairs with a bootstrap interval. For `--minutes` it then trains on from the store, round and
round, gives memory back ten times, as a run does when it saves, and memory is sampled: printed are slopes in MiB an
hour with a 95 % interval from the means of these ten parts, over the whole time and over its second half. What the
program holds (malloc's count of what is in use, on Linux with glibc) tells a leak; the process's own memory has in it
what malloc keeps for later as well. Exit code 1 where the speed is below 95 %.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import math
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from scipy import stats

from sae_train.config import SAESpec, TrainSettings
from sae_train.data.activation_cache import ActivationCache
from sae_train.data.buffer import ActivationBuffer, Block
from sae_train.runs.process import give_back_memory, prepare_process
from sae_train.training.learner import Learner
from sae_train.training.loop import tf32_products
from sae_train.training.ranks import Ranks

LEAST = 0.95  # of the speed in memory
N_BLOCKS = 6
PARTS = 10  # of a long read, whose means give the slope
EVERY = 0.5  # seconds between samples of memory
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Rows:
    """The reader of a text that is not there: the same bfloat16 rows, moved on by its position."""

    epoch = 0

    def __init__(self, d_in: int, device: str) -> None:
        self.pool = torch.randn(8192, d_in, generator=torch.Generator().manual_seed(0)).bfloat16().float().to(device)
        self.state: dict[str, Any] = {"at": 0}

    def __next__(self) -> torch.Tensor:
        self.state = {"at": self.state["at"] + 1}
        return self.pool.roll(self.state["at"], 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("width", 4096), ("l0", 50), ("batch-tokens", 2048), ("pairs", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--buffer-tokens", type=int, default=65_536)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a CPU that others use as well")
    parser.add_argument("--out", type=Path, help="folder on the disk to be measured; default: a temporary one")
    args = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        buffer = open_buffer(args, Path(folder))
        write(buffer, args)
        learner = open_learner(args)
        share, low, high = compare(learner, buffer, args)
        print(f"from the store: {share:.1%} of the speed in memory, 95 % interval {low:.1%} to {high:.1%}", flush=True)
        if args.minutes:
            print(watch_memory(learner, buffer, args), flush=True)
    return 0 if share >= LEAST else 1


def open_buffer(args: argparse.Namespace, folder: Path) -> ActivationBuffer:
    """A buffer whose blocks are kept in a folder."""
    lm = SimpleNamespace(d_in=args.d_in, device=torch.device(args.device), name="random rows", hook_name="")
    cache = ActivationCache(folder, "random", torch.bfloat16, Ranks())
    return ActivationBuffer(
        lm, SimpleNamespace(name="no text"), buffer_tokens=args.buffer_tokens, batch_tokens=args.batch_tokens,
        cache=cache, reader=Rows(args.d_in, args.device),
    )  # fmt: skip


def open_learner(args: argparse.Namespace) -> Learner:
    settings = TrainSettings(tokens=10**9, batch_tokens=args.batch_tokens)
    spec = SAESpec(arch="topk", width=args.width, l0=args.l0)
    learner = Learner(spec, settings, args.d_in, 10**9 // args.batch_tokens, args.device)
    learner.initialise(Rows(args.d_in, args.device).pool)
    return learner


def write(buffer: ActivationBuffer, args: argparse.Namespace) -> None:
    """Fill the store."""
    start = time.perf_counter()
    for batch in round_and_round(buffer):
        if buffer.state_dict()["block"] == N_BLOCKS:
            break
        del batch
    size = N_BLOCKS * buffer.buffer_tokens * args.d_in * 2 / 2**20
    print(f"{size:,.0f} MiB written, {size / (time.perf_counter() - start):,.0f} MiB/s with making them", flush=True)


def round_and_round(buffer: ActivationBuffer) -> Iterator[torch.Tensor]:
    """The store's batches, from the first block again after the last."""
    start = {"tokens": {"at": 0}, "skip": 0, "block": 0, "offset": 0}
    buffer.load_state_dict(start)
    while True:
        if buffer.state_dict()["block"] == N_BLOCKS:
            buffer.load_state_dict(start)
        yield next(buffer)


def in_memory(buffer: ActivationBuffer, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """A block in memory, its batches again and again."""
    block = Block(torch.randperm(buffer.buffer_tokens), args.d_in, args.device)
    for at in range(0, buffer.buffer_tokens, 8192):
        block.put(at, Rows(args.d_in, args.device).pool[: buffer.buffer_tokens - at])
    for at in itertools.cycle(range(0, buffer.buffer_tokens, args.batch_tokens)):
        yield block.batch(at, at + args.batch_tokens)


def compare(learner: Learner, buffer: ActivationBuffer, args: argparse.Namespace) -> tuple[float, float, float]:
    """Speed from the store over speed in memory, with its interval; each turn takes a whole block."""
    clock = CLOCKS[args.clock]
    sources = {"store": round_and_round(buffer), "memory": in_memory(buffer, args)}
    n_steps, ratios = buffer.buffer_tokens // args.batch_tokens, []
    for source in sources.values():
        take_steps(learner, source, n_steps)
    for pair in range(args.pairs):
        order = list(sources) if pair % 2 else list(reversed(sources))
        seconds = {name: take_steps(learner, sources[name], n_steps, clock) for name in order}
        ratios.append(seconds["memory"] / seconds["store"])
    interval = stats.bootstrap((ratios,), np.median, rng=np.random.default_rng(0)).confidence_interval
    return float(np.median(ratios)), float(interval.low), float(interval.high)


def take_steps(
    learner: Learner, source: Iterator[torch.Tensor], n_steps: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of so many steps."""
    start = clock()
    with tf32_products([learner]):
        for _ in range(n_steps):
            learner.step(next(source))
    learner.check()  # waits for the device
    return clock() - start


def watch_memory(learner: Learner, buffer: ActivationBuffer, args: argparse.Namespace) -> str:
    """Train on from the store; say how memory went: held by the program, the process's own, with mapped files."""
    process, source = psutil.Process(), round_and_round(buffer)
    samples = array("d")  # four a sample, in a row: tuples would take more memory themselves
    take_steps(learner, source, N_BLOCKS * buffer.buffer_tokens // args.batch_tokens)  # until nothing is new
    start, n, taken, given_back = time.perf_counter(), 0, 0, 0
    while (now := time.perf_counter() - start) < 60 * args.minutes:
        if now >= taken * EVERY:
            memory = process.memory_info()
            samples.extend((now, held() or math.nan, memory.rss - memory.shared, memory.rss))
            taken += 1
        if now >= given_back * 60 * args.minutes / PARTS:
            give_back_memory()
            given_back += 1
        take_steps(learner, source, 1)
        n += args.batch_tokens
    times, *kinds = np.array(samples).reshape(taken, -1).T
    half, lines = taken // 2, [f"{args.minutes:g} minutes, {n * args.d_in * 2 / 2**30:.1f} GiB read"]
    for name, memory in zip(("held by the program", "the process's own", "with mapped files"), kinds, strict=True):
        if not np.isnan(memory).any():
            late = slope(times[half:], memory[half:])
            lines.append(
                f"{name}: {slope(times, memory)}, second half {late}; at the end {memory[-1] / 2**20:,.0f} MiB"
            )
    return "\n  ".join(lines)


class Heaps(ctypes.Structure):
    """struct mallinfo2 of malloc.h: bytes in use are `uordblks`, and `hblkhd` in mappings of their own."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


@functools.cache
def _mallinfo() -> Callable[[], Heaps] | None:
    """The C library's mallinfo2; None where it has none."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = Heaps
    return function


def held() -> int | None:
    """Bytes that were asked of malloc and not given back."""
    ask = _mallinfo()
    heaps = ask() if ask else None
    return None if heaps is None else heaps.uordblks + heaps.hblkhd


def slope(times: np.ndarray, memory: np.ndarray) -> str:
    """MiB an hour with a 95 % interval, from the means of parts, which are near to independent."""
    parts = [(t.mean(), m.mean()) for t, m in zip(*(np.array_split(x, PARTS) for x in (times, memory)), strict=True)]
    x, y = np.array(parts).T
    fit = stats.linregress(x / 3600, y / 2**20)
    half = stats.t.ppf(0.975, PARTS - 2) * fit.stderr
    return f"{fit.slope:+.1f} MiB an hour ({fit.slope - half:+.1f} to {fit.slope + half:+.1f})"


if __name__ == "__main__":
    sys.exit(main())
