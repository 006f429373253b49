"""A finished run that is trained further: what it goes on from, and the learning rate from there on.

The rate of the first part has fallen to 0. It rises again over the first share of the new steps (`lr_warm_up`), stays,
and falls to 0 over the last (`lr_decay`), as if the new steps were a run: re-warming and re-decaying, as Ibrahim et al.
2024 (arXiv 2403.08763) find it best where a language model's training goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config.units import read_count
from sae_train.errors import UserError

if TYPE_CHECKING:
    from sae_train.config import Settings


def extend(folder: Path, info: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """Return a finished run's run.json as that of a run that goes on to so many tokens; UserError where it cannot.

    On the disk all stays as it is until the first step's moment: whatever fails before leaves a finished run.
    """
    from sae_train.runs.session import newest_state

    asked = read_count("tokens:", tokens)
    where, done = f"the run {str(folder)!r}", info.get("tokens") or 0
    if info.get("status") != "finished":
        raise UserError(
            f"{where} is {info.get('status')}, not finished: go on with it first by sae-train resume {folder}"
        )
    if len(info["passes"]) > 1 or not newest_state(folder):
        raise UserError(
            f"{where} has kept the states of not all of its SAEs (it had {len(info['passes'])} passes): start new runs "
            "from its SAEs by --init-from"
        )
    if asked <= done:
        raise UserError(f"{where} has had {done:,} tokens already: give more than that by --tokens")
    note = (
        f"from {done:,} to {asked:,} tokens: the learning rate, which had fallen to 0, rises to its full value and "
        "falls again at the new end"
    )
    return info | {
        "settings": info["settings"] | {"tokens": asked},
        "stages": [*(info.get("stages") or []), done],
        "saes": [sae | {"written": False} for sae in info.get("saes") or []],
        "notes": [*info.get("notes", []), note],
        "command": f"{info.get('command')}; then sae-train resume {folder} --tokens {tokens}",
    }


def begun_at(info: dict[str, Any], settings: Settings) -> int:
    """The step from which a run that was extended went on, 0 for any other."""
    stages = info.get("stages") or []
    return stages[-1] // settings.train.batch_tokens if stages else 0
