"""Cells of a grid: SAEs of one architecture, width and L0, training seeds together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.config.record import at_hook
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.text import ABSENT, number, short

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

SCORES = ("fraction", "full")
SETTINGS = ("model", "hook", "preset", "hierarchy", "template", "eval_words", "eval_contexts", "eval_seed", "tokens")


@dataclass(frozen=True)
class Cell:
    """SAEs that differ in their training seed only; setting tells apart runs of other models, evals or lengths."""

    setting: tuple[str, ...]
    arch: str
    width: int
    l0: float
    saes: tuple[TrainedSAE, ...]

    @property
    def name(self) -> str:
        return f"{self.arch}, {width_label(self.width)}, L0 {self.l0:g}{self.at}"

    @property
    def at(self) -> str:
        """The hook, after a comma, where their run has several."""
        return f", {self.saes[0].hook}" if self.saes[0].hook else ""

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return tuple(sae.seed for sae in self.saes)

    @property
    def letters(self) -> set[str]:
        """Labels that count in all seeds."""
        return self.having(SCORES[0])

    def having(self, score: str) -> set[str]:
        """Labels that count, and have the score, in all seeds."""
        return set.intersection(*(set(_values(sae, score)) for sae in self.saes))

    @property
    def reached(self) -> float | None:
        """Mean L0 on held-out text; None where one was not measured."""
        return self.mean_of("metrics/l0")

    @property
    def words_l0(self) -> float | None:
        """Mean L0 on the words of the eval, which may be another; None where one was not measured."""
        return self.mean_of("absorption/l0_words")

    @property
    def ev(self) -> float | None:
        """Mean explained variance on held-out text; None where one was not measured."""
        return self.mean_of("metrics/explained_variance")

    def mean_of(self, metric: str) -> float | None:
        """Mean over seeds of a figure; None where one was not measured."""
        values = [sae.get(metric) for sae in self.saes]
        return None if None in values or not values else sum(values) / len(values)  # type: ignore[arg-type]

    @property
    def repeated(self) -> bool:
        return len(self.saes) > 1

    @property
    def l0_span(self) -> str:
        """The least and the most L0 that a seed reached."""
        reached = [value for sae in self.saes if (value := sae.get("metrics/l0")) is not None]
        return " to ".join(dict.fromkeys([short(min(reached)), short(max(reached))])) if reached else ABSENT

    def interval(self, score: str) -> Interval:
        """The score's mean over seeds and labels."""
        from sae_train.evals.intervals import letters_by_seeds

        return letters_by_seeds(self.matrix(score, sorted(self.having(score))))

    def matrix(self, score: str, letters: list[str]) -> Any:
        """Seeds × labels."""
        import torch

        rows = [_values(sae, score) for sae in self.saes]
        return torch.tensor([[row[letter] for letter in letters] for row in rows], dtype=torch.float64)


def cells(runs: list[Run]) -> list[Cell]:
    """All cells with a label that counts in every seed, in the order of setting, architecture, width and L0."""
    grouped: dict[tuple, dict[int, TrainedSAE]] = {}
    for run in runs:
        shared = {name: str(run.setting(name)) for name in SETTINGS}
        for sae in run.saes:
            assets = (at_hook(run.facts, sae.hook).get("eval_assets") or {}).get("hash")
            own = {"hook": sae.hook} if sae.hook else {}
            setting = (*(shared | own).values(), str(assets))
            usable = not sae.failed and not sae.invalid and _values(sae, SCORES[0])
            if usable and sae.width and sae.l0 and sae.seed is not None:
                grouped.setdefault((setting, sae.arch, sae.width, sae.l0), {}).setdefault(sae.seed, sae)
    made = [Cell(*key, tuple(seed for _, seed in sorted(seeds.items()))) for key, seeds in sorted(grouped.items())]
    return [cell for cell in made if cell.letters]


def _values(sae: TrainedSAE, score: str) -> dict[str, float]:
    """The last evaluation's labels that count."""
    rows = {str(row["letter"]): number(row.get(score)) for row in sae.last_letters if row.get("counts")}
    return {letter: value for letter, value in rows.items() if value is not None}
