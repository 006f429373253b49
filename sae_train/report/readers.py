"""The files of a run's folder as plain records by SAE: what is absent or unreadable becomes a sentence in `gaps`.

Files that older runs lack, trajectory.parquet and latents/, are silently empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_train.config.record import LatentRecord, MetricsRow, fits, read_run
from sae_train.errors import UserError
from sae_train.files import read_lines

LISTS = ("main_latents", "absorbers", "absorber_cos", "absorber_proj")


def read_facts(folder: Path) -> dict[str, Any]:
    """run.json; UserError if the folder is no run's."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: give the folder of a run, such as checkpoints/NAME")
    if not (folder / "run.json").exists():
        raise UserError(f"{str(folder)!r} is not the folder of a run: it holds no run.json")
    return read_run(folder)


def read_history(path: Path, gaps: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl by SAE."""
    if not path.is_file():
        gaps.append("No metrics were logged (metrics.jsonl is absent), so there are no curves.")
    rows, broken = read_lines(path)
    history: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if fits(MetricsRow, row):
            history.setdefault(row["sae"], []).append(row)
    broken += len(rows) - sum(map(len, history.values()))
    if broken:
        gaps.append(f"{broken} unreadable row(s) of metrics.jsonl were left out.")
    return history


def read_absorption(path: Path, gaps: list[str]) -> tuple[dict[str, list], dict[str, list]]:
    """Letters of every step and the absorbed words of each SAE's last step, by SAE."""
    if not path.is_file():
        gaps.append("The absorption eval left no letters and no words (absorption.parquet is absent).")
        return {}, {}
    import pandas as pd

    try:
        table = pd.read_parquet(path)
        letters = table[table["level"] == "letter"].sort_values(["step", "letter"])
        words = table[table["level"] == "word"]
        words = words[words["step"] == words.groupby("sae")["step"].transform("max")]
        absorbed = (words[["full", "fraction"]].astype(float) > 0).any(axis=1)
        return _by_sae(letters), _by_sae(words[absorbed].sort_values("word"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        gaps.append(f"absorption.parquet cannot be read: {error}.")
        return {}, {}


def _by_sae(table: Any) -> dict[str, list[dict[str, Any]]]:
    return {
        str(name): [plain(row) for row in part.to_dict("records")] for name, part in table.groupby("sae", sort=False)
    }


def read_events(path: Path, gaps: list[str]) -> dict[str, dict[str, Any]]:
    """The event log by SAE: `events` with steps as tokens, `recovered` words, `looks` (tokens of the evaluations)."""
    if not path.is_file():
        return {}
    import pandas as pd

    from sae_train.evals.events import count_recovered, event_log

    try:
        table = pd.read_parquet(path)
        tokens = dict(zip(table["step"], table["tokens"], strict=True))
        log, again = event_log(table), count_recovered(table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        gaps.append(f"trajectory.parquet cannot be read: {error}.")
        return {}
    for name in [column for column in log if column.endswith("_step")]:
        log[name.replace("_step", "_tokens")] = log[name].map(tokens)
    looks = sorted(count for step, count in tokens.items() if step > 0)
    events = _by_sae(log)
    return {name: {"events": events.get(name, []), "recovered": n, "looks": looks} for name, n in again.items()}


def read_latents(folder: Path, gaps: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Records of latents/<sae>.jsonl by SAE."""
    records: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("[!.]*.jsonl")):
        lines, broken = read_lines(path)
        records[path.stem] = [line for line in lines if fits(LatentRecord, line)]
        broken += len(lines) - len(records[path.stem])
        if broken:
            gaps.append(f"{broken} unreadable record(s) of latents/{path.name} were left out.")
    return records


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Give every list column a list; a Parquet file has arrays, and nulls where a row has none."""
    lists = {key: row.get(key) for key in LISTS}
    return row | {key: list(value) if hasattr(value, "__len__") else [] for key, value in lists.items()}
