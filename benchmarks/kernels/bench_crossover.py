"""From which share of active latents do dense products beat sparse sums? Prints a table and adds rows to a CSV file.

    python -m benchmarks.kernels.bench_crossover --d-in 512 --d-sae 4096 --batch 1024

Both ways take the same steps of the same relu SAE in turns. Where they cross is what kernels/crossover.py goes by.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.csv_rows import append, machine
from benchmarks.kernels.bench_problem import Problem, batches, decoder_rows, level
from benchmarks.kernels.bench_sides import Ours
from sae_train.kernels.crossover import Crossover
from sae_train.kernels.patterns import Pattern

SHARES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
COLUMNS = ("date", "machine", "threads", "device", "d_in", "d_sae", "batch", "share", "way", "n", "p50")


@dataclass
class Always(Crossover):
    """One way whatever comes."""

    def choose(self, pattern: Pattern) -> Pattern:
        return replace(pattern, dense=self.dense)


def measure(p: Problem, rounds: int) -> dict[str, float]:
    """Return the median ms of a step by way."""
    rows = decoder_rows(p)
    xs = batches(p, rows)
    side = Ours(p, rows, level(p, rows, xs[0]), False)
    taken: dict[str, list[float]] = {"sparse": [], "dense": []}
    for i in range(rounds + 1):
        for way, times in taken.items():
            side.learner.arch.crossover = Always(dense=way == "dense")
            start = _now(p.device)
            side.step(xs[i % len(xs)])
            times.append(_now(p.device) - start)
    return {way: statistics.median(times[1:]) for way, times in taken.items()}


def crossing(shares: tuple[float, ...], ratios: list[float]) -> float:
    """Return the share at which dense / sparse falls through 1, between measured ones on log scales; NaN if nowhere."""
    points = list(zip(shares, ratios, strict=True))
    for (a, ra), (b, rb) in itertools.pairwise(points):
        if ra > 1 >= rb:
            at = math.log(ra) / (math.log(ra) - math.log(rb))
            return math.exp(math.log(a) + at * (math.log(b) - math.log(a)))
    return math.nan


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    out, ratios = [], []
    print(f"{machine(args.device)}, {args.threads} threads\n\n| active | sparse, ms | dense, ms |\n|---|---|---|")
    for share in SHARES:
        p = Problem("relu", args.d_in, args.d_sae, args.batch, max(1, round(share * args.d_sae)), args.device)
        ms = measure(p, args.rounds)
        ratios.append(ms["dense"] / ms["sparse"])
        print(f"| {100 * share:g} % | {ms['sparse']:.0f} | {ms['dense']:.0f} |", flush=True)
        common = {
            "date": time.strftime("%Y-%m-%d"), "machine": machine(args.device), "threads": args.threads,
            "device": args.device, "d_in": p.d_in, "d_sae": p.d_sae, "batch": p.batch, "share": share, "n": args.rounds,
        }  # fmt: skip
        out += [{**common, "way": way, "p50": round(value, 2)} for way, value in ms.items()]
    print(f"\nthey cross at {100 * crossing(SHARES, ratios):.1f} % of all latents active")
    if args.out:
        append(args.out, COLUMNS, out)


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 512), ("d-sae", 4096), ("batch", 1024), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="CSV file that the rows are appended to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
