"""When a run looks at its SAEs, and what it asks: training figures, held-out figures and evals, hook by hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_train.evals import fidelity
from sae_train.evals.presets import get_preset
from sae_train.runs import callbacks
from sae_train.training import loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from sae_train.evals.assets import Assets
    from sae_train.protocols import Callback
    from sae_train.runs.display import Display
    from sae_train.runs.session import Session

N_LOGGED = 100


class Looks:
    """The looks at the SAEs of a session; `absorption` holds the evals of this pass by hook.

    `assets` are those of the hooks where the absorption eval is run, `own` evals of a user's own; `keep` takes the
    tables of the absorption eval.
    """

    def __init__(
        self, opened: Session, assets: dict[str, Assets], own: Sequence[Callback],
        keep: Callable[[pd.DataFrame, pd.DataFrame], None], display: Display,
    ):  # fmt: skip
        self.session, self.settings, self.assets = opened, opened.settings, assets
        self.own, self.keep, self.display = list(map(callbacks.check_callback, own)), keep, display
        self.absorption: dict[str, callbacks.Absorption] = {}
        self._fidelity_data: dict[str, fidelity.FidelityData] = {}

    def schedule(self) -> list[loop.Scheduled]:
        """Training figures often; held-out figures, loss recovered and absorption at the same, fewer steps."""
        opened, settings, n_steps = self.session, self.settings, self.settings.n_steps
        looks = loop.spread(settings.eval.absorption_evals, n_steps)
        often = loop.every(settings.run.log_every or -(-n_steps // N_LOGGED), n_steps)
        if not opened.own_learners:
            return [loop.Scheduled(lambda learner, step: (), steps, whole=steps == looks) for steps in (often, looks)]
        figures = callbacks.TrainingFigures(opened.clock, settings.train.batch_tokens, opened.step)
        made = [loop.Scheduled(figures, often | looks)]
        for hook in dict.fromkeys(learner.spec.hook for learner in opened.own_learners):
            made += self._at_hook(hook, looks)
        return made

    def _at_hook(self, hook: str, looks: frozenset[int]) -> list[loop.Scheduled]:
        """Held-out figures and evals of the SAEs of one hook."""
        stream, how, n_steps = self.session.streams[hook], self.settings.eval, self.settings.n_steps
        held_out = callbacks.HeldOut(stream.normalise(stream.held_out), stream.held_out * stream.scale)
        made = [(look, looks) for look in (held_out, *self._evals(hook))]
        if hook in self.assets:
            assets = self.assets[hook]
            self.absorption[hook] = callbacks.Absorption(
                stream.language.lm, assets, how, stream.export, n_steps, self.keep, held_out.l0_of, self.display
            )
            # Where too few letters can be read off the model itself, one look records that; more would say the same.
            readable = int(assets.letters_that_count.sum()) >= assets.n_needed(get_preset(how.preset))
            made.append((self.absorption[hook], looks if readable else frozenset({n_steps})))
        return [loop.Scheduled(callbacks.only_at(hook, look), steps, whole=True) for look, steps in made]

    def _evals(self, hook: str) -> list[loop.Look]:
        """Loss recovered where there is a language model, what the source can be asked, and evals of a user's own."""
        stream = self.session.streams[hook]
        own = [callbacks.Own(each, stream.export) for each in (*stream.opened.callbacks, *self.own)]
        if not stream.language:
            return own
        learners = [learner for learner in self.session.own_learners if learner.spec.hook == hook]
        data, split = self._read_clean(hook), self.session.mesh.width.size > 1
        # Of SAEs in shards one alone is whole at a time.
        shared = [] if split else learners
        return [callbacks.Fidelity(stream.language.lm, data, stream.export, shared, self.display), *own]

    def _read_clean(self, hook: str) -> fidelity.FidelityData:
        """The passes of the language model that all SAEs of a hook share, made once a run."""
        if hook not in self._fidelity_data:
            language = self.session.streams[hook].language
            rows = language.rows[: max(1, fidelity.FIDELITY_TOKENS // language.context)]
            self._fidelity_data[hook] = fidelity.FidelityData.build(language.lm, rows, language.drop_ids)
        return self._fidelity_data[hook]
