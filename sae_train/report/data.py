"""What a report is made of: the files of a run, finished or not, as plain records.

Whatever is missing or unreadable becomes a sentence in `Run.gaps`; only a folder that is no run raises UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_train.evals.outcomes import OUTCOMES
from sae_train.report.readers import read_absorption, read_events, read_facts, read_history, read_latents
from sae_train.report.text import noun_of, nouns, number, span

SILENT = 1e-8  # an activation below this counts as none
CLOSE_L0 = 0.02  # of an L0 that was reached


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE with its last figures, its history and, where the eval ran, its letters and absorbed words."""

    name: str
    label: str
    run: str
    arch: str
    width: int | None
    l0: float | None
    seed: int | None
    failed: str | None
    invalid: str | None
    final: dict[str, Any]
    baselines: dict[str, dict[str, Any]]
    history: list[dict[str, Any]]
    letters: list[dict[str, Any]]
    words: list[dict[str, Any]]
    event_log: dict[str, Any] = field(default_factory=dict)
    """events, recovered, looks, as `readers.read_events` gives them; empty where words were not followed"""
    latents: list[dict[str, Any]] = field(default_factory=list)
    """records of single latents (evals/latent_pages.py)"""
    noun: str = "letter"
    """what one label of the hierarchy is called"""
    preset: str | None = None
    hook: str = ""
    """where its run has several; empty where it has one"""

    @property
    def place(self) -> tuple[str, str]:
        """The run and the hook."""
        return self.run, self.hook

    def get(self, metric: str) -> float | None:
        return number(self.final.get(metric))

    def usable(self, metric: str) -> float | None:
        """The last value; none of an absorption score that may not be used."""
        return None if self.invalid and metric.startswith("absorption") else self.get(metric)

    def span(self, metric: str) -> str:
        """The 95 % interval of a metric as text; empty where there is none."""
        return span(self.final, metric)

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Tokens and values of one metric, where both are finite, in order of tokens."""
        pairs = {number(row.get("tokens")): number(row.get(metric)) for row in self.history}
        kept = sorted((x, y) for x, y in pairs.items() if x is not None and y is not None)
        return [x for x, _ in kept], [y for _, y in kept]

    @property
    def baseline(self) -> dict[str, Any]:
        """Scores of the random SAE."""
        return self.baselines.get("random", {})

    @property
    def chance(self) -> dict[str, Any]:
        """Scores of the random SAE that is as sparse on the eval's words; none in a run that did not measure it."""
        return self.baselines.get("random_words", {})

    @property
    def full_by_chance(self) -> float | None:
        """Mean full absorption that chance gives on as many words as the main latents miss; None where unknown."""
        share = None if self.causal else carried_by_chance(self.chance)
        rows = [by_chance(row, share) for row in self.last_letters if row.get("counts")]
        known = [full for full in rows if full is not None]
        return sum(known) / len(known) if known else None

    @property
    def causal(self) -> bool:
        """Whether `full` is the causal rate, which asks the language model."""
        return str(self.preset).startswith("paper")

    @property
    def nouns(self) -> str:
        return nouns(self.noun)

    @property
    def label_noun(self) -> str:
        """What the prose calls one label where the noun would be clumsy."""
        return "letter" if self.noun == "letter" else "label"

    @property
    def tokens(self) -> float:
        """Tokens at the last logged step."""
        return max((number(row.get("tokens")) or 0 for row in self.history), default=0)

    @property
    def dead(self) -> float | None:
        """Dead latents as a fraction of the width."""
        return self.get("sparsity/dead_fraction")

    @property
    def l0_distance(self) -> float | None:
        """Relative distance of the reached L0 from the one asked for."""
        reached = self.get("metrics/l0")
        return abs(reached / self.l0 - 1) if reached is not None and self.l0 else None

    @property
    def l0_is_close(self) -> bool:
        return self.l0_distance is not None and self.l0_distance <= CLOSE_L0

    @property
    def failure(self) -> str:
        return f"{self.label} ({self.failed})"

    @property
    def last_letters(self) -> list[dict[str, Any]]:
        last = max((row["step"] for row in self.letters), default=None)
        return [row for row in self.letters if row["step"] == last]

    @property
    def outcomes(self) -> list[float] | None:
        """Shares of the true positives that are recalled, carried, below, nobody's; None where they were not kept."""
        return outcomes_of({f"lost_{name}": self.get(f"absorption/mean_lost_{name}") for name in OUTCOMES[1:]})


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    """its folder's name, with those of folders above where several runs of one page have it"""
    facts: dict[str, Any]
    saes: list[TrainedSAE]
    gaps: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        notes = self.facts.get("notes") or []
        return [str(note) for note in (notes if isinstance(notes, list) else [notes])]

    def setting(self, name: str) -> Any:
        """A setting by its flag's name, as run.json keeps them."""
        return (self.facts.get("settings") or {}).get(name)

    @property
    def title(self) -> str:
        model, hook = self.setting("model"), self.setting("hook")
        return f"{self.name} ({model}{f', {hook}' if hook else ''})" if model else self.name


def carried_share(word: dict[str, Any]) -> float | None:
    """Share of the activation's projection on the letter's probe that the first absorber carries."""
    a, proj = number(word.get("a")), word["absorber_proj"]
    return number(proj[0] / a) if a and a > 0 and proj else None


def outcomes_of(row: dict[str, Any]) -> list[float] | None:
    """Shares of a label's true positives by outcome; None where they were not kept."""
    lost = [number(row.get(f"lost_{name}")) for name in OUTCOMES[1:]]
    return None if None in lost else [max(0.0, 1 - sum(lost)), *lost]  # type: ignore[arg-type,list-item]


def place_name(place: tuple[str, str], several_runs: bool) -> str:
    """What is written before a name to tell runs and hooks apart; nothing where there is one of each."""
    run, hook = place
    return "".join(f"{part} · " for part in (run if several_runs else "", hook) if part)


def saes_in(rows: list[dict[str, Any]]) -> list[TrainedSAE]:
    """SAEs known by nothing but their rows of metrics.jsonl."""
    own = {name: [row for row in rows if row["sae"] == name] for name in dict.fromkeys(row["sae"] for row in rows)}
    return [_sae({}, name=name, label=name, run="", history=part, letters=[], words=[]) for name, part in own.items()]


def load_runs(folders: list[Path]) -> list[Run]:
    """Read several runs, each once; their SAEs carry the run's name in the label when there is more than one run."""
    folders = distinct(folders)
    names = _names(folders)
    return [load_run(folder, name, len(folders) > 1) for folder, name in zip(folders, names, strict=True)]


def distinct(folders: Sequence[Path]) -> list[Path]:
    """The folders without those that were given before, under whatever path."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _names(folders: list[Path]) -> list[str]:
    """The last parts of each path, one or as many as tell it from all others."""
    paths = [folder.resolve().parts for folder in folders]

    def name(path: tuple[str, ...]) -> str:
        ends = (path[-n:] for n in range(1, len(path) + 1))
        return str(Path(*next(end for end in ends if sum(other[-len(end) :] == end for other in paths) == 1)))

    return [name(path) for path in paths]


def load_run(folder: Path, run: str, prefixed: bool = False) -> Run:
    """Read one run folder under a name; UserError if it is none."""
    facts = read_facts(folder)
    gaps: list[str] = []
    history = read_history(folder / "metrics.jsonl", gaps)
    letters, words = read_absorption(folder / "absorption.parquet", gaps)
    events, latents = read_events(folder / "trajectory.parquet", gaps), read_latents(folder / "latents", gaps)
    entries = [entry for entry in facts.get("saes") or [] if isinstance(entry, dict) and entry.get("name")]
    known = {entry["name"] for entry in entries}
    entries += [{"name": name} for name in history if name not in known]
    if not entries:
        gaps.append("No SAE has left anything yet.")
    asked = facts.get("settings") or {}
    shared = {"run": run, "noun": noun_of(asked.get("hierarchy")), "preset": asked.get("preset")}
    parts = {"history": history, "letters": letters, "words": words, "latents": latents}
    saes = []
    for entry in entries:
        name = str(entry["name"])
        own = {kind: by_sae.get(name, []) for kind, by_sae in parts.items()}
        label = f"{run} · {name}" if prefixed else name
        saes.append(_sae(entry, name=name, label=label, event_log=events.get(name, {}), **shared, **own))
    return Run(folder, run, facts, saes, gaps)


def _sae(entry: dict[str, Any], history: list, letters: list, **known: Any) -> TrainedSAE:
    """One SAE from its entry in run.json, with what its files hold."""
    width, seed = number(entry.get("width")), number(entry.get("seed"))
    history = [_add_dead_fraction(row, width) for row in history]
    tokens = {row.get("step"): row.get("tokens") for row in history}
    final = {key: value for row in history for key, value in row.items() if value is not None}
    final |= {key: value for key, value in (entry.get("final") or {}).items() if value is not None}
    final = _add_dead_fraction(final, width)
    beside = {name: own for name, own in (entry.get("baseline") or {}).items() if isinstance(own, dict)}
    share = carried_by_chance(beside.get("random_words", {}))
    return TrainedSAE(
        arch=str(entry.get("arch") or known["name"].split("-")[0]),
        width=None if width is None else int(width),
        l0=number(entry.get("l0")),
        seed=None if seed is None else int(seed),
        hook=str(entry.get("hook_name") or ""),
        failed=entry.get("failed"),
        invalid=_invalid(entry, final),
        final=final,
        baselines=beside,
        history=history,
        letters=[{"tokens": tokens.get(row["step"])} | row | _beyond(row, share) for row in letters],
        **known,
    )


def carried_by_chance(random: dict[str, Any]) -> float | None:
    """Of the words that random main latents miss, the share that one other random latent carries."""
    full, recall = number(random.get("mean_full")), number(random.get("mean_recall_main"))
    return full / (1 - recall) if full is not None and recall is not None and recall < 1 else None


def _beyond(row: dict[str, Any], share: float | None) -> dict[str, float]:
    """A letter's full absorption without what chance would carry of the words that its main latents miss."""
    full, chance = number(row.get("full")), by_chance(row, share)
    return {} if full is None or chance is None else {"full_beyond": full - chance}


def by_chance(row: dict[str, Any], share: float | None) -> float | None:
    """What random latents would carry of the words that a letter's main latents miss."""
    recall = number(row.get("recall_main"))
    return None if recall is None or share is None else (1 - recall) * share


def _add_dead_fraction(row: dict[str, Any], width: float | None) -> dict[str, Any]:
    """Add dead latents as a fraction of the width, where only their number was logged."""
    count = number(row.get("sparsity/dead_features"))
    return {"sparsity/dead_fraction": count / width} | row if count is not None and width else row


def _invalid(entry: dict, final: dict) -> str | None:
    """Why the absorption score may not be used; None if it may, or if there is none."""
    places = [entry, final, entry.get("absorption") if isinstance(entry.get("absorption"), dict) else {}]
    flags = [place.get(key) for place in places for key in ("valid", "absorption/valid", "absorption_valid")]
    reasons = [place.get(key) for place in places for key in ("reason", "absorption/reason", "absorption_reason")]
    if any(flag is not None and not flag for flag in flags):
        return str(next(filter(None, reasons), "no reason was recorded"))
    return None
