"""When absorption happens: in which order words go, whether splitting comes first, how old an absorber is.

    sae-train --arch topk --width 2k --l0 8 --seed 0,1,2 --tokens 200k --batch-tokens 1024 \\
        --absorption-evals 40 --name when
    python benchmarks/absorption_events.py checkpoints/when

Runs on one model and text, several seeds each, are read: their trajectories, their letters at every look, and the text
that they were trained on, whose tokens are counted. Each architecture, width and L0 is a cell; intervals draw its
letters and its seeds with replacement. It prints Markdown and writes benchmarks/results/absorption_events.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agreement as ag
import numpy as np
import pandas as pd
import torch

from sae_train.errors import UserError
from sae_train.evals.events import NEVER
from sae_train.runs.run import Run

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_train.evals.intervals import Interval

RESULTS = Path(__file__).resolve().parent / "results" / "absorption_events.csv"
LATE = 0.1  # of the training: words that are taken before are taken early
MEASURES = {
    "absorbed": "share of words absorbed at the end",
    "kept": "of the words carried at half of the training, share carried at the end",
    "recovered": "of the words carried at half of the training, share recalled at the end",
    "taken": "when an absorbed word was taken for good, as a share of the training",
    "early": "share of absorbed words taken within the first tenth",
    "never_recalled": "share of absorbed words that no main latent recalled at any look",
    "order": "Spearman's correlation of a word's log frequency with when it was taken",
    "rarer": "log10 frequency of absorbed words minus that of the letter's other words",
    "chosen_anew": "share of takeovers at whose look the letter has other main latents than before",
    "before": "of the others, share whose absorber was there (on any word) before the word fell silent",
    "lived": "how long the absorber was there before it took the word for good, share of the training",
    "lived_here": "the same, from when it was the strongest other latent on this word",
    "splits": "share of letters with more than one main latent at the end",
    "absorbs": "share of letters with an absorbed word at the end",
    "both": "share of letters with both",
    "split_first": "of those, split at an earlier look than the first word was taken",
    "split_same": "of those, at the same look",
    "split_after": "of those, split later",
}


def main() -> int:
    args = _arguments()
    try:
        table = pd.DataFrame(measured(args.runs, args.text_tokens))
    except UserError as error:
        print(f"absorption_events: {error}", file=sys.stderr)
        return 2
    print(markdown(table))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format="%.4f")
    return 0


def measured(runs: Sequence[Path], text_tokens: int) -> list[dict[str, Any]]:
    """A row for each cell and measure; UserError for runs that cannot be read together."""
    parts: dict[str, list[tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]] = {}
    for run in map(Run, runs):
        frequency = count_tokens(run, text_tokens)
        trajectory, letters, names = read(run)
        for cell, saes in cells(run):
            own = [table[table["sae"].isin(saes)] for table in (trajectory, letters, names)]
            own[0] = own[0].assign(frequency=own[0]["token_id"].map(frequency))
            parts.setdefault(cell, []).append(tuple(t.assign(sae=f"{run.path}/" + t["sae"].astype(str)) for t in own))
    rows = []
    for cell, of_runs in parts.items():
        tables = [pd.concat(each, ignore_index=True) for each in zip(*of_runs, strict=True)]
        looks = {tuple(sorted(own[0]["step"].unique())) for own in of_runs}
        if len(looks) > 1:
            raise UserError(f"runs with {cell} have looks at other steps: give those of one length and number of looks")
        n = tables[0]["sae"].nunique()
        rows += [{"cell": cell, "seeds": n, "measure": name, **vars(it)} for name, it in measure(*tables)]
    return rows


def cells(run: Run) -> Iterator[tuple[str, list[str]]]:
    """SAEs of a run that differ in their seed only, without those that failed or have no valid score."""
    grouped: dict[str, list[str]] = {}
    for sae in run.info["saes"]:
        if sae["written"] and not sae["failed"] and sae["final"].get("absorption/valid", True):
            grouped.setdefault(f"{sae['arch']}, {sae['width']} latents, L0 {sae['l0']:g}", []).append(sae["name"])
    yield from grouped.items()


def read(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The run's trajectory of words, its letters by look, and its event log."""
    events = run.events()
    trajectory = pd.read_parquet(run.path / "trajectory.parquet")
    table = pd.read_parquet(run.path / "absorption.parquet")
    letters = table[(table["level"] == "letter") & (table["step"] > 0)]
    trajectory = trajectory[trajectory["step"] > 0]
    if trajectory["step"].nunique() < 3:
        raise UserError(f"the run {str(run.path)!r} has fewer than three looks: give it more by --absorption-evals")
    return trajectory, letters, events


def count_tokens(run: Run, n_tokens: int) -> pd.Series:
    """log10 of how often each token is in the first so many tokens of the run's text, one added to each count."""
    from sae_train.config import resolve
    from sae_train.data.sources import kind_of
    from sae_train.data.text_source import open_text
    from sae_train.training.ranks import choose_device, current

    settings = resolve(run.info["settings"])
    lm = kind_of(settings).language_model(settings, choose_device("cpu"))
    stream, counts, seen = open_text(lm, settings, current()).stream, np.zeros(len(lm.tokenizer), dtype=np.int64), 0
    while seen < n_tokens and not stream.epoch:
        rows = next(stream).numpy()
        counts += np.bincount(rows.ravel(), minlength=len(counts))
        seen += rows.size
    return pd.Series(np.log10(counts + 1.0))


def measure(
    trajectory: pd.DataFrame, letters: pd.DataFrame, events: pd.DataFrame
) -> Iterator[tuple[str, Interval]]:  # fmt: skip
    """Every measure of one cell with its interval, by the names of MEASURES."""
    steps = np.sort(trajectory["step"].unique())
    yield from _of_words(trajectory, steps)
    log = events[events["sae"].isin(trajectory["sae"].unique())]
    yield from _of_takeovers(add_births(log, trajectory), trajectory, letters, steps)
    yield from _of_letters(letters, log)


def _of_words(trajectory: pd.DataFrame, steps: np.ndarray) -> Iterator[tuple[str, Interval]]:
    last = trajectory[trajectory["step"] == steps[-1]]
    yield "absorbed", _mean(last, last["outcome"] == "carried")
    half = trajectory[trajectory["step"] == steps[np.searchsorted(steps, steps[-1] / 2)]]
    key = ["sae", "letter", "word", "token_id"]
    both = half[half["outcome"] == "carried"].merge(last[[*key, "outcome"]], on=key, suffixes=("", "_last"))
    yield "kept", _mean(both, both["outcome_last"] == "carried")
    yield "recovered", _mean(both, both["outcome_last"] == "recalled")
    yield "rarer", rarer(last)


def rarer(last: pd.DataFrame) -> Interval:
    """Log frequency of absorbed words, from their letter's mean over its other words in the same SAE."""
    others = last[last["outcome"] != "carried"].groupby(["sae", "letter"], observed=True)["frequency"].mean()
    own = last[last["outcome"] == "carried"].join(others.rename("others"), on=["sae", "letter"])
    return _mean(own, own["frequency"] - own["others"])


def add_births(log: pd.DataFrame, trajectory: pd.DataFrame) -> pd.DataFrame:
    """Add the look at which each absorber first was the strongest other latent of a word, and the word's frequency."""
    born = trajectory.groupby(["sae", "absorber"], observed=True)["step"].min().rename("born_step")
    frequency = trajectory.drop_duplicates(["letter", "word"]).set_index(["letter", "word"])["frequency"]
    return log.join(born, on=["sae", "absorber"]).join(frequency, on=["letter", "word"])


def _of_takeovers(
    log: pd.DataFrame, trajectory: pd.DataFrame, letters: pd.DataFrame, steps: np.ndarray
) -> Iterator[tuple[str, Interval]]:  # fmt: skip
    log = log[log["taken_step"] != NEVER]
    end = steps[-1]
    yield "taken", _mean(log, log["taken_step"] / end)
    yield "early", _mean(log, log["taken_step"] <= LATE * end)
    yield "never_recalled", _mean(log, log["recalled_step"] == NEVER)
    known = log[log["frequency"].notna()]
    yield "order", ag.correlation(
        _floats(known["frequency"]), _floats(known["taken_step"]), ag.clusters(list(known["sae"])),
        ag.clusters(list(known["letter"])), by_rank=True,
    )  # fmt: skip
    yield "chosen_anew", _mean(log, chosen_anew(log, letters, steps))
    fell = log[log["recalled_step"] != NEVER]  # the others were silent from the first look on: nothing is before it
    yield "before", _mean(fell, fell["born_step"] < fell["silent_step"])
    yield "lived", _mean(log, (log["taken_step"] - log["born_step"]) / end)
    yield "lived_here", _mean(log, (log["taken_step"] - log["first_step"]) / end)


def chosen_anew(log: pd.DataFrame, letters: pd.DataFrame, steps: np.ndarray) -> pd.Series:
    """Whether a letter's main latents at the look of a takeover differ from those one look before; NaN at the first."""
    rows = zip(letters["sae"], letters["letter"], letters["step"], letters["main_latents"], strict=True)
    mains = {(sae, letter, step): frozenset(latents) for sae, letter, step, latents in rows}
    before = dict(zip(steps[1:], steps[:-1], strict=True))

    def differs(sae: str, letter: str, step: int) -> float:
        if step not in before:
            return float("nan")
        return float(mains[sae, letter, step] != mains[sae, letter, before[step]])

    found = [differs(*row) for row in zip(log["sae"], log["letter"], log["taken_step"], strict=True)]
    return pd.Series(found, index=log.index, dtype=float)


def _of_letters(letters: pd.DataFrame, log: pd.DataFrame) -> Iterator[tuple[str, Interval]]:
    table = split_and_absorb(letters, log)
    splits, absorbs = table["split_step"] != NEVER, table["taken_step"] != NEVER
    yield "splits", _mean(table, splits)
    yield "absorbs", _mean(table, absorbs)
    yield "both", _mean(table, splits & absorbs)
    both = table[splits & absorbs]
    yield "split_first", _mean(both, both["split_step"] < both["taken_step"])
    yield "split_same", _mean(both, both["split_step"] == both["taken_step"])
    yield "split_after", _mean(both, both["split_step"] > both["taken_step"])


def split_and_absorb(letters: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    """Per SAE and letter that counts: the first of the unbroken looks, up to the last one, with more than one main
    latent, and the first at which a word was taken for good; −1 for never."""
    first = log[log["taken_step"] != NEVER].groupby(["sae", "letter"], observed=True)["taken_step"].min()
    rows = []
    for (sae, letter), part in letters[letters["counts"].astype(bool)].groupby(["sae", "letter"], observed=True):
        part = part.sort_values("step")
        flags = (part["n_split"] > 1).to_numpy()
        n = int(np.cumprod(flags[::-1]).sum())
        split = int(part["step"].iloc[len(part) - n]) if n else NEVER
        rows.append((sae, letter, split, int(first.get((sae, letter), NEVER))))
    return pd.DataFrame(rows, columns=["sae", "letter", "split_step", "taken_step"])


def _mean(table: pd.DataFrame, values: pd.Series) -> Interval:
    """Mean over a table's rows; its SAEs (seeds) and its letters are drawn."""
    return ag.mean(_floats(values), ag.clusters(list(table["sae"])), ag.clusters(list(table["letter"])))


def _floats(values: pd.Series) -> Float[torch.Tensor, " n"]:
    return torch.tensor(values.to_numpy(dtype=float))


def markdown(table: pd.DataFrame) -> str:
    """One line a measure, one column a cell."""
    names = list(dict.fromkeys(table["cell"]))
    lines = [f"| | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for measure, part in table.groupby("measure", sort=False):
        rows = {
            row["cell"]: ag.Interval(*(row[k] for k in ("mean", "low", "high", "visible")))
            for _, row in part.iterrows()
        }
        lines.append(f"| {MEASURES[measure]} | {' | '.join(ag.shown(rows[name]) for name in names)} |")
    return "\n".join(lines)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--text-tokens", type=int, default=1_000_000, help="of the text, to count words in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
