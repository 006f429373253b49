"""What shared in-context examples do to the absorption eval: the time of its set-up and its scores with
`--eval-contexts each` and 64, over eval seeds; rows go to benchmarks/results/eval_contexts.csv, Markdown to the screen.

    python benchmarks/eval_contexts.py [--model MODEL] [--eval-words N] SAE_FOLDER ...     measure, then the tables
    python benchmarks/eval_contexts.py --table                                            the tables of all rows
    python benchmarks/eval_contexts.py --set-up [--model MODEL] [--dtype auto]          the set-up alone, printed

The SAEs are of one model and hook. Set-up times are seconds of one core (the process' own time), so that other work on
the machine does not count; --set-up prints seconds of the clock, with all cores, of a fresh set-up and of one from the
cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from csv_rows import append, cpu

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).parent / "results" / "eval_contexts.csv"
COLUMNS = (
    "date", "machine", "model", "words", "contexts", "seed", "core_seconds", "probe_f1", "sae", "fraction", "full",
)  # fmt: skip
DRAWS = ("each", 64)


def main() -> None:
    args = _arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.set_up:
        time_set_up(args)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch
    if not args.table:
        append(args.out, COLUMNS, measure(args))
    import pandas as pd

    print(tables(pd.read_csv(args.out)))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Set the eval up with each draw and seed, and evaluate every SAE with it."""
    import torch

    from sae_train import load_sae
    from sae_train.data.language_model import load_language_model
    from sae_train.evals import absorption, assets

    torch.set_num_threads(1)
    saes = {Path(path).name: load_sae(path) for path in args.saes}
    lm = load_language_model(args.model, args.hook or next(iter(saes.values())).cfg.hook_name)
    rows = []
    for seed in map(int, args.seeds.split(",")):
        for contexts in args.draws.split(","):
            contexts = contexts if contexts == "each" else int(contexts)
            start = time.process_time()
            built = assets.build(lm, n_words=args.eval_words, seed=seed, contexts=contexts)
            common = {
                "date": time.strftime("%Y-%m-%d"), "machine": cpu(), "model": Path(args.model).name,
                "words": len(built.words), "contexts": contexts, "seed": seed,
                "core_seconds": round(time.process_time() - start, 1),
                "probe_f1": round(float(built.probe_figures[:, 0].mean()), 4),
            }  # fmt: skip
            for name, sae in saes.items():
                found = absorption.evaluate(sae, built, seed=seed)
                rows.append(common | {"sae": name, "fraction": found.mean_fraction, "full": found.mean_full})
                print(rows[-1], flush=True)
    return rows


def time_set_up(args: argparse.Namespace) -> None:
    """Print how long the set-up of the eval takes, made anew and read from the cache."""
    from sae_train.data.language_model import load_language_model
    from sae_train.evals import assets
    from sae_train.runs.process import prepare_process

    prepare_process()  # as every run does
    lm = load_language_model(args.model, args.hook, dtype=args.dtype)
    with tempfile.TemporaryDirectory() as cache:
        for how in ("fresh", "from the cache"):
            start = time.perf_counter()
            built = assets.build(lm, n_words=args.eval_words, cache_dir=cache)
            print(f"{how}: {time.perf_counter() - start:.1f} s for {len(built.words):,} words", flush=True)
            if how == "fresh":
                print("  " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in built.seconds.items()))


def tables(data: pd.DataFrame) -> str:
    """Set-up times by model, and per SAE how far the draws lie apart beside how far eval seeds of `each` do."""
    data = data.drop_duplicates(["model", "words", "contexts", "seed", "sae"], keep="last").astype({"contexts": str})
    return "\n".join([*_set_up(data), "", *_scores(data)])


def _set_up(data: pd.DataFrame) -> list[str]:
    head = "| model | words | `each`, core seconds | 64, core seconds | probe F1, `each` | 64 |"
    lines = [head, "|---|---|---|---|---|---|"]
    for (model, words), some in data.groupby(["model", "words"], sort=False):
        means = some.groupby("contexts")[["core_seconds", "probe_f1"]].mean()
        times, f1 = ([means.loc[str(draw), name] for draw in DRAWS] for name in ("core_seconds", "probe_f1"))
        lines.append(f"| {model} | {words:,} | {times[0]:.1f} | {times[1]:.1f} | {f1[0]:.3f} | {f1[1]:.3f} |")
    return lines


def _scores(data: pd.DataFrame) -> list[str]:
    lines = [
        "| model, SAE | score | `each`, mean of n seeds | 64, mean | 64 minus `each`, 95 % | draws apart, same seed: "
        "mean (largest) | two seeds of `each` apart: mean (largest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, sae), some in data.groupby(["model", "sae"], sort=False):
        for score in ("fraction", "full"):
            each, shared = (some[some["contexts"] == str(draw)].set_index("seed")[score].dropna() for draw in DRAWS)
            shift = (shared - each).dropna()
            seeds = [abs(b - a) for a, b in combinations(each, 2)]
            apart = f"{shift.abs().mean():.4f} ({shift.abs().max():.4f}) | {mean(seeds):.4f} ({max(seeds):.4f})"
            means = " | ".join(f"{scores.mean():.4f} (n = {len(scores)})" for scores in (each, shared))
            lines.append(f"| {model}, {sae} | {score} | {means} | {_interval(shift)} | {apart} |")
    return lines


def _interval(differences: pd.Series) -> str:
    """Student's, over eval seeds."""
    from scipy import stats

    middle, error = differences.mean(), differences.sem()
    reach = stats.t.ppf(0.975, len(differences) - 1) * error
    return f"{middle:+.3f} [{middle - reach:+.3f}, {middle + reach:+.3f}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="*")
    parser.add_argument("--model", default="speller")
    parser.add_argument("--hook")
    parser.add_argument("--dtype", default="auto", help="of the language model, with --set-up")
    parser.add_argument("--eval-words", type=int)
    parser.add_argument("--seeds", default="0,1,2", help="eval seeds")
    parser.add_argument("--draws", default=",".join(map(str, DRAWS)), help="values of --eval-contexts")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--set-up", action="store_true", help="time the set-up alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not (args.table or args.set_up or args.saes):
        parser.error("name the folders of SAEs, or --table, or --set-up")
    return args


if __name__ == "__main__":
    main()
