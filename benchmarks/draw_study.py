"""Draws charts of a study's page as one picture, from its tables.

    python benchmarks/draw_study.py STUDY... --out docs/findings.svg [--charts width-topk,l0-4k] [--columns 2]

Each STUDY is a folder with `saes.csv`, `letters.csv` and `study.json`, as `sae-train study` writes them; several are
pooled as pool_studies.py does. A chart is named by what its lines run along and what it is of: width-topk, l0-topk,
f1-topk, recall-topk and split-topk of an architecture, l0-4k and ev-4k of a width.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
from pool_studies import gathered

from sae_train.errors import UserError
from sae_train.files import whole
from sae_train.report.plates import picture
from sae_train.report.study import chance_level, read_study
from sae_train.report.study_charts import figures_of
from sae_train.runs.display import aside

KINDS = ("svg", "png", "pdf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--charts", default="width-topk,width-jumprelu,l0-4k,l0-16k")
    parser.add_argument("--columns", type=int, default=2)
    args = parser.parse_args()
    try:
        with aside() as display:
            display("comparing SAEs and drawing")
            draw(args.studies, args.charts.split(","), args.columns, args.out)
    except (UserError, OSError) as error:
        print(f"draw_study: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def draw(studies: list[Path], names: list[str], columns: int, out: Path) -> None:
    """Write the picture; UserError for a chart that the studies have not."""
    study = read_study([gathered(studies, out)])
    figures = figures_of(study.cells, study.interval, chance_level)
    charts = {chart.key: chart for own in figures.values() for chart in own}
    if (kind := out.suffix.removeprefix(".")) not in KINDS:
        raise UserError(f"--out {str(out)!r} names no kind of picture; allowed: {', '.join(KINDS)}")
    if missing := [name for name in names if name not in charts]:
        raise UserError(f"there is no chart {missing[0]!r}; there are {', '.join(charts)}")
    # Text stays text, and the same tables give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sae-train"}), whole(out) as temporary:
        metadata = {"Date": None} if kind == "svg" else None
        picture([charts[name] for name in names], columns).savefig(temporary, format=kind, metadata=metadata)


if __name__ == "__main__":
    sys.exit(main())
