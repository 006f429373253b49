"""How SAEs move with their training length: studies of one design that differ in their tokens alone.

    python benchmarks/training_length.py --design configs/study_length.yaml --out checkpoints/length
    python benchmarks/training_length.py                                # what was found here; trains nothing

Each length is a study of its own below --out, with its own schedule, on one cache of activations; what is finished is
not made again, and an interrupted study goes on. `--made STUDY...` adds lengths that are there. The tables of all
lengths, `saes.csv` and `letters.csv`, are kept in --tables, and all that is printed is made from them: the figures of
each length; the longest minus the shortest and minus the one before it; the highest L0 minus the lowest at each length.
Differences are paired over letters, with a 95 % interval over letters and seeds and the smallest that would be seen.
Kept are SAEs whose training seed is there at every length: where one length has one seed, one of each is left.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import torch
import yaml
from pool_studies import differing, settings_of

from sae_train.config.merge import read_yaml
from sae_train.config.units import width_label
from sae_train.errors import UserError
from sae_train.evals.intervals import paired_difference
from sae_train.files import write_text
from sae_train.report.matched import SEEDS_ASKED
from sae_train.report.text import plural
from sae_train.runs.study import run_study

TABLES = Path(__file__).resolve().parent / "results" / "training_length"
FILES = ("saes", "letters")
CELL = ["arch", "width", "l0"]
ABOUT = {"l0_reached": 2, "explained_variance": 3, "loss_recovered": 3, "dead": 3}
SCORES = ("f1_k1", "precision_main", "recall_main", "full", "full_beyond", "fraction", "n_split")


def main() -> int:
    args = _arguments()
    try:
        studies = [trained(args, tokens) for tokens in args.tokens.split(",")] if args.design else []
        if studies := [*studies, *args.made]:
            keep(studies, args.tables)
        saes, letters = (pd.read_csv(args.tables / f"{name}.csv") for name in FILES)
    except (UserError, OSError) as error:
        print(f"training_length: {error}", file=sys.stderr)
        return 2
    print(figures(saes, letters))
    print(by_tokens(letters))
    print(by_l0(letters))
    return 0


def trained(args: argparse.Namespace, tokens: str) -> Path:
    """The study of one length."""
    args.out.mkdir(parents=True, exist_ok=True)
    file, folder = args.out / f"{tokens}.yaml", args.out / tokens
    design = read_yaml(args.design)
    write_text(file, yaml.safe_dump(design | {"tokens": tokens, "activation_cache": str(args.out / "activations")}))
    run_study(file, folder)
    return folder


def keep(studies: list[Path], tables: Path) -> None:
    """Write the tables of all lengths; UserError if the studies differ in more than tokens."""
    settings = [settings_of(study) for study in studies]
    if other := [name for name in differing(settings) if name != "tokens"]:
        raise UserError(f"the studies differ in {', '.join(other)}: only their tokens may differ")
    if twice := {own["tokens"] for own in settings if [each["tokens"] for each in settings].count(own["tokens"]) > 1}:
        raise UserError(
            f"two studies have {', '.join(map(str, sorted(twice)))} tokens: pool them by pool_studies.py first"
        )
    saes, letters = (
        pd.concat(
            [
                pd.read_csv(study / f"{name}.csv").assign(tokens=own["tokens"])
                for study, own in zip(studies, settings, strict=True)
            ],
            ignore_index=True,
        )
        for name in FILES
    )
    scored = letters[[*CELL, "tokens", "seed"]].drop_duplicates()
    saes = _of_every_length(saes[saes["left_out"].isna()].merge(scored), len(studies))
    if saes.empty:
        raise UserError("no SAE of one architecture, width, L0 and training seed is there at every length")
    write_text(tables / "saes.csv", saes.to_csv(index=False))
    write_text(tables / "letters.csv", _of(saes, letters).to_csv(index=False))


def _of_every_length(saes: pd.DataFrame, n_lengths: int) -> pd.DataFrame:
    """SAEs of which architecture, width, L0 and training seed are there at every length."""
    lengths = saes.groupby([*CELL, "seed"])["tokens"].transform("nunique")
    return saes[lengths == n_lengths].sort_values([*CELL, "tokens", "seed"])


def _of(saes: pd.DataFrame, letters: pd.DataFrame) -> pd.DataFrame:
    """The letters of these SAEs."""
    key = [*CELL, "tokens", "seed"]
    return letters.merge(saes[key], on=key).sort_values(key, kind="stable")


def figures(saes: pd.DataFrame, letters: pd.DataFrame) -> str:
    """Markdown: means over seeds; an SAE's lengths stand under one another."""
    beside = saes.groupby([*CELL, "tokens"])[list(ABOUT)].mean()
    scores = letters.groupby([*CELL, "tokens"])[list(SCORES)].mean()
    seeds = saes.groupby([*CELL, "tokens"])["seed"].nunique()
    lines = [_row("", "tokens", "seeds", *ABOUT, *SCORES), _row(*["---"] * (3 + len(ABOUT) + len(SCORES)))]
    for key in beside.index:
        cells = [f"{beside.loc[key, name]:.{digits}f}" for name, digits in ABOUT.items()]
        cells += [f"{scores.loc[key, name]:.3f}" for name in SCORES]
        lines.append(_row(_name(key[:3]), f"{key[3]:,}", str(seeds[key]), *cells))
    return "\n".join([*lines, ""])


def by_tokens(letters: pd.DataFrame) -> str:
    """Markdown: the longest against the shortest and against the one before it, of each SAE and of their mean."""
    lengths = sorted(letters["tokens"].unique())
    pairs = dict.fromkeys((first, lengths[-1]) for first in (lengths[0], *lengths[-2:-1]) if first < lengths[-1])
    own = {_name(key): rows for key, rows in letters.groupby(CELL)}
    own |= {f"{arch}, mean": rows for arch, rows in letters.groupby("arch")} if len(own) > 1 else {}
    lines = [_row("", "tokens", *SCORES), _row(*["---"] * (2 + len(SCORES)))]
    for (name, rows), (first, last) in product(own.items(), pairs):
        cells = [_difference(rows, score, "tokens", first, last) for score in SCORES]
        lines.append(_row(name, f"{last:,} minus {first:,}", *cells))
    return "\n".join([*lines, ""])


def by_l0(letters: pd.DataFrame) -> str:
    """Markdown: the highest against the lowest L0 of each architecture and width, length by length."""
    lines = [_row("", "tokens", "L0", *SCORES), _row(*["---"] * (3 + len(SCORES)))]
    for (arch, width, tokens), rows in letters.groupby(["arch", "width", "tokens"]):
        low, high = rows["l0"].min(), rows["l0"].max()
        if high > low:
            cells = [_difference(rows, score, "l0", low, high) for score in SCORES]
            lines.append(_row(f"{arch}, {width_label(width)}", f"{tokens:,}", f"{high:g} minus {low:g}", *cells))
    return "\n".join(lines)


def _difference(rows: pd.DataFrame, score: str, trait: str, first: float, last: float) -> str:
    """A score at the last value of a trait minus the first: means over SAEs, of the letters that all have at both."""
    others = [name for name in (*CELL, "tokens") if name != trait]
    table = rows.pivot(index=[trait, "seed"], columns=["letter", *others], values=score)
    both = [_whole(table.loc[value], others) for value in (last, first)]
    if not all(map(len, both)):
        return "–"
    complete = pd.concat(both).notna().all().groupby(level="letter").all()
    sides = [side.T.groupby(level="letter").mean()[complete].T.to_numpy(copy=True) for side in both]
    found, n_seeds = paired_difference(*map(torch.from_numpy, sides)), min(map(len, sides))
    few = f", {plural(n_seeds, 'seed')}: too few for a claim" if n_seeds < SEEDS_ASKED else ""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], visible {found.visible:.3f}{few}"


def _whole(side: pd.DataFrame, others: list[str]) -> pd.DataFrame:
    """The training seeds of which no SAE is missing, as one that failed is."""
    return side[side.T.groupby(level=others).count().gt(0).all()]


def _name(key: tuple) -> str:
    arch, width, l0 = key
    return f"{arch}, {width_label(width)}, L0 {l0:g}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", type=Path, help="of a study, as `sae-train study --config` takes it")
    parser.add_argument("--tokens", default="250k,500k,1M,2M,4M", help="the lengths to train")
    parser.add_argument("--made", nargs="*", type=Path, default=[], metavar="STUDY", help="lengths that are there")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/length"))
    parser.add_argument("--tables", type=Path, default=TABLES)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
