"""What training seeds and matched comparisons say: runs come in, a table of two-way intervals of cells with several
seeds and one of comparisons go out as HTML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_train.report.cells import SCORES, Cell, cells
from sae_train.report.data import Run
from sae_train.report.matched import Compared, comparisons, summary
from sae_train.report.shell import table
from sae_train.report.text import escape, fixed, interval, nouns, short

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

FOLDED = 12  # more comparisons than this are folded away


def seed_table(runs: list[Run]) -> str:
    """Cells with at least two seeds; empty without one."""
    found = [cell for cell in cells(runs) if len(cell.saes) > 1]
    if not found:
        return ""
    head = ["cell", "seeds", escape(nouns(found[0].saes[0].noun)), "L0 reached"]
    head += [title for score in SCORES for title in (score, "smallest visible difference")]
    return table(head, [_cell_row(cell) for cell in found], "sortable")


def comparison_table(runs: list[Run]) -> str:
    """Every pair of comparable cells; empty without one."""
    own = cells(runs)
    found = comparisons(own)
    if not found:
        return ""
    names = ["comparison", "seeds", "L0"]
    names += [title for score in SCORES for title in (f"difference, {score}", "verdict")]
    body = table(names, [_pair_row(pair) for pair in found], "pairs")
    if len(found) > FOLDED:
        body = f"<details><summary>All {len(found)} comparisons</summary>{body}</details>"
    return f"<p>{summary(found, nouns(own[0].saes[0].noun))}</p>{body}"


def _cell_row(cell: Cell) -> list[str]:
    from sae_train.evals.intervals import letters_by_seeds

    letters = sorted(cell.letters)
    reached = [value for sae in cell.saes if (value := sae.get("metrics/l0")) is not None]
    l0 = " to ".join(dict.fromkeys(short(value) for value in (min(reached), max(reached)))) if reached else "–"
    row = [escape(cell.name), str(len(cell.saes)), str(len(letters)), l0]
    for score in SCORES:
        found = letters_by_seeds(cell.matrix(score, letters))
        row += [_spanned(found), fixed(found.visible)]
    return row


def _pair_row(pair: Compared) -> list[str]:
    row = [escape(pair.name), pair.seeds, escape(pair.how)]
    for score in SCORES:
        found = pair.differences.get(score)
        if found is None:
            row += ["–", "–"]
            continue
        judged = "distinguishable" if found.excludes_zero else "not distinguishable"
        row += [_spanned(found), f"{judged} <small>(visible from {fixed(found.visible)})</small>"]
    return row


def _spanned(found: Interval) -> str:
    return f"{fixed(found.mean)} <small>{interval(found.low, found.high)}</small>"
