"""Studies of one design that were trained in parts, on several machines say, as one: its claims from their tables.

    python benchmarks/pool_studies.py STUDY... --out FOLDER

Each STUDY is the folder that `sae-train study` wrote; `saes.csv` and `letters.csv` of it are enough, with `study.json`
for the settings, which have to be the same in all. FOLDER then holds the page and the tables of all SAEs together, so
that it can be pooled in its turn. Of an SAE that several have, the first one's counts. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from sae_train.report.data import Run, TrainedSAE
from sae_train.report.study import LETTER_METRICS, read_study
from sae_train.report.study_files import BESIDE, write_tables

KEY = ["arch", "width", "l0", "seed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = [settings_of(folder) for folder in args.studies]
    if other := differing(settings):
        print(f"pool_studies: the studies differ in {', '.join(other)}: pool those of one design", file=sys.stderr)
        return 2
    saes, letters = (
        pd.concat([pd.read_csv(folder / name) for folder in args.studies], ignore_index=True)
        for name in ("saes.csv", "letters.csv")
    )
    saes, letters = saes.drop_duplicates(KEY), letters.drop_duplicates([*KEY, "letter"])
    of = {key: rows for key, rows in letters.groupby(KEY)}
    run = Run(args.out, args.out.name, {"settings": settings[0]}, [])
    run.saes.extend(trained(row, of, run.name) for row in saes.sort_values(KEY).to_dict("records"))
    args.out.mkdir(parents=True, exist_ok=True)
    page, found = write_tables(read_study([run]), args.out)
    print("\n".join([*found, f"{len(run.saes)} SAEs: {page}"]))
    return 0


def settings_of(study: Path) -> dict[str, Any]:
    """What all SAEs of a study share; of its text the name alone."""
    settings = json.loads((study / "study.json").read_text())["settings"]
    return settings | {"dataset": Path(settings["dataset"]).name}


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """The names of settings that are not the same in all."""
    return sorted({name for each in settings for name in each if each[name] != settings[0].get(name)})


def trained(row: dict[str, Any], of: dict[tuple, pd.DataFrame], run: str) -> TrainedSAE:
    """An SAE from its rows of the tables."""
    row = {name: None if pd.isna(value) else value for name, value in row.items()}
    own = of.get(tuple(row[name] for name in KEY))
    letters = [] if own is None else own.reindex(columns=["letter", *LETTER_METRICS]).to_dict("records")
    scores = {f"absorption/{name}": value for name, value in row.items() if name.startswith("mean_")}
    return TrainedSAE(
        **{name: row[name] for name in ("name", *KEY)},
        label=row["name"],
        run=run,
        failed=row["left_out"],
        invalid=None,
        final=scores | {metric: row[name] for name, metric in BESIDE.items()},
        baselines={"random_words": {f"mean_{score}": row[f"random_{score}"] for score in ("full", "fraction")}},
        history=[],
        letters=[{"step": 0, "counts": True} | letter for letter in letters],
        words=[],
    )


if __name__ == "__main__":
    sys.exit(main())
