"""How long a short run on the embedded model takes to get going, for two checkouts side by side.

    OMP_NUM_THREADS=1 python benchmarks/startup.py BEFORE [AFTER] [--pairs 5]

BEFORE and AFTER (default: this checkout) are checkouts that this Python can run. They run the same command in turns,
each pair in the other order, with a warm cache of the eval's assets. Timed from the start of the process are its first
row in metrics.jsonl (the untrained SAE was looked at, training begins) and the row after its first step. Printed are
the medians in seconds and their ratio. One thread is steadier than two on a machine with other work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--width", "256", "--l0", "8", "--tokens", "60k", "--batch-tokens", "512", "--log-every", "1", "--name", "run"]
MOMENTS = ("training begins", "first step done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="checkout that is timed")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    trees = [args.before.resolve(), args.after.resolve()]
    seen: list[list[list[float]]] = [[], []]
    with tempfile.TemporaryDirectory() as cache:
        for which in (0, 1):
            moments_of(trees[which], Path(cache) / str(which))  # fills the caches
        for pair in range(args.pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                seen[which].append(moments_of(trees[which], Path(cache) / str(which)))
            print(f"pair {pair + 1}: {seen[0][-1]} before, {seen[1][-1]} after", flush=True)
    medians = [map(statistics.median, zip(*runs, strict=True)) for runs in seen]
    for moment, before, after in zip(MOMENTS, *medians, strict=True):
        print(f"{moment}: {before:.2f} s before, {after:.2f} s after, ratio {after / before:.2f}")
    return 0


def moments_of(tree: Path, cache: Path) -> list[float]:
    """Seconds from the start of a run to its first row of figures, and to that of its first step; then it is ended."""
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "sae_train", *FLAGS, "--out", scratch]
        metrics, log = Path(scratch) / "run" / "metrics.jsonl", Path(scratch) / "log.txt"
        began, moments = time.perf_counter(), []
        with log.open("w") as output:
            running = subprocess.Popen(command, env=env, cwd=scratch, stdout=output, stderr=output)
        while len(moments) < len(MOMENTS):
            rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            moments += [round(time.perf_counter() - began, 2)] * (rows - len(moments))
            if running.poll() is not None and len(moments) < len(MOMENTS):
                raise SystemExit(f"{tree}: the run ended before its first step:\n{log.read_text()}")
            time.sleep(0.01)
        running.kill()
        running.wait()
    return moments[: len(MOMENTS)]


if __name__ == "__main__":
    sys.exit(main())
