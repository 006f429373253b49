"""What `--dry-run` says a run takes, beside what it takes.

    python benchmarks/estimate.py [--flags='--model smollm2 …'] …

For each --flags (default: a run on the embedded model) the plan is asked, then the run is made in a scratch folder with
an empty cache of eval assets. Printed are the plan's seconds by part, the run's on the clock, from the start of its
process to its end, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"s": 1, "min": 60, "h": 3600}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", action="append", help="flags of one run")
    args = parser.parse_args()
    for flags in args.flags or ["--width 4k --l0 50 --tokens 300k"]:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "sae_train", *shlex.split(flags), "--out", scratch]
            plan = run([*command, "--dry-run"], scratch)
            planned = next(line for line in plan.splitlines() if line.startswith("time "))
            start = time.perf_counter()
            shown = run(command, scratch)
            taken = time.perf_counter() - start
        asked, unit = re.search(r"about ([\d.]+) (s|min|h)", planned).groups()
        seconds = float(asked) * UNITS[unit]
        print(f"{flags}\n  {planned}\n  took {taken:.0f} s, {taken / seconds:.2f} times the plan; the run ended with")
        print("\n".join(shown.splitlines()[-4:]), flush=True)
    return 0


def run(command: list[str], cache: str) -> str:
    env = os.environ | {"XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
