"""What the language model itself says: mean changes of its answer under edits of single words, with 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_train.report.shapes import Dots, Mark, Row
from sae_train.report.text import fixed

if TYPE_CHECKING:
    import pandas as pd

N_DRAWS = 2000
EDITS = {
    "absorber_change": "absorber taken out",
    "random_change": "random latent taken out",
    "parent_change": "silent latent put in",
    "swap_change": "both at once",
}

Changes = dict[str, tuple[float, float, float]]


def mean_changes(table: pd.DataFrame | None) -> Changes:
    """Mean and interval of each edit over the words that have it; empty where no word was edited."""
    import torch

    from sae_train.evals.intervals import bootstrap

    means = {}
    for name in EDITS if table is not None and len(table) else ():
        values = torch.tensor(table[name].dropna().to_numpy(dtype=float))
        if len(values):
            draws = bootstrap(values[:, None], torch.zeros(len(values), dtype=torch.long), 1, N_DRAWS, seed=0)
            low, high = draws[:, 0, 0].quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
            means[name] = (float(values.mean()), low, high)
    return means


def margin_chart(changes: Changes) -> Dots:
    rows = [
        Row(EDITS[name], [Mark("change", mean, "dot c0", low, high)], fixed(mean, 2))
        for name, (mean, low, high) in changes.items()
    ]
    title, note = "Mean change of the answer’s margin", "logits, with 95 % intervals over words"
    return Dots("margin", title, note, rows, height=26, lines=[(0.0, "mean")], right=44)
