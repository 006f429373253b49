"""What a study found: its cells, its claims, and the sentences that answer its questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sae_train.config import width_label
from sae_train.errors import UserError
from sae_train.report.cells import Cell, cells
from sae_train.report.claims import HOLDS, METRICS, Claim, claims
from sae_train.report.data import Run, TrainedSAE
from sae_train.report.matched import CLOSE_L0, SEEDS_ASKED, on_target
from sae_train.report.pairs import MATCHED
from sae_train.report.text import fixed, listed, number, percent

if TYPE_CHECKING:
    from sae_train.evals.intervals import Interval

LETTER_METRICS = (*METRICS, "f1_k1")
MAIN_LATENTS = ("precision_main", "recall_main")
MANY_DEAD = 0.1  # of a cell's latents
MUCH_MORE = 1.1  # times as many latents on the words
MOST_NAMED = 6  # cells in a sentence
QUESTIONS = {  # of a claim: the heading, what others found
    "width": (
        "Does absorption rise with width at matched L0?",
        "Published: Pythia-1.4B, layer 12, L0 32, for 2k, 4k, 16k latents: .013, .036, .054 (L1) and .007, .015, .055 "
        "(TopK); Gemma Scope 2, Gemma-3-1B, L0 about 60, for 16k, 65k, 262k: .096, .157, .192.",
    ),
    "l0": (
        "Does it fall with L0 at fixed width?",
        "Published: full, Gemma Scope 16k, Gemma-2-2B, layer 12, for L0 21, 43, 85, 172, 354, 711: .364, .256, .109, "
        ".064, .027, .014; full, TopK 4k, Pythia-160M, layer 8, for L0 20, 40, 80, 160, 320: .157, .080, .053, .040, "
        ".021 (its fraction rises again from L0 160: .038 at 80, .064 at 160).",
    ),
    "arch": (
        "Which architecture absorbs least?",
        "Published: at 65k and L0 40 full is .05 in Matryoshka against .49 in BatchTopK (Gemma-2-2B); at 4k and L0 20 "
        "on Pythia-160M it is .113 in Matryoshka, .157 in TopK, .096 in JumpReLU. Nobody matched EV.",
    ),
    "main": (
        "How do precision and recall of the main latents move?",
        "The paper (figures 4 and 5): precision of the best latents falls and recall rises with L0, and F1 is best at "
        "an L0 of 25 to 100. Wider SAEs' are more precise and recall less.",
    ),
    "splitting": (
        "Where does splitting set in?",
        "Published: 3.8 main latents per letter in a BatchTopK of 65k at L0 20 (Gemma-2-2B). The paper counts one "
        "less: main latents beside the first.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """What runs of one design found."""

    runs: list[Run]
    cells: list[Cell]
    claims: list[Claim]
    left_out: list[str]
    beyond_chance: tuple[tuple[str, ...], int]
    """names of the cells of enough seeds whose full absorption is beyond chance, and of how many that is known"""
    intervals: dict[tuple[str, str], Interval] = field(default_factory=dict)
    """of each cell's metrics, by the cell's name and the metric"""

    def of(self, question: str) -> list[Claim]:
        """Claims under one heading, main ones first, each once: where splitting sets in may be the whole trend."""
        own = sorted((c for c in self.claims if _heading(c) == question), key=lambda claim: not claim.pooled)
        return list({_same(claim): claim for claim in own}.values())

    def interval(self, cell: Cell, metric: str) -> Interval | None:
        return self.intervals.get((cell.name, metric))

    @property
    def main(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.pooled]


def _same(claim: Claim) -> tuple[Any, ...]:
    """What claims have in common that say the same of an architecture."""
    if claim.pooled and claim.means:
        return claim.where.split(",")[0], claim.metric, claim.ends, round(claim.means[0], 9), round(claim.means[-1], 9)
    return claim.where, claim.metric, claim.question, claim.ends


def _heading(claim: Claim) -> str:
    if claim.question in ("width", "l0") and claim.metric in MAIN_LATENTS:
        return "main"
    if claim.question in ("width", "l0") and claim.metric == "n_split":
        return "splitting"
    return claim.question.split()[0]


def read_study(runs: list[Run]) -> Study:
    """Compare the SAEs of all parts; UserError where nothing can be."""
    every = cells(runs)
    settings = [cell.setting for cell in every]
    found = [cell for cell in every if cell.setting == max(settings, key=settings.count)]
    if not found:
        raise UserError("no SAE of the study has a valid absorption score, so there is nothing to compare")
    intervals = {
        (cell.name, metric): cell.interval(metric) for cell in found for metric in LETTER_METRICS if cell.having(metric)
    }
    repeated = [cell for cell in found if len(cell.saes) >= SEEDS_ASKED]
    known = {cell.name: own for cell in repeated if (own := intervals.get((cell.name, "full_beyond")))}
    beyond = tuple(name for name, own in known.items() if own.low > 0)
    return Study(
        runs=runs,
        cells=found,
        claims=claims(found),
        left_out=_left_out(runs, found, every),
        beyond_chance=(beyond, len(known)),
        intervals=intervals,
    )


def chance_level(cell: Cell) -> float | None:
    """Full absorption that chance gives on as many words as a cell's main latents miss."""
    letters = sorted(cell.having("full_beyond"))
    return float((cell.matrix("full", letters) - cell.matrix("full_beyond", letters)).mean()) if letters else None


def random_level(cell: Cell, score: str) -> float | None:
    """Mean score of the random SAEs beside a cell's."""
    levels = [level for sae in cell.saes if (level := number(sae.chance.get(f"mean_{score}"))) is not None]
    return sum(levels) / len(levels) if levels else None


def _left_out(runs: list[Run], found: list[Cell], every: list[Cell]) -> list[str]:
    """SAEs that are in no cell with the reason, and cells that missed their L0 with what follows from it."""
    used, other = ({(sae.run, sae.name) for cell in own for sae in cell.saes} for own in (found, every))
    lines = [
        f"{sae.name}: {_why_not(sae, (sae.run, sae.name) in other)}"
        for run in runs
        for sae in run.saes
        if (sae.run, sae.name) not in used
    ]
    off = [cell for cell in found if cell.reached and abs(cell.reached / cell.l0 - 1) > CLOSE_L0]
    return lines + [f"{cell.name}: L0 reached is {cell.l0_span}, {_follows(cell)}" for cell in off]


def _why_not(sae: TrainedSAE, is_scored_otherwise: bool) -> str:
    if is_scored_otherwise:
        return (
            "its eval read other activations or words than that of most SAEs (another machine or number format will "
            "do); benchmarks/pool_studies.py compares such parts"
        )
    if sae.failed or sae.invalid or not sae.last_letters:
        return sae.failed or sae.invalid or "it has no absorption score"
    return "no letter counts in all training seeds of its cell, or another SAE of the study is the same"


def _follows(cell: Cell) -> str:
    """What a cell's L0 means for comparisons at a matched one."""
    if on_target(cell):
        return "so at matched L0 it is compared with others of that L0, else by interpolation or not at all"
    return "which is too far off to count as that L0: there it is compared by interpolation or not at all"


def findings(study: Study) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The study's main claims as sentences, by what they are about: the answers, and what stands beside them."""
    trends = {(c.question, c.metric): [] for c in study.main}
    for claim in study.main:
        trends[claim.question, claim.metric].append(_upper(claim.sentence) + _otherwise(study, claim))
    of = lambda *key: trends.get(key, [])  # noqa: E731
    answers = {
        "Width": of("width", "full"),
        "L0": of("l0", "full"),
        "Architectures": _least_at(study, "full"),
        "Beyond chance": of("width", "full_beyond") + of("l0", "full_beyond") + _least_at(study, "full_beyond"),
        "Splitting": [onset(c) for c in study.main if c.question == "splitting"],
        "What the cells are worth": list(_doubts(study)),
    }
    several = len({c.ends for c in study.main if "arch" in c.question}) > 1  # of one pair all is said above
    pairs = "full" if several else "fraction"
    rest = {
        "The fraction": of("width", "fraction") + of("l0", "fraction"),
        "Pairs of architectures": [line for matched in MATCHED for line in of(f"arch at {matched}", pairs)],
        "Precision, recall, number of main latents": [
            *(line for trait in ("width", "l0") for metric in MAIN_LATENTS for line in of(trait, metric)),
            *of("l0", "n_split"),
            *_best_l0(study),
        ],
    }
    return tuple({about: lines for about, lines in group.items() if lines} for group in (answers, rest))


def _otherwise(study: Study, claim: Claim) -> str:
    """Where a part of a mean is told from 0 and the mean is not, or goes the other way."""
    about = lambda c: (c.question, c.metric, c.ends, c.where.split(" at ")[0].split(",")[0])  # noqa: E731
    sign = claim.difference.mean if claim.told_apart else 0.0
    said = [
        _of_part(part)
        for part in study.claims
        if not part.pooled and part.told_apart and part.difference.mean * sign <= 0 and about(part) == about(claim)
    ]
    return f" But {listed(said, len(said))}." if said else ""


def _of_part(part: Claim) -> str:
    rises = part.difference is not None and part.difference.mean > 0
    if "arch" in part.question:
        width = part.where.split(", ")[1]
        return f"at {width} it is {'more' if rises else 'less'} in {part.ends[1]} ({part.figures})"
    return f"at {part.where.split(' at ', 1)[1]} it {'rises' if rises else 'falls'} ({part.figures})"


def _doubts(study: Study) -> Iterator[str]:
    """What has to be known of the cells before a claim that rests on them is read."""
    beyond, known = study.beyond_chance
    if known:
        rest = "" if len(beyond) == known else "; elsewhere it may be what random latents would carry too"
        of = "" if known == len(study.cells) else f" with {SEEDS_ASKED} training seeds"
        yield f"Full absorption is beyond chance in {len(beyond)} of {known} cells{of}{_named(beyond)}{rest}."
    yield from _other_l0(study)
    shares = {cell.name: cell.mean_of("sparsity/dead_fraction") for cell in study.cells}
    dead = [f"{name}: {percent(share)}" for name, share in shares.items() if share is not None and share > MANY_DEAD]
    if dead:
        yield (
            f"More than a tenth of the latents are dead in {len(dead)} of {len(study.cells)} cells{_named(dead)}: what "
            "rests on them says little about their width and L0."
        )


def _other_l0(study: Study) -> Iterator[str]:
    """Where architectures of the same L0 on text have different ones on the words, on which absorption is measured."""
    shares: dict[str, list[float]] = {}
    for cell in study.cells:
        if cell.words_l0 and cell.reached:
            shares.setdefault(cell.arch, []).append(cell.words_l0 / cell.reached)
    means = {arch: sum(own) / len(own) for arch, own in shares.items()}
    if means and max(means.values()) > MUCH_MORE * min(means.values()):
        said = [f"{arch} {fixed(mean, 2)}" for arch, mean in means.items()]
        yield f"L0 on the eval's words is so many times that on text: {listed(said)}."


def _named(cells: Sequence[str]) -> str:
    return f" ({'; '.join(cells)})" if 0 < len(cells) <= MOST_NAMED else ""


def _best_l0(study: Study) -> Iterator[str]:
    """At which L0 the best latent tells the letter best, for each architecture and width with several L0."""
    best = []
    for arch, width in dict.fromkeys((cell.arch, cell.width) for cell in study.cells):
        f1 = {c.l0: own.mean for c in study.cells if (c.arch, c.width) == (arch, width)
              if (own := study.interval(c, "f1_k1"))}  # fmt: skip
        if len(f1) > 1:
            best.append(f"{max(f1, key=f1.__getitem__):g} ({arch}, {width_label(width)}: {fixed(max(f1.values()))})")
    if best:
        yield f"F1 of the best latent is highest at L0 {listed(best, len(best))}."


def _least_at(study: Study, metric: str) -> list[str]:
    return [line for matched in MATCHED if (line := least(study, matched, metric))]


def least(study: Study, matched: str, metric: str = "full") -> str:
    """Name the architecture that absorbs less than every other one at the same L0 or EV, or say that none does; and
    the widths at which another one does."""
    pairs = [c for c in study.main if c.question == f"arch at {matched}" and c.metric == metric]
    if not pairs:
        return ""
    arch = _least_of(pairs)
    elsewhere = _least_elsewhere(study, matched, metric, arch)
    if arch:
        own = [c for c in pairs if arch in c.ends]
        others = own[0].ends[own[0].ends[0] == arch] if len(own) == 1 else "every other architecture"
        among = "; ".join(dict.fromkeys(c.where.split(", ", 1)[1] for c in own))
        said = f"At the same {matched}, {arch} has less {METRICS[metric]} than {others} ({among}): {_minus(own, arch)}."
        return said + elsewhere + (_more_by_fraction(study, matched, arch) if metric == "full" else "")
    shown = [f"{less} less than {more}" for c in pairs if c.told_apart for less, more in [_in_order(c)]]
    missing = [f"{' and '.join(c.ends)} ({c.verdict}{_visible(c)})" for c in pairs if not c.told_apart]
    said = ([f"shown is {listed(shown)}"] if shown else []) + ([f"open are {listed(missing)}"] if missing else [])
    why = f": {'; '.join(said)}" if said else ""
    than = "absorb less" if metric == "full" else f"have less {METRICS[metric]}"
    return f"At the same {matched}, no architecture is shown to {than} than every other one{why}.{elsewhere}"


def _least_of(pairs: Sequence[Claim]) -> str:
    """The architecture that has less than every other one of the pairs; empty where there is none."""
    archs = dict.fromkeys(arch for c in pairs for arch in c.ends)
    for arch in archs:
        own = [c for c in pairs if arch in c.ends]
        if len(own) == len(archs) - 1 and all(_less(c, arch) for c in own):
            return arch
    return ""


def _least_elsewhere(study: Study, matched: str, metric: str, arch: str) -> str:
    """The widths at which another architecture has less than all that could be compared there."""
    by_width: dict[str, list[Claim]] = {}
    for c in study.claims:
        of = c.where.split(", ")[1] if (c.question, c.metric) == (f"arch at {matched}", metric) else ""
        if of.startswith("width ") and c.difference:
            by_width.setdefault(of, []).append(c)
    least_at = {width: found for width, own in by_width.items() if (found := _least_of(own)) and found != arch}
    trained = {f"width {width_label(cell.width)}" for cell in study.cells if cell.arch == arch}
    said = []
    for width, other in least_at.items():
        own, why = by_width[width], "was not compared" if width in trained else "was not trained"
        absent = f", where {arch} {why}," if arch and not any(arch in c.ends for c in own) else ""
        said.append(f"at {width}{absent} it is {other} ({_minus([c for c in own if other in c.ends], other)})")
    return f" But {listed(said, len(said))}." if said else ""


def _minus(pairs: Sequence[Claim], arch: str) -> str:
    """One architecture minus each other one."""
    turned = [c if c.ends[1] == arch else c.turned for c in pairs]
    return "; ".join(f"{arch} minus {c.ends[0]} {c.figures}" for c in turned)


def _more_by_fraction(study: Study, matched: str, arch: str) -> str:
    """Which pairs the fraction puts the other way round."""
    own = [c for c in study.main if c.question == f"arch at {matched}" and c.metric == "fraction" and arch in c.ends]
    other = [c for c in own if c.told_apart and not _less(c, arch)]
    return f" By the fraction it has more: {_minus(other, arch)}." if other else ""


def _in_order(claim: Claim) -> tuple[str, str]:
    """The architectures of a pair that was told apart, the one with less first."""
    return claim.ends[::-1] if _less(claim, claim.ends[1]) else claim.ends


def _less(claim: Claim, arch: str) -> bool:
    """Whether an architecture is the one of the pair with distinguishably less."""
    return claim.told_apart and (claim.difference.mean < 0) == (arch == claim.ends[1])


def _visible(claim: Claim) -> str:
    return f", smallest visible {fixed(claim.difference.visible)}" if claim.difference else ""


def onset(claim: Claim) -> str:
    """Where splitting sets in for one architecture."""
    arch, (first, last) = claim.where.split(",")[0], claim.ends
    if claim.difference is None:
        return f"Splitting in {arch}: {claim.how}."
    besides = f"; {claim.left}" if claim.left else ""
    less, more = fixed(claim.means[0], 2), fixed(claim.means[-1], 2)
    counts = f"{more} main latents per letter against {less} at {first}: {claim.figures}{besides}."
    if claim.verdict == HOLDS:
        return f"Splitting sets in at width {last} in {arch}: {counts}"
    return f"Splitting in {arch} is not seen to set in up to width {last} ({claim.verdict}): {counts}"


def _upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
