"""Studies of one design that were trained in parts, on several machines say, as one: its claims from their tables.

    python benchmarks/pool_studies.py STUDY... --out FOLDER

Each STUDY is the folder that `sae-train study` wrote; `saes.csv` and `letters.csv` of it are enough, with `study.json`
for the settings, which have to be the same in all. FOLDER then holds the page and the tables of all SAEs together, so
that it can be pooled in its turn. Of an SAE that several have, the first one's counts that has letters and was not left
out. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from sae_train.errors import UserError
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.study import LETTER_METRICS, read_study
from sae_train.report.study_files import BESIDE, write_tables
from sae_train.runs.display import aside

KEY = ["arch", "width", "l0", "seed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        with aside() as display:
            display(f"comparing the SAEs of {', '.join(study.name for study in args.studies)}")
            page, found, n_saes = pooled(args.studies, args.out)
    except (UserError, OSError) as error:
        print(f"pool_studies: {error}", file=sys.stderr)
        return 2
    print("\n".join([*found, f"{n_saes} SAEs: {page}"]))
    return 0


def pooled(studies: list[Path], out: Path) -> tuple[Path, list[str], int]:
    """Write page and tables of all; return the page, its answers and how many SAEs there are.

    UserError for studies that are of several designs, and where no SAE has a score.
    """
    run = gathered(studies, out)
    out.mkdir(parents=True, exist_ok=True)
    return *write_tables(read_study([run]), out), len(run.saes)


def gathered(studies: list[Path], out: Path) -> Run:
    """The SAEs of all as those of one run, of the folder `out`."""
    settings = [settings_of(folder) for folder in studies]
    if other := differing(settings):
        raise UserError(f"the studies differ in {', '.join(other)}: pool those of one design")
    saes, letters = (
        pd.concat([pd.read_csv(folder / name).assign(study=i) for i, folder in enumerate(studies)], ignore_index=True)
        for name in ("saes.csv", "letters.csv")
    )
    of = {key: rows for key, rows in letters.groupby(["study", *KEY])}
    worse = saes.assign(
        is_left_out=saes["left_out"].notna(),
        lacks_letters=[row not in of for row in saes[["study", *KEY]].itertuples(index=False, name=None)],
    )
    saes = worse.sort_values(["is_left_out", "lacks_letters"], kind="stable")[saes.columns].drop_duplicates(KEY)
    run = Run(out, out.name, {"settings": settings[0]}, [])
    run.saes.extend(trained(row, of, run.name) for row in saes.sort_values(KEY).to_dict("records"))
    return run


def settings_of(study: Path) -> dict[str, Any]:
    """What all SAEs of a study share; of its text the name alone."""
    settings = json.loads((study / "study.json").read_text())["settings"]
    return settings | {"dataset": Path(settings["dataset"]).name if settings["dataset"] else None}


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """The names of settings that are not the same in all."""
    return sorted({name for each in settings for name in each if each[name] != settings[0].get(name)})


def trained(row: dict[str, Any], of: dict[tuple, pd.DataFrame], run: str) -> TrainedSAE:
    """An SAE from its rows of the tables."""
    row = {name: None if pd.isna(value) else value for name, value in row.items()}
    own = of.get(tuple(row[name] for name in ("study", *KEY)))
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
