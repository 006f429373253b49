"""How long a short run on the embedded model takes to get going, for two checkouts side by side.

    OMP_NUM_THREADS=1 python benchmarks/startup.py BEFORE [AFTER] [--pairs 5]

BEFORE and AFTER (default: this checkout) are checkouts that this Python can run. They run the same command in turns,
each pair in the other order, with a warm cache of the eval's assets. Timed from the start of the process are its first
row in metrics.jsonl (the untrained SAE was looked at, training begins) and the row after its first step. Printed are
the medians and their ratio, of seconds on the clock and of seconds on a processor: with one thread these are the same
on a machine with nothing else to do, and the second are steadier on one with other work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--width", "256", "--l0", "8", "--tokens", "60k", "--batch-tokens", "512", "--log-every", "1", "--name", "run"]
FIGURES = (
    "training begins, clock",
    "training begins, processor",
    "first step done, clock",
    "first step done, processor",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="checkout that is timed")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    trees = [args.before.resolve(), args.after.resolve()]
    seen: list[list[list[float]]] = [[], []]
    with tempfile.TemporaryDirectory() as scratch:
        caches = [Path(scratch) / name for name in ("before", "after")]
        for which in (0, 1):
            start_of(trees[which], caches[which])  # fills the cache
        for pair in range(args.pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                seen[which].append(start_of(trees[which], caches[which]))
            print(f"pair {pair + 1}: before {render(seen[0][-1])}, after {render(seen[1][-1])}", flush=True)
    medians = [map(statistics.median, zip(*starts, strict=True)) for starts in seen]
    for name, before, after in zip(FIGURES, *medians, strict=True):
        print(f"{name}: {before:.2f} s before, {after:.2f} s after, ratio {after / before:.2f}")
    return 0


def render(figures: list[float]) -> str:
    return " ".join(f"{figure:.2f}" for figure in figures)


def start_of(tree: Path, cache: Path) -> list[float]:
    """Seconds on the clock and on a processor until a run's first row, and until that of its first step."""
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "sae_train", *FLAGS, "--out", scratch]
        metrics, log = Path(scratch) / "run" / "metrics.jsonl", Path(scratch) / "log.txt"
        began = time.perf_counter()
        with log.open("w") as output:
            process = psutil.Popen(command, env=env, cwd=scratch, stdout=output, stderr=output)
        figures: list[float] = []
        while len(figures) < len(FIGURES):
            time.sleep(0.01)
            used = process.cpu_times()
            rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if rows > len(figures) // 2:
                figures += [time.perf_counter() - began, used.user + used.system]
            elif process.poll() is not None:
                raise SystemExit(f"{tree}: the run ended before its first step:\n{log.read_text()}")
        process.kill()
        process.wait()
    return figures


if __name__ == "__main__":
    sys.exit(main())
