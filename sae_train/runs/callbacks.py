"""What happens between steps: training figures, held-out figures, loss recovered, absorption, evals of a user's own.

Each class is called with (learner, step) and yields (name, value) pairs for metrics.jsonl; none changes a learner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError
from sae_train.evals import absorption, assets, fidelity
from sae_train.evals.asset_cache import cache_folder
from sae_train.evals.contexts import show_nothing
from sae_train.evals.events import trace
from sae_train.evals.hierarchy import PLAIN_TEMPLATE, get_hierarchy
from sae_train.files import OUR_FIGURES, own_figures
from sae_train.training.metrics import held_out_metrics, totals

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.config import EvalSettings
    from sae_train.evals.absorption import AbsorptionResult
    from sae_train.evals.assets import Assets
    from sae_train.evals.contexts import Progress
    from sae_train.protocols import SAE, Callback, LanguageModel
    from sae_train.training.learner import Learner
    from sae_train.training.loop import Clock, Look

Pairs = Iterable[tuple[str, Any]]
Export = Callable[["Learner"], "SAE"]
"""makes a learner's SAE for raw activations"""
DEAD = "sparsity/dead_features"
FAR_FROM_L0 = 0.1  # of the L0 asked for: an SAE that is further off has no score


def only_at(hook: str, look: Look) -> Look:
    """Let a look see the SAEs of one hook alone."""
    return lambda learner, step: look(learner, step) if learner.spec.hook == hook else ()


class TrainingFigures:
    """The numbers of the last training step, and the speed since the start of this process."""

    def __init__(self, clock: Clock, batch_tokens: int, start: int):
        self.clock, self.batch_tokens, self.start = clock, batch_tokens, start
        self._seconds_before = clock.training

    def __call__(self, learner: Learner, step: int) -> Pairs:
        could_die = learner.dead_tokens <= learner.n_steps * self.batch_tokens
        for name, value in learner.last.items():
            if could_die or name != DEAD:  # else 0 would be no finding
                yield name, float(value)
        if could_die and DEAD in learner.last:
            yield "sparsity/dead_fraction", float(learner.last[DEAD]) / learner.spec.width
        seconds = self.clock.training - self._seconds_before
        if step > self.start and seconds > 0:
            yield "details/tokens_per_second", (step - self.start) * self.batch_tokens / seconds


class HeldOut:
    """L0, explained variance and density on held-out activations (n, d_in), as learners see them.

    `uncentred` are the same without a mean subtracted: mse is a share of their Σ‖x‖².
    """

    def __init__(self, x: Float[Tensor, "n d_in"], uncentred: Float[Tensor, "n d_in"]):
        self.x, self.totals = x, totals(uncentred)

    def l0_of(self, learner: Learner) -> float:
        """Its L0 as it is now."""
        return float(held_out_metrics(learner.whole, self.x, self.totals)["metrics/l0"])

    def __call__(self, learner: Learner, step: int) -> Pairs:
        figures = held_out_metrics(learner.whole, self.x, self.totals)
        density = figures.pop("density")
        yield from figures.items()
        yield "sparsity/silent_fraction", (density == 0).float().mean().item()
        yield "sparsity/log10_density_histogram", density_histogram(density)


def density_histogram(density: Float[Tensor, " d_sae"]) -> list[int]:
    """Count latents by log10 of their frequency: half-decade bins from 1e-5 to 1, rarer ones in the first bin."""
    fired = density[density > 0].log10().clamp(-5, 0)
    return torch.histc(fired.float().cpu(), bins=10, min=-5, max=0).int().tolist()


class Fidelity:
    """Loss recovered when the reconstruction replaces the activation.

    At a step all SAEs (`learners`) are measured at the first one's turn, so that they share the language model's clean
    pass; where none are named each is measured at its own.
    """

    def __init__(
        self, lm: LanguageModel, data: fidelity.FidelityData, export: Export, learners: Sequence[Learner],
        progress: Progress = show_nothing,
    ):  # fmt: skip
        """`progress` hears how far a look is."""
        self.lm, self.data, self.export, self.learners, self.progress = lm, data, export, learners, progress
        self._step, self._figures = -1, {}

    def __call__(self, learner: Learner, step: int) -> Pairs:
        if step != self._step or learner.name not in self._figures:
            together = [each for each in self.learners if each.failed is None]
            makers = {each.name: partial(self.export, each) for each in together or [learner]}
            figures = fidelity.losses_recovered(self.lm, list(makers.values()), self.data, self.progress)
            self._step, self._figures = step, dict(zip(makers, figures, strict=True))
        yield from self._figures[learner.name].items()


class Own:
    """A protocols.Callback of a user's own or of a source: `f(sae, step)` yields (name, value) pairs."""

    def __init__(self, callback: Callback, export: Export):
        self.callback, self.export = callback, export

    def __call__(self, learner: Learner, step: int) -> Pairs:
        return self.callback(self.export(learner), step) or ()


def check_callback(callback: Callback) -> Callback:
    """Return a user's callback that yields only what JSON can hold, under names of its own; UserError for the rest."""
    who = f"the callback {getattr(callback, '__name__', type(callback).__name__)}"

    def yield_checked(sae: SAE, step: int) -> Pairs:
        for pair in callback(sae, step) or ():
            try:
                name, value = pair
                value = value if value is None or isinstance(value, str | bool | int | float) else float(value)
            except (TypeError, ValueError, RuntimeError):
                raise UserError(
                    f"{who} yielded {pair!r}: it must yield pairs of a name and a number, such as ('mine/purity', 0.5)"
                ) from None
            if not isinstance(name, str) or not own_figures({name: value}):
                raise UserError(
                    f"{who} yielded the name {name!r}: give a name of its own, such as 'mine/purity', that begins with "
                    f"none of {', '.join(OUR_FIGURES)}"
                )
            yield name, value

    return yield_checked


class Absorption:
    """The absorption eval. `keep` gets two tables: letters (with words at the last look), the trace of words."""

    def __init__(
        self, lm: LanguageModel, assets: Assets, settings: EvalSettings, export: Export, last_step: int,
        keep: Callable[[pd.DataFrame, pd.DataFrame], None], l0_of: Callable[[Learner], float],
        progress: Progress = show_nothing,
    ):  # fmt: skip
        """`progress` hears what a look is busy with."""
        self.lm, self.assets, self.settings, self.export = lm, assets.to(lm.device), settings, export
        self.last_step, self.keep, self.l0_of, self.progress = last_step, keep, l0_of, progress
        self.results: dict[str, AbsorptionResult] = {}

    def __call__(self, learner: Learner, step: int) -> Pairs:
        start = time.perf_counter()
        self.results.pop(learner.name, None)
        result = self.result_of(learner, step)
        table = result.table(learner.name, step, with_words=step == self.last_step)
        tables = table, trace(result).assign(sae=learner.name, step=step)
        hook = learner.spec.hook
        self.keep(*(each.assign(hook_name=hook) for each in tables) if hook else tables)
        yield from result.metrics().items()
        yield "absorption/seconds", time.perf_counter() - start

    def result_of(self, learner: Learner, step: int | None = None) -> AbsorptionResult:
        """The result at the last look; measured now where a resumed run has had none.

        After the last step it counts only for an SAE that has about the L0 that was asked for.
        """
        if learner.name not in self.results:
            sae, how = self.export(learner), self.settings
            result = absorption.evaluate(
                sae, self.assets, how.preset, how.eval_seed, self.lm, self.progress_of(learner)
            )
            if result.valid and step in (None, self.last_step):
                asked, reached = learner.spec.l0, self.l0_of(learner)
                if not abs(reached / asked - 1) <= FAR_FROM_L0:
                    reason = f"the SAE has L0 {reached:.2f} where {asked:g} was asked"
                    result = replace(result, valid=False, reason=reason)
            self.results[learner.name] = result
        return self.results[learner.name]

    def progress_of(self, learner: Learner) -> Progress:
        """A Progress that says whose eval it is."""
        return lambda doing, done=0, of=1: self.progress(f"{learner.name}: {doing}", done, of)


def build_assets(
    lm: LanguageModel | None, settings: EvalSettings, progress: Progress = show_nothing
) -> tuple[Assets | None, list[str]]:
    """Make what the eval needs of this model, once; (None, notes) where it is off, there is no language model, or the
    tokenizer rules it out.

    A template that the user named must work (UserError); otherwise the hierarchy's own is taken, or else one that asks
    for no answer. `progress` hears how far it is.
    """
    if not settings.absorption or lm is None:
        return None, []
    hierarchy, folder = get_hierarchy(settings.hierarchy), cache_folder(settings.eval_cache)
    problems = []
    fallbacks = dict.fromkeys([hierarchy.template, PLAIN_TEMPLATE])
    for template in [settings.template] if settings.template else fallbacks:
        try:
            built = assets.build(
                lm,
                hierarchy=hierarchy,
                template=template,
                seed=settings.eval_seed,
                preset=settings.preset,
                n_words=settings.eval_words,
                contexts=settings.eval_contexts,
                progress=progress,
                cache_dir=folder,
            )
        except UserError as error:
            if settings.template:
                raise
            problems.append(f"with the template {template!r}: {error}")
            continue
        instead = [f"{problem}; the template {template!r} is used instead" for problem in problems]
        return built, [f"absorption eval: {note}" for note in instead + built.notes]
    return None, [f"the absorption eval cannot run on {lm.name}: {'; '.join(problems)}"]
