"""The HTML report: reads run folders, writes one self-contained page.

In: the folder of a run, or several to compare. Out: the path of an HTML file that needs no server.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sae_train.errors import UserError


def write_report(run_folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run (default: report.html in its folder) or a comparison of several.

    The comparison's default is comparison.html in the first run's folder. Raises UserError for a folder
    that is no run, and for a page that cannot be written.
    """
    from sae_train.report.data import load_runs
    from sae_train.report.page import page

    alone = isinstance(run_folder, (str, Path))
    folders = [Path(run_folder)] if alone else [Path(folder) for folder in run_folder]
    if not folders:
        raise UserError("no run was named: give at least one run folder, such as checkpoints/NAME")
    default = folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    text = page(load_runs(folders))
    return _write(Path(out) if out else default, text)


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"the report cannot be written to {str(path)!r}: {error.strerror}") from None
    return path
