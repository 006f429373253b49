"""A run's mirror on Weights & Biases: rows of metrics.jsonl, at the end its curves, report and absorption tables.

It never stops a run: where W&B is out of reach, unwilling or broken it says one line and goes on offline, or without
it; metrics.jsonl holds everything in any case.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import flat
from sae_train.files import read_json, read_metrics, write_json
from sae_train.publishing.curves import write_curves
from sae_train.runs.log import Mirror

if TYPE_CHECKING:
    import pandas as pd

    from sae_train.config import Settings

START_SECONDS, END_SECONDS = 30, 60  # how long W&B is waited for
HISTOGRAM = "sparsity/log10_density_histogram"
MOST_ROWS = 10_000  # of a table: W&B shows no more


def open_mirror(mode: str, settings: Settings, folder: Path) -> Mirror:
    """The mirror that `--wandb` asks for: none, one that stays on this disk, or one that is sent."""
    return Mirror() if mode == "disabled" else WandbMirror(mode, settings, folder)


class WandbMirror(Mirror):
    """Names are those of metrics.jsonl; where a run has several SAEs, after each one's name and a slash.

    Charts run over tokens. A resumed run goes on in the same W&B run: wandb.json keeps its id and the last step of each
    SAE that was handed over, so that none comes twice. The project is sae-train, or what WANDB_PROJECT says.
    """

    def __init__(self, mode: str, settings: Settings, folder: Path):
        self.folder, self.several = folder, len(settings.specs) > 1
        self._broken, self._kept = False, folder / "wandb.json"
        self._state = read_json(self._kept) if self._kept.is_file() else {"id": secrets.token_hex(4), "sent": {}}
        self._run = self._open(mode, settings) or (self._open("offline", settings) if mode == "online" else None)

    def log(self, row: dict[str, Any]) -> None:
        """Send one row's numbers."""
        import wandb

        if self._run is None or self._broken or row["step"] <= self._state["sent"].get(row["sae"], -1):
            return
        prefix = f"{row['sae']}/" if self.several else ""
        values = {prefix + key: value for key, value in row.items() if isinstance(value, int | float)}
        if row.get(HISTOGRAM):
            counts = row[HISTOGRAM]
            edges = [-5 + 5 * i / len(counts) for i in range(len(counts) + 1)]
            values[prefix + HISTOGRAM] = wandb.Histogram(np_histogram=(counts, edges))
        self._do(lambda run: run.log(values | {"tokens": row["tokens"]}))
        self._state["sent"][row["sae"]] = row["step"]
        write_json(self._kept, self._state)

    def show(self) -> None:
        """Send the curves, the report and the absorption tables of a finished run's folder."""
        for make in (self._curves, self._report, self._tables):
            self._do(lambda run, make=make: run.log(made) if (made := make()) else None)

    def close(self) -> None:
        """End the mirror; what was not taken in time stays on this disk."""
        if self._run is None:
            return
        run, self._run = self._run, None
        there = f"`wandb sync {run.settings.sync_dir}` sends it"
        try:
            run.finish()
        except Exception as error:  # as in _open
            print(f"W&B has not taken everything ({_reason(error)}): {there}")
            return
        if run.offline:
            print(f"W&B: kept here, {there}")

    def _open(self, mode: str, settings: Settings) -> Any:
        """Start the W&B run, or say why not and return None."""
        import wandb

        try:
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's telemetry says when it fails
            wandb.setup(wandb.Settings(silent=True))
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("no API key: `wandb login`, or set WANDB_API_KEY")
            run = wandb.init(
                mode=mode, project=os.environ.get("WANDB_PROJECT", "sae-train"), name=self.folder.name,
                id=self._state["id"], resume="allow", config=flat(settings), dir=str(self.folder), settings=_settings(),
            )  # fmt: skip
            run.define_metric("*", step_metric="tokens")
            return run
        except Exception as error:  # beside its own errors, whatever its service's death raises
            then = "going on offline" if mode == "online" else "going on without it"
            print(f"W&B is out of reach ({_reason(error)}): {then}")
            if wandb.run is None:
                wandb.teardown()  # its service would go on holding the run's id
            return None

    def _do(self, what: Callable[[Any], Any]) -> None:
        if self._run is None or self._broken:
            return
        try:
            what(self._run)
        except Exception as error:  # as in _open
            print(f"W&B stopped answering ({_reason(error)}): going on without it")
            self._broken = True

    def _curves(self) -> dict[str, Any]:
        import wandb

        write_curves(read_metrics(self.folder), self.folder / "curves.png")
        return {"curves": wandb.Image(str(self.folder / "curves.png"))}

    def _report(self) -> dict[str, Any]:
        import wandb

        report = self.folder / "report.html"
        return {"report": wandb.Html(str(report))} if report.is_file() else {}

    def _tables(self) -> dict[str, Any]:
        """Letters and words of the last evaluation."""
        import pandas as pd
        import wandb

        if not (self.folder / "absorption.parquet").is_file():
            return {}
        table = pd.read_parquet(self.folder / "absorption.parquet")
        last = table[table["step"] == table["step"].max()]
        parts = {level: last[last["level"] == level].dropna(axis="columns", how="all") for level in ("letter", "word")}
        parts = {level: part for level, part in parts.items() if len(part)}
        return {f"absorption/{level}s": wandb.Table(dataframe=_write_lists(part)) for level, part in parts.items()}


def _settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
        reinit="create_new",        init_timeout=START_SECONDS, finish_timeout=END_SECONDS, finish_timeout_raises=True,
    )  # fmt: skip


def _write_lists(table: pd.DataFrame) -> pd.DataFrame:
    """Lists as text, which a W&B table can sort and show."""
    shown = table.head(MOST_ROWS).copy()
    for name in shown.columns:
        if shown[name].map(lambda value: isinstance(value, Iterable) and not isinstance(value, str)).any():
            shown[name] = [" ".join(map(str, value)) if isinstance(value, Iterable) else "" for value in shown[name]]
    return shown


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
