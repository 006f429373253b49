"""Several hooks in one pass beside each hook alone: are the SAEs the same, bit for bit, and what does the run take?

    python benchmarks/several_hooks.py --model smollm2 --dataset english_mix.parquet

A run at all hooks, a run at each, and one at each on activations that lie on disk, which takes the SAE steps alone. The
bound is one pass of the language model to the deepest hook and the sum of the SAE steps: the time of the run at the
deepest hook, and the steps alone of the others. Times are those of training, without looks; `--repeats` takes all runs
anew, and prints the medians of the ratios and all of them. Exit code 1 where an SAE differs from the one trained alone,
or the run takes more than 1.1 times the bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from typing import Any

import torch
from csv_rows import machine

from sae_train.runs.run import Run, train

MOST = 1.1  # times the bound
HOOKS = "blocks.4.hook_resid_post,blocks.8.hook_resid_post,blocks.12.hook_resid_post"


def main() -> int:
    args = _arguments()
    hooks = args.hook.split(",")
    rounds = [measure(args, hooks) for _ in range(args.repeats)]
    same, of_bound, of_single = (list(column) for column in zip(*rounds, strict=True))
    flat = [each for columns in same for column in columns for each in column]
    print(f"{machine(args.device)}, {args.model}, {', '.join(args.arch.split(','))}, {args.width}: {len(hooks)} hooks")
    print(f"SAEs that are the same bit for bit: {sum(flat)} of {len(flat)}")
    print(f"time over the bound: {said(of_bound)}; over the runs one by one: {said(of_single)}")
    return 0 if all(flat) and statistics.median(of_bound) <= MOST else 1


def measure(args: argparse.Namespace, hooks: list[str]) -> tuple[list[list[bool]], float, float]:
    """Which SAEs are the same; the time of the run at all hooks over the bound, and over the runs one by one."""
    with tempfile.TemporaryDirectory() as scratch:
        together = run(args, scratch, "together", hook=hooks)
        alone = {hook: run(args, scratch, f"alone_{hook}", hook=hook) for hook in hooks}
        kept = {"activation_cache": f"{scratch}/activations"}
        run(args, scratch, "kept", hook=hooks, arch="topk", width=64, l0=8, **kept)
        steps = {hook: run(args, scratch, f"steps_{hook}", hook=hook, **kept) for hook in hooks}
        same = [equal(together, alone[hook], hook) for hook in hooks]
        seconds = together.info["seconds"]
        of_run, of_steps = ({hook: runs[hook].info["seconds"] for hook in hooks} for runs in (alone, steps))
    deepest = max(hooks, key=lambda hook: of_run[hook] - of_steps[hook])
    bound = of_run[deepest] + sum(of_steps[hook] for hook in hooks if hook != deepest)
    return same, seconds / bound, seconds / sum(of_run.values())


def said(ratios: list[float]) -> str:
    """The median of some ratios, with all of them where there are several."""
    each = f" ({', '.join(f'{ratio:.2f}' for ratio in ratios)})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{each}"


def run(args: argparse.Namespace, scratch: str, name: str, **given: Any) -> Run:
    """Train the grid."""
    asked = {key: value for key, value in vars(args).items() if value is not None and key != "repeats"} | given
    return train(**asked, name=name, out=scratch, absorption=False, absorption_evals=1)


def equal(together: Run, alone: Run, hook: str) -> list[bool]:
    """Whether each SAE of a run at this hook is the one of the run at all."""
    pairs = [(sae, together.saes[f"{name}-{hook}"]) for name, sae in alone.saes.items()]
    return [all(map(torch.equal, own.parameters(), other.parameters())) for own, other in pairs]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dataset", default=None)
    parser.add_argument("--hook", default=HOOKS, help="a comma list")
    parser.add_argument("--arch", default="topk,jumprelu", help="a comma list")
    parser.add_argument("--width", default="4k")
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--tokens", default="103k")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
