"""Times on a GPU what its tile sizes are chosen by: encoders, weight gradients and whole steps, in ms.

    python -m benchmarks.kernels.bench_tiles --d-in 768 --d-sae 65536 --batch 8192 --k 50

Encoders of bfloat16 products with 4 and with 8 warps; one weight gradient with other entries, columns and warps a
program; a step of topk as it is recorded and played, and as it is launched kernel by kernel. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.csv_rows import machine
from benchmarks.kernels.bench_problem import Problem, batches, decoder_rows, level
from benchmarks.kernels.bench_sides import Ours
from sae_train.kernels import encoders, patterns, sums
from sae_train.kernels.shapes import plan

# Entries, columns and warps of a program that sums rows; ours first.
GATHERS = [(4, 128, 1), (8, 128, 1), (4, 256, 2), (8, 256, 2), (8, 256, 4), (16, 256, 4), (8, 1024, 4)]
WARM_UP, ROUNDS, CALLS = 5, 7, 5


def main() -> None:
    global WARM_UP, ROUNDS, CALLS
    args = _arguments()
    if args.once:
        WARM_UP, ROUNDS, CALLS = 0, 1, 1
    torch.set_float32_matmul_precision("high")
    p = Problem("topk", args.d_in, args.d_sae, args.batch, args.k, args.device)
    rows = decoder_rows(p)
    xs = batches(p, rows)
    print(f"{p}, {machine(p.device)}, torch {torch.__version__}")
    _encoders(p, rows, xs[0])
    _gradients(p, rows, xs[0])
    _steps(p, rows, xs)


def _encoders(p: Problem, rows: torch.Tensor, x: torch.Tensor) -> None:
    x16, b_enc = x.bfloat16(), x.new_zeros(p.d_sae)
    floor = torch.full_like(b_enc, level(replace(p, arch="relu"), rows, x))
    for name, k, lowest in (("top k", p.k, None), ("above a floor", None, floor)):
        for warps in (4, 8):
            how = replace(plan(k, p.d_sae, 2), warps=warps)
            W = encoders._regroup(rows, x16.dtype, how)
            _report(
                f"encoder, {name}, {warps} warps",
                lambda W=W, lowest=lowest, how=how: encoders._candidates(x16, W, b_enc, lowest, how),
            )


def _gradients(p: Problem, rows: torch.Tensor, x: torch.Tensor) -> None:
    x16 = x.bfloat16()
    values, latents = encoders.topk(x16, rows, x.new_zeros(p.d_sae), p.k)
    pattern = patterns.row_pattern(latents, p.d_sae)
    before = sums.BAG_ENTRIES, sums.BAG_COLUMNS, sums.BAG_WARPS
    for gather in GATHERS:
        sums.BAG_ENTRIES, sums.BAG_COLUMNS, sums.BAG_WARPS = gather
        name = "weight gradient, {} entries, {} columns, {} warps".format(*gather)
        _report(name, lambda: sums.latent_sums(pattern, values.view(-1), x16))
    sums.BAG_ENTRIES, sums.BAG_COLUMNS, sums.BAG_WARPS = before


def _steps(p: Problem, rows: torch.Tensor, xs: list[torch.Tensor]) -> None:
    ours = Ours(p, rows, 0.0, equalised=False)
    _report("step, recorded" if ours.learner.records else "step", lambda: ours.step(xs[0]))
    _report("step, launched", lambda: ours.unrecorded_step(xs[0]))


def _report(name: str, run: Callable[[], object]) -> None:
    for _ in range(WARM_UP):
        run()
    taken = []
    for _ in range(ROUNDS):
        start = _now()
        for _ in range(CALLS):
            run()
        taken.append((_now() - start) / CALLS)
    print(f"{name:55} {statistics.median(taken):8.3f} ms", flush=True)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 768), ("d-sae", 65536), ("batch", 8192), ("k", 50)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--once", action="store_true", help="one call each: to see that it runs")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu only with TRITON_INTERPRET=1")
    return parser.parse_args()


if __name__ == "__main__":
    main()
