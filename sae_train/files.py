"""Files that are whole at any moment, and readers of a run's own.

`whole` is the one way in which sae-train writes a file: under a temporary name, renamed once everything is written.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_train.errors import UserError, explaining, fault_of

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import BaseModel

    Checked = TypeVar("Checked", bound=BaseModel)

BAD_JSON = (OSError, ValueError, RecursionError)  # what reading a file that is no JSON raises
# What rows of metrics.jsonl hold of ours: the first part of each name.
OUR_FIGURES = ("losses", "metrics", "sparsity", "details", "absorption", "toy", "sae", "step", "tokens", "seconds")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; afterwards it is brought to the disk and gets its name.

    A reader sees the old file or the new one, never half, also after a power cut. The folder is made where it is not
    there. An error leaves the old file and no temporary one; each writer has a temporary name of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a private file in its place
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what `whole` left below a folder where its process was killed; nobody may write there meanwhile."""
    for temporary in folder.rglob(".*.tmp"):
        if temporary.is_file():
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole; NaN and infinity become null."""
    write_text(path, json.dumps(finite(content), indent=1) + "\n")


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table whole."""
    with whole(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a JSON-lines file whole."""
    write_text(path, "".join(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run; UserError when it is absent or not JSON."""
    with explaining(lambda error: f"{str(path)!r} cannot be read as JSON: {error}", *BAD_JSON):
        if not path.exists():
            raise UserError(f"{str(path)!r} does not exist: give the folder of a run, such as checkpoints/NAME")
        return json.loads(path.read_text(encoding="utf-8"))


def check_types(model: type[Checked], content: Any, path: Path) -> Checked:
    """Return a JSON file's content as a pydantic model; UserError names the first value of another type."""
    from pydantic import ValidationError

    with explaining(lambda error: f"{path}: {fault_of(error)}.", ValidationError):
        return model.model_validate(content)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a JSON-lines file, none where there is no file, and how many of its lines are no records.

    A kill may cut the last line off.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    records = [record for record in map(_record, lines) if record is not None]
    return records, len(lines) - len(records)


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the records of a JSON-lines file that are wanted, and, as they are, the lines that cannot be read.

    A last line without its end is what a kill left of a record, and goes.
    """
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    kept = [line for line in lines if _is_wanted(line, wanted)]
    with whole(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _is_wanted(line: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    record = _record(line.decode(errors="replace"))
    try:
        return record is None or wanted(record)
    except (KeyError, TypeError):
        return True


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except BAD_JSON:
        return None
    return record if isinstance(record, dict) else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl that can be read."""
    return read_lines(folder / "metrics.jsonl")[0]


def own_figures(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row of metrics.jsonl that a user's callback gave: those with a name that is not ours."""
    return {name: value for name, value in row.items() if name and name.split("/")[0] not in OUR_FIGURES}


def finite(value: Any) -> Any:
    """The value as JSON takes it, which has no NaN or infinity: they become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
