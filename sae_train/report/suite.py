"""The results of sae-bench's own evals as tables, with our figures beside those that measure the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_train.config.record import SuiteEntry, SuiteRecord, SuiteResult, fits
from sae_train.errors import UserError
from sae_train.files import read_json
from sae_train.report.text import ABSENT, fixed, short

RESULTS = "eval_results"  # where sae-bench keeps its own, a folder an eval
RECORD = "suite.json"
FOLDERS = {"core": "core", "sparse-probing": "sparse_probing", "scr": "scr", "tpp": "tpp"}
NOT_A_NUMBER = -1  # that sae-bench's core eval writes
CORE = {  # sae-bench's names of figures, whose groups do not matter
    "l0": "L0",
    "explained_variance": "explained variance",
    "explained_variance_legacy": "explained variance, token by token",
    "ce_loss_score": "CE loss recovered",
    "kl_div_with_sae": "KL divergence from the clean model",
    "kl_div_score": "KL divergence recovered",
    "cossim": "cosine of reconstruction and activation",
    "l2_ratio": "norm of reconstruction / of activation",
    "frac_alive": "latents that fired",
}
BY_NUMBER = {  # what the other evals give for so many latents: (figure, heading), and what is counted
    "sparse-probing": (
        {"sae_top_{}_test_accuracy": "accuracy, SAE latents", "llm_top_{}_test_accuracy": "residual stream’s values"},
        "the best",
    ),
    "scr": ({"scr_metric_threshold_{}": "spurious correlation removed (SCR)"}, "latents put to 0:"),
    "tpp": ({"tpp_threshold_{}_total_metric": "targeted probe perturbation (TPP)"}, "latents put to 0:"),
}
ALL = {"sae": "sae_test_accuracy", "llm": "llm_test_accuracy"}


@dataclass(frozen=True)
class SuiteTable:
    """The figures of one eval, a row each, as they are printed."""

    name: str
    head: list[str]
    rows: list[list[str]]
    note: str

    def line(self) -> str:
        """The first rows in one line."""
        first = (f"{name} {' / '.join(values)}" for name, *values in self.rows[:4])
        return f"sae-bench {self.name} ({' / '.join(self.head[1:])}): {', '.join(first)}"


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of the evals whose results are in a folder; nothing where that cannot be read."""
    path = folder / RESULTS / RECORD
    try:
        content = read_json(path) if path.is_file() else None
    except UserError:
        return {}
    return content["evals"] if fits(SuiteRecord, content) else {}


def read_result(folder: Path, name: str, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The file of results of an eval; None where it is not there or is no such file."""
    path = folder / RESULTS / FOLDERS[name] / entry["file"]
    try:
        content = read_json(path) if path.is_file() else None
    except UserError:
        return None
    return content if fits(SuiteResult, content) else None


def suite_tables(folder: Path, sae: str) -> list[SuiteTable]:
    """Tables of all results in a folder that are of this SAE, told by its weights."""
    tables = []
    for name, entry in read_record(folder).items():
        if name in FOLDERS and fits(SuiteEntry, entry) and entry["sae"] == sae:
            result = read_result(folder, name, entry)
            if result is not None:
                tables.append(_table(name, entry, result))
    return tables


def _table(name: str, entry: dict[str, Any], result: dict[str, Any]) -> SuiteTable:
    figures = {key: value for group in result["eval_result_metrics"].values() for key, value in group.items()}
    versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
    note = f"Measured by {versions}{', on ' + entry['text'] if entry['text'] else ''}; all of it in {entry['file']}."
    if name == "core":
        head, rows = ["", "sae-bench", "here"], list(_core_rows(figures, entry["ours"]))
    else:
        head, rows = _rows_by_number(name, figures)
    return SuiteTable(name, head, rows, note)


def _core_rows(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[list[str]]:
    for key, title in CORE.items():
        show = short if key == "l0" else fixed
        value = theirs.get(key)
        yield [title, ABSENT if value == NOT_A_NUMBER else show(value), show(ours.get(key))]


def _rows_by_number(name: str, figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each number of latents, and where it was measured one for all of them."""
    columns, counted = BY_NUMBER[name]
    pattern = re.compile(next(iter(columns)).replace("{}", r"(\d+)"))
    found = (pattern.fullmatch(key) for key, value in figures.items() if value is not None)
    numbers = sorted(int(match[1]) for match in found if match)
    rows = [[f"{counted} {n}", *(fixed(figures.get(key.format(n))) for key in columns)] for n in numbers]
    if name == "sparse-probing":
        rows.append(["all", *(fixed(figures.get(key)) for key in ALL.values())])
    return ["", *columns.values()], rows
