"""What could be gained on a CPU if the language model ran beside the SAE's steps in place of before them?

    python benchmarks/overlap.py --model smollm2 [--width 4k] [--l0 50] [--pairs 8]

A turn is a pass over 4,096 tokens up to the hook and the steps on as many activations: one after the other with all
threads, as a run does it, and at the same time in two threads that have half of the cores each. The shares of the two
are kept as they are, so a side that is done early waits for the other: that is what a run would do, too, whose steps
eat what the passes make. Printed is the time at once over the time one by one: the median of the pairs, whose order
alternates, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from csv_rows import machine
from scipy import stats

from sae_train.config import SAESpec, TrainSettings
from sae_train.config.units import parse_width
from sae_train.data.harvest import LM_BATCH_TOKENS
from sae_train.data.language_model import load_language_model
from sae_train.runs.process import prepare_process
from sae_train.training.learner import Learner


def main() -> int:
    args = _arguments()
    prepare_process()
    lm = load_language_model(args.model, args.hook, dtype=args.dtype)
    tokens = torch.randint(100, 1000, (LM_BATCH_TOKENS // args.context, args.context))
    x = lm.activations(tokens).flatten(0, 1).float()
    settings = TrainSettings(tokens=10**9, batch_tokens=args.batch_tokens)
    spec = SAESpec(arch=args.arch, width=parse_width(args.width), l0=args.l0)
    learner = Learner(spec, settings, x.shape[1], 10**9 // args.batch_tokens)
    learner.initialise(x)
    batches = x.split(args.batch_tokens)
    n_threads = torch.get_num_threads()

    def steps() -> None:
        for batch in batches:
            learner.step(batch)

    def one_by_one(_: Any) -> None:
        lm.activations(tokens)
        steps()

    def at_once(pool: ThreadPoolExecutor) -> None:
        both = [
            pool.submit(_with_threads, max(1, n_threads // 2), work) for work in (lambda: lm.activations(tokens), steps)
        ]
        for each in both:
            each.result()

    ratios, seconds = [], {}
    with ThreadPoolExecutor(2) as pool:
        for pair in range(-1, args.pairs):
            order = (one_by_one, at_once) if pair % 2 else (at_once, one_by_one)
            seconds = {ways.__name__: _time(ways, pool) for ways in order}
            ratios += [seconds["at_once"] / seconds["one_by_one"]] * (pair >= 0)
    interval = stats.bootstrap((ratios,), np.median, rng=np.random.default_rng(0)).confidence_interval
    print(f"{machine('cpu')}, {args.model}, {spec.name}, {n_threads} threads")
    print(f"at once over one by one: {np.median(ratios):.2f}, 95 % interval {interval.low:.2f} to {interval.high:.2f}")
    return 0


def _with_threads(n: int, work: Any) -> None:
    torch.set_num_threads(n)  # of the calling thread
    work()


def _time(ways: Any, pool: ThreadPoolExecutor) -> float:
    start = time.perf_counter()
    ways(pool)
    return time.perf_counter() - start


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="speller")
    parser.add_argument("--hook", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--arch", default="topk")
    parser.add_argument("--width", default="4k")
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
