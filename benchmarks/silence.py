"""Shows how long a run is silent, and that Ctrl-C at any moment ends it in one sentence and loses nothing.

    python benchmarks/silence.py [--terminal] [--seconds 90] [-- --config configs/smollm2.yaml]
    python benchmarks/silence.py --interrupt 12 [--seed 0] -- --width 256 --l0 8 --tokens 60k --batch-tokens 256

What follows -- is given to sae-train. The first form prints the longest time without any output, of standard output and
error through a pipe or a pseudo-terminal, the last line before it, and the parts that the lines tell of with their
times; exit code 1 where it was silent for more than 5 s. The second makes one undisturbed run and then sends Ctrl-C at
moments drawn at random within start, set-up, training, looks, writing and report, in turn (kill_and_resume.py has their
bounds). The process has to end within 10 s with exit code 130 and one sentence, without a traceback; then the run has
to go on to its end where there is a folder, or else to start again. An interrupted run takes about one and a half times
as long as the run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from kill_and_resume import PHASES, measure, resume, sae_train, wait_for_moment

from sae_train.files import read_metrics

LONGEST_SILENCE, LONGEST_END, GIVEN_UP = 5.0, 10.0, 60.0  # seconds
INTERRUPTED = 130
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Said(NamedTuple):
    at: float
    """seconds since the start"""
    line: str
    """the last one with text"""


def main() -> int:
    args = _arguments()
    # A shell that starts this in the background has Ctrl-C ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        if args.interrupt:
            return interrupt_often(args.flags, out, args.interrupt, random.Random(args.seed))
        said, code = listen([*args.flags, "--out", str(out), "--name", "heard"], args.terminal, args.seconds)
    longest, line = longest_silence(said)
    print(f"{said[-1].at:.1f} s in all, exit code {code}; longest silence {longest:.1f} s, after: {line}")
    for part, seconds in parts(said).items():
        print(f"{seconds:8.1f} s  {part}")
    return int(longest > LONGEST_SILENCE)


def listen(flags: list[str], terminal: bool, most: float | None) -> tuple[list[Said], int]:
    """Run sae-train to its end, or for so many seconds until Ctrl-C; return what it said when, and its exit code."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    begun, said, asked = time.perf_counter(), [Said(0.0, "(its start)")], False
    process = subprocess.Popen([sys.executable, "-m", "sae_train", *flags], stdout=theirs, stderr=theirs)
    os.close(theirs)
    while True:
        now = time.perf_counter() - begun
        if most is not None and now > most and not asked:
            process.send_signal(signal.SIGINT)
            asked = True
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            read = os.read(ours, 65536)
        except OSError:  # how a pseudo-terminal ends
            read = b""
        if not read:
            break
        lines = [line.rstrip() for line in CONTROL.sub("", read.decode(errors="replace")).splitlines() if line.strip()]
        said.append(Said(time.perf_counter() - begun, lines[-1] if lines else said[-1].line))
    code = process.wait()
    return [*said, Said(time.perf_counter() - begun, "(its end)")], code


def longest_silence(said: list[Said]) -> tuple[float, str]:
    """Return the longest time between two outputs, and the line before it."""
    return max((after.at - before.at, before.line) for before, after in itertools.pairwise(said))


def parts(said: list[Said]) -> dict[str, float]:
    """Return how long each thing was what the last line told of, in their order, by the line's first words."""
    seconds: dict[str, float] = defaultdict(float)
    for before, after in itertools.pairwise(said):
        in_training = before.line.startswith(("step ", "  "))
        seconds["training" if in_training else re.split("[:,;]", before.line)[0]] += after.at - before.at
    return dict(seconds)


def interrupt_often(flags: list[str], out: Path, n: int, draw: random.Random) -> int:
    """Interrupt n runs, let each go on to its end, and return the exit code."""
    durations = measure(functools.partial(_start, flags), out)
    n_rows = len(read_metrics(out / "undisturbed"))
    faults = []
    for number in range(n):
        phase, run = ("start", *PHASES)[number % (len(PHASES) + 1)], out / f"interrupted-{number}"
        process = _start(flags, run)
        where = wait_for_moment(process, run, phase, durations, n_rows, draw)
        faults.append(interrupt(process, run.with_suffix(".log")) or go_on(flags, run))
        print(f"{number:3} {faults[-1] or 'well':30} interrupted {where}", flush=True)
    print(f"{faults.count('')} of {n} interrupted runs ended in one sentence and went on to their end")
    return int(any(faults))


def interrupt(process: subprocess.Popen, log: Path) -> str:
    """Send Ctrl-C to a process and say what is wrong with how it ends, if anything."""
    before = len(log.read_text())
    if process.poll() is not None:
        return ""  # it had ended
    process.send_signal(signal.SIGINT)
    begun = time.perf_counter()
    try:
        code = process.wait(GIVEN_UP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"still there after {GIVEN_UP:.0f} s"
    if (took := time.perf_counter() - begun) > LONGEST_END:
        return f"took {took:.1f} s to end"
    if code == 0:
        return ""  # the run was done before it heard of it
    if code != INTERRUPTED:
        return f"exit code {code}"
    text = log.read_text()[before:]
    if "Traceback" in text:
        return "a traceback"
    sentences = [line for line in text.splitlines() if "interrupted" in line]
    return "" if len(sentences) == 1 else f"{len(sentences)} sentences"


def go_on(flags: list[str], run: Path) -> str:
    """Let an interrupted run go on, or start again, and say what is wrong with how that ends, if anything."""
    if (run / "report.html").exists():
        return ""
    code = resume(functools.partial(_start, flags), run).wait()
    return "" if code == 0 and (run / "report.html").exists() else f"going on ended with exit code {code}"


def _start(flags: list[str], run: Path) -> subprocess.Popen:
    return sae_train(run, *flags, "--out", str(run.parent), "--name", run.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terminal", action="store_true", help="listen through a pseudo-terminal")
    parser.add_argument("--seconds", type=float, help="listen for so long, then send Ctrl-C")
    parser.add_argument("--interrupt", type=int, default=0, help="number of runs to interrupt")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="folder that keeps the runs; default: a temporary one")
    parser.add_argument("flags", nargs="*", help="what sae-train is given, after --")
    args = parser.parse_args()
    args.flags = args.flags or ["--config", "configs/smollm2.yaml"]
    return args


if __name__ == "__main__":
    sys.exit(main())
