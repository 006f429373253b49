"""Is the absorption metric right? Its scores on the letter toy, held against what the planted dictionary says.

    python benchmarks/metric_truth.py --runs checkpoints/metric_truth

The script trains SAEs (three architectures × two widths × two L0 × three seeds; finished runs are reused), builds
some by hand whose absorption is known, and puts all through the first-letter eval with the toy's parents as letters:
ranking, k-sparse probes and scores are those of `sae-train eval`; the probe is the true direction, and the answer is
read by a linear map of the word in place of a language model. It prints Markdown and writes
benchmarks/results/metric_*.csv: correlations of each score with the truth (over SAEs, over words), precision and
recall as each threshold moves, and the scores of SAEs built by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agreement as ag
import pandas as pd
import planted
import torch
from toy_scores import COUNTS, HALF, Bench, make_bench, measure

from sae_train.data.toy import held_out_sample
from sae_train.evals.baselines import random_sae
from sae_train.evals.latents import from_dense
from sae_train.files import read_json
from sae_train.runs.run import Run, train

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_train.protocols import SAE

RESULTS = Path(__file__).resolve().parent / "results"
ARCHS, WIDTHS, TARGETS, SEEDS = ("topk", "matryoshka", "jumprelu"), (64, 256), (2, 4), (0, 1, 2)
TOKENS, BATCH = 64_000, 128
RANDOM_WIDTHS = (64, 512)
SCORES = ("full", "fraction", "full_family", "fraction_family", "causal")


def main() -> None:
    args = _arguments()
    bench = make_bench()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.part or ("built", "trained"):
        tables = {"built": built_scores(bench)} if part == "built" else trained_tables(bench, args.runs, args.arch)
        for name, table in tables.items():
            table.to_csv(args.out / f"metric_{name}.csv", index=False, float_format="%.4f")
            print(f"\n{name}\n\n{markdown(table)}" if name != "toy_saes" else "")


def trained_tables(bench: Bench, runs: Path, archs: Sequence[str] | None) -> dict[str, pd.DataFrame]:
    measured = [measure(bench, sae, about) for about, sae in trained_saes(runs, archs or ARCHS)]
    scores, curves = (pd.concat(tables, ignore_index=True) for tables in zip(*measured, strict=True))
    return {
        "toy_saes": by_sae(scores), "agreement": agreement_table(scores), "thresholds": threshold_table(curves),
    }  # fmt: skip


def trained_saes(folder: Path, archs: Sequence[str]) -> list[tuple[dict[str, Any], SAE]]:
    """Train all SAEs, one run an architecture, or read the runs where they are finished."""
    found = []
    for arch in archs:
        path = folder / f"toy-{arch}"
        finished = (path / "run.json").exists() and read_json(path / "run.json").get("status") == "finished"
        run = Run(path) if finished else train(
            model="toy", arch=arch, width=list(WIDTHS), l0=list(TARGETS), seed=list(SEEDS), absorption_evals=1,
            tokens=TOKENS, batch_tokens=BATCH, name=path.name, out=str(folder),
        )  # fmt: skip
        found += [
            ({key: sae[key] for key in ("name", "arch", "width", "l0", "seed")}, run.saes[sae["name"]])
            for sae in run.info["saes"]
        ]
    return found


def by_sae(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over each SAE's words: its scores beside the share that is absorbed in truth."""
    columns = [*SCORES, "absorbed", "gap", "own_silent", "n_main"]
    return scores.groupby(["arch", "width", "l0", "seed"], sort=False)[columns].mean().reset_index()


def agreement_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Correlations of each score with the truth: over SAEs (drawn: cells of the grid × seeds), over words (SAEs ×
    parents), and precision and recall of a word's flag."""
    saes = by_sae(scores)
    cell = ag.clusters(list(zip(saes["arch"], saes["width"], saes["l0"], strict=True)))
    seed, sae, parent = ag.clusters(list(saes["seed"])), ag.clusters(list(scores["name"])), _long(scores["parent"])
    absorbed, gap = _floats(scores["absorbed"]), _floats(scores["gap"])
    rows = []
    for score in SCORES:
        mean, value = _floats(saes[score]), _floats(scores[score])
        flagged = ag.cluster_sums(ag.hits(value >= HALF, absorbed), sae, parent)
        truth = _floats(saes["absorbed"])
        found = {
            "saes, Spearman": ag.correlation(mean, truth, cell, seed, by_rank=True),
            "saes, Pearson": ag.correlation(mean, truth, cell, seed),
            "saes, Spearman minus full's": ag.correlation_gap(_floats(saes["full"]), mean, truth, cell, seed),
            "words, Spearman": ag.correlation(value, gap, sae, parent, by_rank=True),
            "words, Pearson": ag.correlation(value, gap, sae, parent),
            "words, precision": ag.two_way(flagged, ag.precision),
            "words, recall": ag.two_way(flagged, ag.recall),
            "mean": ag.mean(value, sae, parent),
            "mean truth": ag.mean(absorbed, sae, parent),
        }
        rows += [{"score": score, "measure": name, **vars(it)} for name, it in found.items()]
    return pd.DataFrame(rows)


def threshold_table(curves: pd.DataFrame) -> pd.DataFrame:
    """Precision, recall and F1 of "absorbed" at each value of each threshold, over all SAEs' words."""
    rows = []
    for (threshold, value), part in curves.groupby(["threshold", "value"], sort=False):
        sums = ag.cluster_sums(
            torch.tensor(part[[*COUNTS]].to_numpy()), ag.clusters(list(part["name"])), _long(part["parent"])
        )
        found = {"precision": ag.precision, "recall": ag.recall, "f1": ag.f1, "false_rate": ag.false_rate}
        for name, statistic in found.items():
            rows.append({"threshold": threshold, "value": value, "measure": name, **vars(ag.two_way(sums, statistic))})
    return pd.DataFrame(rows)


def built_scores(bench: Bench) -> pd.DataFrame:
    """Scores of SAEs built by hand, three seeds each, and of random SAEs: what is seen where the answer is known."""
    rows, x = [], held_out_sample(bench.toy, 4096).x
    names = list(planted.built_saes(bench.toy, bench.rendered, 0))
    for name in [*names, *(f"random SAE, {w} latents, L0 4" for w in RANDOM_WIDTHS)]:
        parts = []
        for seed in SEEDS:
            if name in names:
                sae = planted.built_saes(bench.toy, bench.rendered, seed)[name]()
                latents = from_dense(sae.latents)
            else:
                like = planted.Built(torch.zeros(int(name.split()[2]), bench.toy.d_in), torch.empty(0))
                sae, latents = random_sae(like, x, l0=4.0, seed=seed), None
            parts.append(measure(bench, sae, {"name": f"{name} {seed}", "seed": seed}, latents)[0])
        table = pd.concat(parts, ignore_index=True)
        seeds, parent = _long(table["seed"]), _long(table["parent"])
        for score in ("absorbed", "gap", "n_main", *SCORES):
            rows.append({"sae": name, "score": score, **vars(ag.mean(_floats(table[score]), seeds, parent))})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """One line per key, one column per measure."""
    measure = "measure" if "measure" in table else "score"
    keys = [c for c in table.columns if c not in (measure, "mean", "low", "high", "visible")]
    kinds = list(dict.fromkeys(table[measure]))
    lines = [f"| {' | '.join([*keys, *kinds])} |", "|" + "---|" * (len(keys) + len(kinds))]
    for key, part in table.groupby(keys, sort=False):
        cells = {row[measure]: ag.shown(ag.Interval(row["mean"], row["low"], row["high"], row["visible"]))
                 for _, row in part.iterrows()}  # fmt: skip
        key = key if isinstance(key, tuple) else (key,)
        lines.append(f"| {' | '.join([*map(str, key), *(cells.get(kind, '–') for kind in kinds)])} |")
    return "\n".join(lines)


def _floats(column: pd.Series) -> Float[Tensor, " n"]:
    return torch.tensor(column.to_numpy(dtype=float))


def _long(column: pd.Series) -> Int[Tensor, " n"]:
    return torch.tensor(column.to_numpy(dtype=int))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("checkpoints/metric_truth"), help="where the SAEs are, or go")
    parser.add_argument("--part", action="append", choices=("built", "trained"), help="one part alone")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="one architecture alone; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
