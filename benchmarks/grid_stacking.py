"""Whether SAEs of equal shape gain from one matrix product for all their encoders: milliseconds of each way.

    python benchmarks/grid_stacking.py

For four topk SAEs on one batch: their products one after another, one product with the weights side by side, one
batched product; the selection that follows in either case; and the SAEs' whole steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from sae_train.config import SAESpec, TrainSettings
from sae_train.kernels import patterns
from sae_train.training.learner import Learner

N_SAES, BATCH, D_IN, K, REPEATS = 4, 2048, 256, 32, 20


def milliseconds(run: Callable[[], object]) -> float:
    """Median of some runs, the first few left out."""
    times = []
    for _ in range(REPEATS + 3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def measure(width: int) -> dict[str, float]:
    """Time the ways to run the encoders of four SAEs of this width."""
    x = torch.randn(BATCH, D_IN)
    weights = [torch.randn(width, D_IN) for _ in range(N_SAES)]
    side_by_side, stacked = torch.cat(weights).t(), torch.stack([w.t() for w in weights])
    b_enc, b_dec = torch.randn(N_SAES, width), torch.randn(N_SAES, D_IN)
    outs, out = torch.empty(N_SAES, BATCH, width), torch.empty(BATCH, N_SAES * width)
    slices = out.split(width, dim=1)
    spec = {"arch": "topk", "width": width, "l0": K}
    settings = TrainSettings(tokens=10**7, batch_tokens=BATCH)
    learners = [Learner(SAESpec(**spec, seed=seed), settings, D_IN, 10**4) for seed in range(N_SAES)]
    for learner in learners:
        learner.initialise(x[:512])

    def one_by_one() -> None:
        for i, w in enumerate(weights):
            torch.addmm(b_enc[i], x - b_dec[i], w.t(), out=outs[i])

    return {
        "one by one": milliseconds(one_by_one),
        "side by side": milliseconds(lambda: torch.addmm(b_enc.view(-1), x, side_by_side, out=out)),
        "batched": milliseconds(lambda: torch.bmm(x.expand(N_SAES, BATCH, D_IN), stacked, out=outs)),
        "selection": milliseconds(lambda: [patterns.top_k(pre, K) for pre in outs]),
        "selection of slices": milliseconds(lambda: [patterns.top_k(pre, K) for pre in slices]),
        "whole steps": milliseconds(lambda: [learner.step(x) for learner in learners]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    for width in (256, 512, 1024, 4096):
        print(f"width {width}: " + ", ".join(f"{what} {ms:.1f} ms" for what, ms in measure(width).items()), flush=True)


if __name__ == "__main__":
    main()
