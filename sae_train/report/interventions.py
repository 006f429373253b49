"""What the language model itself says: changes of its answer under edits of single words come in, a sentence and a
chart of mean changes with 95 % intervals go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_train.report.shapes import Dots, Mark, Row
from sae_train.report.shell import section
from sae_train.report.svg import shown
from sae_train.report.text import escape, fixed, interval, plural

if TYPE_CHECKING:
    import pandas as pd

N_DRAWS = 2000
EDITS = {
    "absorber_change": "absorber taken out",
    "random_change": "random latent taken out",
    "parent_change": "silent latent put in",
    "swap_change": "both at once",
}


def intervention_section(table: pd.DataFrame | None, noun: str) -> str:
    """The section; empty where no word was edited."""
    if table is None or not len(table):
        return ""
    found = _means(table)
    body = f"<p>{_said(found, table, noun)}</p>" + shown([_chart(found)], "plots")
    return section("What the model itself says", body)


def _means(table: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Mean and interval of each edit over the words that have it."""
    import torch

    from sae_train.evals.intervals import bootstrap

    found = {}
    for name in EDITS:
        values = torch.tensor(table[name].dropna().to_numpy(dtype=float))
        if len(values):
            draws = bootstrap(values[:, None], torch.zeros(len(values), dtype=torch.long), 1, N_DRAWS, seed=0)
            low, high = draws[:, 0, 0].quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
            found[name] = (float(values.mean()), low, high)
    return found


def _said(found: dict[str, tuple[float, float, float]], table: pd.DataFrame, noun: str) -> str:
    what = escape(noun if noun == "letter" else f"{noun} label")
    openings = {
        "absorber_change": "Taking the absorber out of the activation",
        "random_change": "taking out a random latent of the same size",
        "parent_change": f"putting the silent {what} latent in",
        "swap_change": "doing both, absorber out and silent latent in,",
    }
    parts = [f"{opening} {_moved(*found[name])}" for name, opening in openings.items() if name in found]
    clean = table["clean"].mean()
    judged = _judged(found)
    return (
        f"{'; '.join(parts)}. The margin is the logit of the right answer minus the mean of the others, "
        f"{fixed(clean, 2)} on these {plural(len(table), 'absorbed word')} as they are.{judged}"
    )


def _moved(mean: float, low: float, high: float) -> str:
    way = "raises" if mean > 0 else "lowers"
    low, high = (low, high) if mean > 0 else (-high, -low)
    unsure = ", not distinguishable from 0" if low <= 0 <= high else ""
    return f"{way} the margin by <b>{fixed(abs(mean), 2)}</b> ({interval(low, high, 2)}{unsure})"


def _judged(found: dict[str, tuple[float, float, float]]) -> str:
    """Whether the absorber matters more than a random latent, by intervals that do not overlap."""
    if not {"absorber_change", "random_change"} <= found.keys():
        return ""
    apart = found["absorber_change"][2] < found["random_change"][1]
    if apart:
        return " The absorber takes away more than the random latent: the model uses what it carries."
    return " The absorber’s effect is not distinguishable from the random latent’s."


def _chart(found: dict[str, tuple[float, float, float]]) -> Dots:
    rows = [Row(EDITS[name], [Mark("change", mean, "dot c0", low, high)], fixed(mean, 2))
            for name, (mean, low, high) in found.items()]  # fmt: skip
    title = "Mean change of the answer’s margin"
    note = "logits, with 95 % intervals over words"
    return Dots("margin", title, note, rows, height=26, lines=[(0.0, "mean")], right=44)
