"""The HTML pages of a run, of several to compare, and of one evaluated SAE: each one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae_train.errors import UserError, explaining
from sae_train.files import write_text

if TYPE_CHECKING:
    import pandas as pd

    from sae_train.evals.result import AbsorptionResult
    from sae_train.report.suite import SuiteTable


def write_report(run_folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run (default: report.html in its folder) or a comparison of several, each taken once.

    The comparison's default is comparison.html in the first run's folder. Raises UserError for a folder
    that is no run, and for a page that cannot be written.
    """
    from sae_train.report.data import distinct, load_runs
    from sae_train.report.page import page

    alone = isinstance(run_folder, (str, Path))
    folders = [Path(run_folder)] if alone else distinct([Path(folder) for folder in run_folder])
    if not folders:
        raise UserError("no run was named: give at least one run folder, such as checkpoints/NAME")
    default = folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    text = page(load_runs(folders))
    return _write(Path(out) if out else default, text)


def export_report(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write every figure of the report as PNG, SVG and CSV and its tables as CSV below `out`; return the paths.

    Raises UserError for a folder that is no run, and for a folder that cannot be written.
    """
    from sae_train.report.export import export

    return export([Path(run) for run in runs], Path(out))


def write_eval_page(
    result: AbsorptionResult, baselines: dict[str, dict[str, float]], interventions: pd.DataFrame | None,
    about: dict[str, str], out: Path, suite: Sequence[SuiteTable] = (),
) -> Path:  # fmt: skip
    """Write the page of one evaluated SAE.

    baselines holds figures such as mean_full by name: random, shuffled_labels, random_directions, probe; about holds
    lines such as SAE, model, hook. interventions has a row a word: letter, word, absorber, clean and the changes of
    the answer's margin in logits; suite holds what sae-bench's own evals found. Raises UserError for a page that cannot
    be written.
    """
    from sae_train.report.eval_page import eval_page

    return _write(Path(out), eval_page(result, baselines, interventions, about, suite))


def _write(path: Path, text: str) -> Path:
    with explaining(lambda error: f"the report cannot be written to {str(path)!r}: {error.strerror}", OSError):
        write_text(path, text)
    return path
