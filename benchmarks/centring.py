"""Does it help to subtract the mean activation? The same SAEs, trained with and without, on a language model.

    python benchmarks/centring.py --model smollm2 --hook blocks.8.hook_resid_post --dataset TEXT --dtype bfloat16

Each side is one run of a grid of architectures and seeds, without the absorption eval. A row an SAE is added to a CSV
file; `--table` prints the means over seeds of all that it holds. Some minutes on two CPU cores for each model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from csv_rows import append, machine

from sae_train.files import read_json

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {  # in run.json, and how the table writes them
    "silent": ("sparsity/silent_fraction", ".1%"),
    "dead": ("sparsity/dead_fraction", ".1%"),
    "l0": ("metrics/l0", ".1f"),
    "ev": ("metrics/explained_variance", ".4f"),
    "loss_recovered": ("metrics/ce_loss_score", ".4f"),
}
KEYS = ["model", "hook", "tokens", "width", "l0_asked", "arch", "center"]
COLUMNS = [*KEYS, "seed", *FIGURES, "median_norm", "left_out", "machine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("model", "smollm2"), ("hook", None), ("dataset", None), ("dtype", "float32"), ("arch", "topk,jumprelu"),
        ("width", "4k"), ("l0", "50"), ("seed", "0,1"), ("tokens", "200k"), ("batch-tokens", "1024"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "centring.csv")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    args = parser.parse_args()
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "table") and value}
    for center in () if args.table else (False, True):
        append(args.out, COLUMNS, rows(flags, center))
    print(table(args.out))


def rows(flags: dict[str, str], center: bool) -> list[dict[str, Any]]:
    """Train one side; return a row for each SAE."""
    with tempfile.TemporaryDirectory() as out:
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        fixed = ["--no-absorption", "--absorption-evals", "1", "--device", "cpu", "--out", out, "--name", "run"]
        command = [sys.executable, "-m", "sae_train", *words, *fixed, *(["--center"] if center else [])]
        subprocess.run(command, check=True)
        info = read_json(Path(out) / "run" / "run.json")
    about = {
        "model": Path(info["settings"]["model"]).name, "hook": info["hook_name"], "tokens": info["tokens"],
        "center": "on" if center else "off", "machine": machine("cpu"),
        "median_norm": info["outliers"]["median_norm"], "left_out": info["outliers"]["trained"],
    }  # fmt: skip
    return [
        about
        | {"arch": sae["arch"], "width": sae["width"], "l0_asked": sae["l0"], "seed": sae["seed"]}
        | {name: sae["final"][key] for name, (key, _) in FIGURES.items()}
        for sae in info["saes"]
    ]


def table(path: Path) -> str:
    """The means over seeds, one side below the other."""
    import pandas as pd

    means = pd.read_csv(path).groupby(KEYS, sort=False)[list(FIGURES)].mean().reset_index()
    means = means.sort_values(["model", "arch", "center"], ascending=[False, False, True])
    head = ["model", "arch", "center", *FIGURES]
    lines = [head, ["---"] * len(head)]
    for row in means.to_dict("records"):
        figures = [f"{row[name]:{form}}" for name, (_, form) in FIGURES.items()]
        lines.append([row["model"], row["arch"], row["center"], *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
