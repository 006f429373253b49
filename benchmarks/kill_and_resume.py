"""Shows that a run survives SIGKILL at any moment: killed, resumed, and compared bit by bit with one left in peace.

    python benchmarks/kill_and_resume.py [--kills 20] [--model speller|toy] [--seed 0] [--out FOLDER]
    python benchmarks/kill_and_resume.py --processes 2 [--model speller|toy|shared] …

The moments are drawn at random within set-up, training, looks, the writing of the SAEs, and the report, in turn; the
times that each of these takes are first measured on an undisturbed run. Every other run is killed a second time while
it is resumed. With `--processes` one of so many is killed, drawn at random, and all are started again (`shared`: they
train one SAE together; otherwise each trains some). Compared are the weights of all SAEs, every logged figure but
times, and the tables of the eval. Exit code 1 where anything differs. A kill takes about one and a half times as long
as the run: on two cores half a minute (toy) or one and a half (speller), with two processes about twice that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from sae_train.files import read_metrics

COMMON = ["--device", "cpu", "--batch-tokens", "256", "--held-out-tokens", "2048", "--save-every", "15"]
RUNS = {
    "speller": [
        "--arch", "topk,jumprelu,gated", "--width", "256", "--l0", "8", "--tokens", "60k", "--buffer-tokens", "2048",
        "--eval-words", "600", "--absorption-evals", "4", *COMMON,
    ],
    "toy": ["--model", "toy", "--arch", "topk,jumprelu,gated", "--width", "128", "--l0", "3", "--tokens", "150k",
            "--absorption-evals", "6", *COMMON],
    "shared": ["--arch", "topk", "--width", "256", "--l0", "8", "--tokens", "60k", "--buffer-tokens", "2048",
               "--no-absorption", "--absorption-evals", "4", *COMMON],
}  # fmt: skip
TIMED = ("seconds", "details/tokens_per_second", "absorption/seconds")
TABLES = ("absorption.parquet", "trajectory.parquet")
POLL = 0.002  # seconds
Start = Callable[[Path], subprocess.Popen]
"""starts a run that is to be in a folder"""
STARTS: dict[str, Callable[[Path], bool]] = {  # when each phase has begun, by what is on the disk
    "start": lambda run: True,
    "set-up": lambda run: (run / "run.json").exists(),
    "training": lambda run: (run / "metrics.jsonl").exists(),
    "writing": lambda run: (run / "saes").exists(),
    "report": lambda run: bool(list(run.glob("saes/*/README.md"))),
    "end": lambda run: (run / "report.html").exists(),
}
PHASES = ("set-up", "training", "looks", "writing", "report")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", choices=RUNS, default="speller")
    parser.add_argument("--processes", type=int, default=1, help="started by torchrun, one of which is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs; default: a temporary one")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        start = functools.partial(_start, args.model, args.processes)
        durations = measure(start, out)
        wanted = results(out / "undisturbed")
        again = functools.partial(resume, start, processes=args.processes)
        alike = [_try(number, start, again, out, durations, wanted, draw) for number in range(args.kills)]
    print(f"{sum(alike)} of {len(alike)} killed runs ended as the undisturbed one")
    return 0 if all(alike) else 1


def _try(
    number: int, start: Start, again: Start, out: Path, durations: dict[str, float], wanted: dict, draw: random.Random
) -> bool:
    """Kill a run, resume it and compare it; say what happened."""
    phase, run = PHASES[number % len(PHASES)], out / f"killed-{number}"
    n_rows = len(read_metrics(out / "undisturbed"))
    told = [kill(start(run), run, phase, durations, n_rows, draw)]
    if number % 2:
        told.append(kill(again(run), run, draw.choice(PHASES[:-2]), durations, n_rows, draw))
    done = again(run).wait()
    found = results(run) if done in (0, 1, 2) and (run / "run.json").exists() else {}
    differ = sorted(key for key in wanted if found.get(key) != wanted[key])
    print(
        f"{number:3} {'DIFFERS: ' + ', '.join(differ) if differ else 'same':8} killed {', then '.join(told)}",
        flush=True,
    )
    if not differ:
        shutil.rmtree(run)
    return not differ


def measure(start: Start, out: Path) -> dict[str, float]:
    """Make the undisturbed run and return how long each phase took."""
    run, seen, begun = out / "undisturbed", {}, time.perf_counter()
    process = start(run)
    while process.poll() is None or len(seen) < len(STARTS):
        assert process.poll() in (None, 0), "the undisturbed run failed"
        seen |= {name: time.perf_counter() for name, at in STARTS.items() if name not in seen and at(run)}
        time.sleep(POLL)
    ends = [*list(seen.values())[1:], time.perf_counter()]
    durations = {name: end - since for (name, since), end in zip(seen.items(), ends, strict=True)}
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in durations.items())
    print(f"undisturbed: {time.perf_counter() - begun:.1f} s; {took}", flush=True)
    return durations


def _start(model: str, processes: int, run: Path) -> subprocess.Popen:
    return sae_train(run, *RUNS[model], "--out", str(run.parent), "--name", run.name, processes=processes)


def resume(start: Start, run: Path, processes: int = 1) -> subprocess.Popen:
    """Go on with a run, or start it where it was ended before it had a folder."""
    has_folder = (run / "run.json").exists()
    return sae_train(run, "resume", str(run), processes=processes) if has_folder else start(run)


def sae_train(run: Path, *words: str, processes: int = 1) -> subprocess.Popen:
    """Start the command line; what it says goes to a file beside the run's folder."""
    run.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "sae_train", *words]
    with run.with_suffix(".log").open("a") as log:
        return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)


def kill(
    process: subprocess.Popen, run: Path, phase: str, durations: dict[str, float], n_rows: int, draw: random.Random
) -> str:
    """Kill a process, or one of those that it started, at a random moment of a phase; say which."""
    where = wait_for_moment(process, run, phase, durations, n_rows, draw)
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda each: each.pid)
        if ranks and "torch.distributed.run" in process.args:
            number = draw.randrange(len(ranks))
            ranks[number].kill()
            where = f"process {number} {where}"
        else:
            process.kill()
    process.wait()
    return where


def wait_for_moment(
    process: subprocess.Popen, run: Path, phase: str, durations: dict[str, float], n_rows: int, draw: random.Random
) -> str:
    """Wait until a random moment of a phase; say which.

    A look logs a row for each SAE, so the moment just after a row is one in the midst of a look.
    """
    row = draw.randrange(1, n_rows)
    begun = (lambda run: len(read_metrics(run)) >= row) if phase == "looks" else STARTS[phase]
    delay = 0.0 if phase == "looks" else draw.uniform(0, durations[phase])
    while not begun(run) and process.poll() is None:
        time.sleep(POLL)
    time.sleep(delay)
    where = f"at row {row}" if phase == "looks" else f"after {delay:.2f} s"
    return f"in {phase} {where}{' (it had ended)' if process.poll() is not None else ''}"


def results(run: Path) -> dict[str, Any]:
    """What a run left, by name."""
    import pandas as pd

    info = json.loads((run / "run.json").read_text())
    kept: dict[str, Any] = {"status": info["status"], "report": (run / "report.html").exists()}
    kept["leftovers"] = [path.name for path in run.rglob("*.tmp")]
    kept["rows"] = [{name: x for name, x in row.items() if name not in TIMED} for row in read_metrics(run)]
    for path in sorted(run.glob("saes/*/*")):
        kept[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    for name in TABLES:
        if (run / name).exists():
            kept[name] = pd.read_parquet(run / name).to_json()
    return kept


if __name__ == "__main__":
    sys.exit(main())
