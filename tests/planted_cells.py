"""Cells of a study with planted scores."""

from __future__ import annotations

import numpy as np

from sae_train.report.cells import Cell
from sae_train.report.claims import claims
from sae_train.report.data import TrainedSAE

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def cell(arch, width, l0, scores, reached=None, ev=0.9, dead=0.0, words_l0=None, **more) -> Cell:
    """A cell from planted scores (seeds, letters) of full absorption, and of other metrics in `more`."""
    tables = {"full": scores, "fraction": scores} | more
    saes = []
    for seed in range(len(scores)):
        letters = [
            {"step": 1, "letter": letter, "counts": True} | {name: float(t[seed][i]) for name, t in tables.items()}
            for i, letter in enumerate(LETTERS)
        ]
        final = {"metrics/l0": reached or l0, "metrics/explained_variance": ev, "sparsity/dead_fraction": dead}
        final |= {"absorption/l0_words": words_l0} if words_l0 else {}
        saes.append(TrainedSAE(
            name="", label="", run="", arch=arch, width=width, l0=l0, seed=seed, failed=None, invalid=None,
            final=final, baselines={}, history=[], letters=letters, words=[],
        ))  # fmt: skip
    return Cell((), arch, width, float(l0), tuple(saes))


def table(mean: float, seeds: int = 3, draw: int = 0) -> np.ndarray:
    """Scores whose mean is exactly so: letters differ much, training seeds little."""
    rng = np.random.default_rng(draw)
    letters = np.random.default_rng(99).normal(0, 0.1, 26)
    values = letters + rng.normal(0, 0.004, (seeds, 1)) + rng.normal(0, 0.02, (seeds, 26))
    return mean + values - values.mean()


def claim_of(cells, question="width", metric="full", pooled=True):
    return next(c for c in claims(cells) if (c.question, c.metric, c.pooled) == (question, metric, pooled))
