"""Times one training step of an SAE side by side with the peers; prints tables and adds rows to a CSV file.

    python -m benchmarks.kernels.bench --peer-python ENV/bin/python            one size, all architectures
    python -m benchmarks.kernels.bench --quick                                 under a minute, without peers
    python -m benchmarks.kernels.bench --device cuda --d-in 768,2304 --d-sae 16384,65536 --batch 8192
    python -m benchmarks.kernels.bench --device cuda --full --rounds 3

ENV is an environment with sae-lens, eai-sparsify and dictionary-learning; absent ones are named and left out. The
kernels are checked first, and a red check ends the benchmark. A step is forward, backward and optimiser with all that
each trainer does around them. Every side runs in a process of its own, in rounds (A B C A B C …), on the same weights
and batches; memory is the peak of a step over what was held before the first, less the optimiser's moments.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.csv_rows import append
from benchmarks.kernels import checks
from benchmarks.kernels.bench_peers import PEERS
from benchmarks.kernels.bench_problem import Problem
from benchmarks.kernels.bench_report import COLUMNS, rows_of, table
from benchmarks.kernels.bench_sides import CUDA_ONLY, SIDES

ROOT = Path(__file__).resolve().parents[2]
# The largest relative difference in the first batch's error between a side and ours that rounding explains, that of
# products in bfloat16 on a GPU.
SAME_MATHS = {"cpu": 1e-3, "cuda": 1e-2}


class Side:
    """A worker process that holds one side."""

    def __init__(self, name: str, python: str, equalised: bool, p: Problem, threads: int):
        self.name, self.equalised = name, equalised
        # Huge pages, which sae_train switches on: for the sides in plain PyTorch too, for the peers where equalised.
        huge = name in SIDES or equalised
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
               "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
               "THP_MEM_ALLOC_ENABLE": str(int(huge))}  # fmt: skip
        command = [python, "-m", "benchmarks.kernels.bench_worker"]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._send(do="build", side=name, equalised=equalised, threads=threads, **vars(p))
        self.ms: list[float] = []
        self.parts: dict[str, list[float]] = {}
        self.memory: dict[str, Any] = {}

    @cached_property
    def built(self) -> dict[str, Any]:
        """The answer to being built; all sides build at the same time."""
        return self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; a dead worker answers `failed`."""
        self._send(**request)
        return self._answer()

    def _send(self, **request: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": "the process ended (out of memory?)"}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    _check(args.device)
    for arch, d_in, d_sae, batch, k in itertools.product(args.arch, args.d_in, args.d_sae, args.batch, args.k):
        p = Problem(arch, d_in, d_sae, batch, k, args.device)
        new = measure(p, args)
        print(table(p, new) if new else f"\nnothing fits: {p}", flush=True)
        if args.out and new:
            append(args.out, COLUMNS, new)


def measure(p: Problem, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all sides on one problem in turns; return their rows."""
    sides = [side for side in _sides(p, args) if _present(side)]
    try:
        _same_maths(sides, SAME_MATHS[p.device])
        _no_dense_block(sides, p)
        for _ in range(args.rounds):
            for side in sides:
                side.ms += side.ask(do="time", seconds=args.seconds)["ms"]
        for side in sides:
            for _ in range(args.part_rounds):
                for part, ms in side.ask(do="parts").items():
                    side.parts.setdefault(part, []).append(ms)
            side.memory = side.ask(do="memory")
    finally:
        for side in sides:
            side.close()
    return rows_of(p, sides, args.threads)


def _sides(p: Problem, args: argparse.Namespace) -> list[Side]:
    gpu = p.device != "cpu"
    ours = [name for name, (_, archs) in SIDES.items() if p.arch in archs and (gpu or name not in CUDA_ONLY)]
    # On a CPU there is nothing to be equalised in them; on a GPU it means TF32 and bfloat16 autocast, which ours has.
    wanted = [
        (name, sys.executable, equalised)
        for equalised in (False, True)[: 1 + gpu]
        for name in ours
        if not (equalised and name.startswith("sae-train"))
    ]
    for name, (_, archs) in PEERS.items():
        if args.peer_python and p.arch in archs:
            wanted.append((name, args.peer_python, False))
            if name != "sparsify + Signum":  # has no Adam to be fused
                wanted.append((name, args.peer_python, True))
    if args.sides:
        wanted = [w for w in wanted if w[0] in args.sides]
    return [Side(name, python, equalised, p, args.threads) for name, python, equalised in wanted]


def _present(side: Side) -> bool:
    reason = side.built.get("missing") or side.built.get("failed")
    if reason:
        print(f"left out: {side.name}{' (equalised)' if side.equalised else ''}: {reason}", file=sys.stderr)
        side.close()
    return not reason


def _same_maths(sides: list[Side], limit: float) -> None:
    """Every side must reconstruct the first batch with the same error before anything is compared."""
    errors = {side.name: side.built["mse"] for side in sides if side.built["mse"] is not None}
    first = next(iter(errors.values()), 0.0)
    for name, error in errors.items():
        if not abs(error - first) <= limit * first:
            print(f"{name} reconstructs with error {error:.6g} where the first side has {first:.6g}", file=sys.stderr)
            raise SystemExit(1)


def _no_dense_block(sides: list[Side], p: Problem) -> None:
    """The fused kernels must not make any tensor of the size of (batch, d_sae)."""
    for side in sides:
        fused = side.name == "sae-train" and p.device != "cpu"
        shapes = side.ask(do="dense")["shapes"] if fused else []
        if shapes:
            raise SystemExit(f"{side.name} makes dense blocks: {shapes}")


def _check(device: str) -> None:
    checked = checks.differences(device) + (checks.differences(device, "triton") if device != "cpu" else [])
    wrong = [d for d in checked if not d.good]
    for d in wrong:
        print(f"wrong: {d.case}, {d.tensor}: relative RMS {d.relative_rms:.2e} > {d.limit:.0e}", file=sys.stderr)
    if wrong:
        raise SystemExit("the kernels are wrong, so nothing is timed")
    print("kernels checked against dense autograd in float64: right")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", "512"), ("d-sae", "16384"), ("batch", "2048"), ("k", "50")):
        parser.add_argument(f"--{name}", type=_integers, default=_integers(default), metavar="N,N,…")
    parser.add_argument("--arch", type=_words, default=["topk", "relu", "jumprelu"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", help="python of an environment with the peers")
    parser.add_argument("--sides", type=_words, help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part-rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="per side and round; always at least one step")
    parser.add_argument("--quick", action="store_true", help="one small size and few rounds")
    parser.add_argument(
        "--full", action="store_true", help="all sizes of a GPU benchmark; what does not fit is left out"
    )
    parser.add_argument("--out", type=Path, help="CSV file that the rows are appended to")
    args = parser.parse_args()
    if args.full:
        args.d_in, args.d_sae = [512, 768, 2304, 4096], [2**14, 2**16, 2**17, 2**20]
        args.batch, args.k = [2048, 8192], [32, 50, 128]
    if args.quick:
        args.d_in, args.d_sae, args.batch, args.k = [256], [4096], [1024], [32]
        args.rounds, args.part_rounds, args.seconds = 3, 1, 0.2
    return args


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


if __name__ == "__main__":
    main()
