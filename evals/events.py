"""How words came to be absorbed in training: from their outcomes at every evaluation, the event log with one row for
each word that ended up absorbed.

`trace` makes the rows by evaluation, which are kept as trajectory.parquet. An evaluation before the first step is left
out: it says nothing of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from sae_train.evals.result import AbsorptionResult

TRACE = ("letter", "word", "token_id", "outcome", "main_act", "share", "absorber", "absorber_cos")
EVENTS = (
    "sae", "letter", "word", "recalled_step", "silent_step", "absorber", "absorber_cos", "first_step", "taken_step",
)  # fmt: skip
NEVER = -1  # a step at which nothing happened


def trace(result: AbsorptionResult) -> pd.DataFrame:
    """What is kept of each word at each evaluation: its outcome and the other latent that carries most of it.

    share is what that latent carries of the activation's projection on the probe; absorber is −1 where there is none.
    """
    import pandas as pd

    words = result.words
    first = [_first(row) for row in zip(words["absorbers"], words["absorber_cos"], words["absorber_proj"], strict=True)]
    absorber, cos, proj = (np.array(column) for column in zip(*first, strict=True)) if first else ([], [], [])
    table = words[["letter", "word", "outcome"]].assign(
        token_id=words["token_id"].astype("int32"),
        main_act=words["main_act"].astype("float32"),
        share=(proj / words["a"].to_numpy(dtype=float)).astype("float32") if first else [],
        absorber=pd.Series(absorber, index=words.index, dtype="int32"),
        absorber_cos=pd.Series(cos, index=words.index, dtype="float32"),
    )
    return table[list(TRACE)]


def event_log(trajectory: pd.DataFrame) -> pd.DataFrame:
    """One row per SAE and word that is carried by another latent at the last evaluation; columns are EVENTS.

    recalled_step: the last evaluation at which a main latent fired on it, −1 if none did.
    silent_step: the first of the unbroken evaluations, up to the last one, in which its main latents are silent.
    absorber, absorber_cos: the latent that carries the word at the end, and its decoder's cosine with the probe.
    first_step: the first evaluation at which this latent was the strongest other one on the word.
    taken_step: the first of the unbroken evaluations, up to the last one, in which it carries the word.
    """
    import pandas as pd

    parts = [_events_of(name, part) for name, part in trajectory.groupby("sae", sort=False, observed=True)]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(EVENTS))


def count_recovered(trajectory: pd.DataFrame) -> dict[str, int]:
    """Per SAE, the words that another latent carried at some evaluation and that a main latent recalls at the end."""
    counts = {}
    for name, part in trajectory.groupby("sae", sort=False, observed=True):
        outcome = _grid(part, "outcome").to_numpy()
        counts[str(name)] = int(((outcome == "carried").any(1) & (outcome[:, -1] == "recalled")).sum())
    return counts


def _first(absorbers: tuple) -> tuple[int, float, float]:
    latents, cosines, projections = absorbers
    return (latents[0], cosines[0], projections[0]) if len(latents) else (-1, np.nan, 0.0)


def _grid(part: pd.DataFrame, column: str) -> pd.DataFrame:
    """Words (letter, word, token) × evaluations after the start, in the order of steps."""
    kept = part[part["step"] > 0] if (part["step"] > 0).any() else part
    return kept.pivot(index=["letter", "word", "token_id"], columns="step", values=column).sort_index(axis=1)


def _events_of(name: str, part: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    grids = [_grid(part, column) for column in ("outcome", "absorber", "absorber_cos")]
    outcome, absorber, cos = (grid.to_numpy() for grid in grids)
    steps, keys = grids[0].columns.to_numpy(), grids[0].index
    last = absorber[:, -1]
    recalled = outcome == "recalled"
    table = pd.DataFrame(
        {
            "sae": name,
            "letter": keys.get_level_values("letter"),
            "word": keys.get_level_values("word"),
            "recalled_step": np.where(recalled.any(1), steps[_last_true(recalled)], NEVER),
            "silent_step": _since(~recalled, steps),
            "absorber": last,
            "absorber_cos": cos[:, -1],
            "first_step": steps[(absorber == last[:, None]).argmax(1)],
            "taken_step": _since((outcome == "carried") & (absorber == last[:, None]), steps),
        }
    )
    carried = table[outcome[:, -1] == "carried"]
    order = carried.sort_values(["taken_step", "letter", "word"], ignore_index=True)
    return order.astype({"absorber": "int64", "taken_step": "int64", "silent_step": "int64"})


def _since(flags: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Step at which the run of True that reaches the last column began; NEVER where the last is False."""
    length = np.cumprod(flags[:, ::-1], axis=1).sum(1)
    return np.where(length > 0, steps[np.minimum(len(steps) - length, len(steps) - 1)], NEVER)


def _last_true(flags: np.ndarray) -> np.ndarray:
    return flags.shape[1] - 1 - flags[:, ::-1].argmax(1)
