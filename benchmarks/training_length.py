"""How an SAE's figures move with its training length: each length is a run of its own, with its own schedule, on the
same text, seed and activation cache.

    python benchmarks/training_length.py --model smollm2 --dataset english_mix.parquet --out checkpoints/length

By default topk and jumprelu, 4k latents, L0 32 and 128, from 250k to 4M tokens. Runs that are finished are not made
again, and an interrupted one is gone on with. It prints Markdown and writes rows to
benchmarks/results/training_length.csv, with the columns of absorption_grid.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absorption_grid import COLUMNS, row
from csv_rows import append

if TYPE_CHECKING:
    from sae_train import Run

RESULTS = Path(__file__).resolve().parent / "results" / "training_length.csv"
BATCH_TOKENS = 2048  # 122 steps for the shortest
HEADER = "| | tokens | L0 | EV | loss recovered | dead | mean F1 | fraction (random SAE's) | full (random SAE's) |"


def main() -> None:
    args = _arguments()
    runs = [trained(args, tokens) for tokens in args.tokens.split(",")]
    rows = [row(sae, run.info, None) for run in runs for sae in run.info["saes"] if not sae["failed"]]
    print(table(rows))
    args.results.unlink(missing_ok=True)
    append(args.results, COLUMNS, rows)


def trained(args: argparse.Namespace, tokens: str) -> Run:
    """The run of one length, as it lies in the folder, gone on with or made."""
    from sae_train import Run, resume, train

    folder = args.out / tokens
    if folder.exists():
        return Run(folder) if (folder / "report.html").exists() else resume(folder)
    given = {name: value for name in ("model", "hook", "dataset") if (value := getattr(args, name)) is not None}
    return train(
        **given, arch=args.arch, width=args.width, l0=args.l0, seed=args.seed, tokens=tokens, name=tokens,
        batch_tokens=BATCH_TOKENS, absorption_evals=1, out=str(args.out),
        activation_cache=str(args.out / "activations"),
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: an SAE's lengths stand under one another."""
    ordered = sorted(rows, key=lambda it: (it["arch"], it["width"], it["l0_asked"], it["seed"], it["tokens"]))
    return "\n".join([HEADER, "|" + "---|" * (HEADER.count("|") - 1), *map(_line, ordered)])


def _line(it: dict[str, Any]) -> str:
    recovered = "–" if it["loss_recovered"] is None else f"{it['loss_recovered']:.3f}"
    f1 = "–" if it["mean_f1"] is None else f"{it['mean_f1']:.2f}"
    cells = [
        it["sae"], f"{it['tokens']:,}", f"{it['l0']:.2f}", f"{it['ev']:.3f}", recovered, f"{100 * it['dead']:.0f} %",
        f1, *(_score(it, score) for score in ("fraction", "full")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _score(it: dict[str, Any], score: str) -> str:
    if it[score] is None:
        return "–"
    random = it[f"random_{score}"]
    beside = "" if random is None else f" ({random:.3f})"
    return f"{it[score]:.3f} [{it[f'{score}_low']:.3f}, {it[f'{score}_high']:.3f}]{beside}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("model", "speller"), ("hook", None), ("dataset", None), ("arch", "topk,jumprelu"), ("width", "4k"),
        ("l0", "32,128"), ("seed", "0"), ("tokens", "250k,500k,1M,2M,4M"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/length"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
