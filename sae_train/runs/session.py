"""One run in memory: its source of activations, its learners, and the state that both resume from.

Nothing is written before everything has opened, so that bad input leaves no folder behind.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config import LEAST_HELD_OUT
from sae_train.data.buffer import check_activations, check_held_out, estimate_scale
from sae_train.data.origin import check_same_activations
from sae_train.data.outliers import WithoutOutliers, is_kept, norm_limit
from sae_train.data.sources import kind_of
from sae_train.errors import UserError
from sae_train.runs.plan import Passes
from sae_train.sae.files import load_state, save_state
from sae_train.training.learner import Learner
from sae_train.training.loop import Clock, StopRequest
from sae_train.training.ranks import Ranks, choose_device, current, divide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.sources import Kind, Opened
    from sae_train.protocols import Batches
    from sae_train.runs.initial import InitialSAE
    from sae_train.sae.model import SAE

CALIBRATION_PERIOD = 3  # one held-out activation in three sets the final L0; no figure is measured on those
N_COMPARED = 16  # held-out activations of a saved state, which a resumed run has again
SAMPLE_TOKENS = 16_384  # training activations that set the input scale and the learners' start


@dataclass
class Session:
    """What a run holds; learners see scale · (x − mean) of raw activations x, with ⟨‖·‖²⟩ = d_in.

    `held_out` and `calibration` are raw activations that training never sees, apart from each other. Where outliers are
    left out, those with a norm above `limit` are missing from both, and from the data. SAEs that do not
    fit into memory together are trained in `passes` over the same data; the learners are those of the pass `number`.
    Of several processes (`ranks`) each holds the learners that it trains and looks at and saves those that it owns.
    """

    settings: Settings
    device: torch.device
    opened: Opened
    data: Batches
    held_out: Tensor
    calibration: Tensor
    passes: Passes
    ranks: Ranks
    start: dict[str, Any]
    number: int = 0
    learners: list[Learner] = field(default_factory=list)
    owned: frozenset[str] = frozenset()
    together: bool = False
    scale: float = 0.0
    mean: Tensor | None = None
    limit: float = math.inf
    initial: InitialSAE | None = None
    """what learners start from, None for random directions"""
    begun: int = 0
    """the step from which a finished run goes on"""
    held_out_left_out: int = 0
    step: int = 0
    looked: bool = False
    """whether the looks that are due at this step have been taken"""
    whole: bool = False
    """whether all learners are at this step, so that the session can be saved as it is"""
    clock: Clock = field(default_factory=Clock)
    stop: StopRequest = field(default_factory=StopRequest)
    save: Callable[[], None] = lambda: None
    """writes the state that a resumed run starts from"""
    save_steps: frozenset[int] = frozenset()

    source = property(lambda self: self.opened.source)
    language = property(lambda self: self.opened.language)
    n_steps = property(lambda self: self.settings.n_steps)

    def batches(self) -> Iterator[Tensor]:
        """Scaled training batches, endless; where all processes train together, this one's rows of them."""
        rows = self.ranks.share(self.settings.train.batch_tokens) if self.together else slice(None)
        while True:
            yield self.normalise(next(self.data)[rows].to(self.device))

    def normalise(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Raw activations as the learners see them."""
        return (x if self.mean is None else x - self.mean) * self.scale

    def export(self, learner: Learner) -> SAE:
        """A learner's SAE for raw activations."""
        return learner.export(self.scale, self.mean)

    def leave_out(self, limit: float) -> None:
        """Keep activations whose norm is above the limit away from training and from all held-out figures."""
        assert isinstance(self.data, WithoutOutliers)
        self.limit = self.data.limit = limit
        x = _hold_out(self.settings, self.opened, self.device)
        kept = x[is_kept(x, limit)]
        self.held_out_left_out = len(x) - len(kept)
        self.held_out, self.calibration = split_held_out(kept)
        if len(kept) < LEAST_HELD_OUT:
            raise UserError(
                f"{len(kept)} of {len(x)} held-out activations have a norm of at most {limit:.4g}, as the first "
                f"training ones have, but {LEAST_HELD_OUT} are needed: hold out more or others, or keep outliers by "
                "--outlier-norm none"
            )

    @property
    def outliers(self) -> dict[str, Any] | None:
        """What is left out, for the record of a run; None where nothing is to be."""
        if not isinstance(self.data, WithoutOutliers):
            return None
        norm = self.settings.outlier_norm
        return {
            "median_norm": self.limit / norm if norm and math.isfinite(self.limit) else None,
            "trained": self.data.left_out,
            "held_out": self.held_out_left_out,
            "first_position": self.language is not None and self.language.skip_first,
        }

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Put the data back to where it was if what happens inside fails."""
        start = self.data.state_dict()
        try:
            yield
        except BaseException:
            self.data.load_state_dict(start)
            raise

    @property
    def own_learners(self) -> list[Learner]:
        """The learners that this process looks at and saves."""
        return [learner for learner in self.learners if learner.name in self.owned]

    def calibrate(self, learner: Learner) -> None:
        """Bring a finished learner's L0 to its target, on held-out activations that no figure is measured on."""
        learner.calibrate(self.normalise(self.calibration))

    def last_steps(self) -> dict[str, int]:
        """The last step at which each SAE whose training has begun was looked at; -1 where none was."""
        done = {spec.name: self.n_steps for specs in self.passes[: self.number] for spec in specs}
        return done | {spec.name: self.step - (not self.looked) for spec in self.passes[self.number]}

    def state_dict(self) -> dict[str, Any]:
        """What a bit-equal continuation needs beside the learners' own states."""
        return {
            "pass": self.number,
            "step": self.step,
            "looked": self.looked,
            "scale": self.scale,
            "mean": self.mean,
            "limit": self.limit,
            "seconds": self.clock.training,
            "paused_seconds": self.clock.paused_for,
            "buffer": self.data.state_dict(),
            "first_held_out": self.held_out[:N_COMPARED].cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved moment."""
        self.step, self.scale, self.mean = state["step"], state["scale"], state.get("mean")
        self.looked, self.whole = state.get("looked", True), True  # states of before were saved after their looks
        if self.mean is not None:
            self.mean = self.mean.to(self.device)
        if self.settings.outlier_norm is not None:
            self.leave_out(state["limit"])
        self.clock = Clock(state["seconds"], state["paused_seconds"])
        self.data.load_state_dict(state["buffer"])


def open_session(
    settings: Settings, passes: Passes | None = None, folder: Path | None = None, kind: Kind | None = None,
    initial: InitialSAE | None = None, begun: int = 0,
) -> Session:  # fmt: skip
    """Open the source of activations and make the learners; UserError for whatever cannot work.

    The source is of the kind that the settings name, or `kind`. `passes` is by default all SAEs together; where there
    are more, activations are kept in the run's `folder`.
    """
    device, ranks = choose_device(settings.lm.device), current()
    passes = passes or (tuple(settings.specs),)
    keep = run_cache(folder) if folder and len(passes) > 1 else None
    opened = (kind or kind_of(settings)).open(settings, device, ranks, keep)
    held_out = _hold_out(settings, opened, device)
    check_held_out(len(held_out), opened.source.name)
    check_activations(held_out, opened.source)
    data = opened.source.batches(settings.train.batch_tokens)
    if settings.outlier_norm is not None:
        data = WithoutOutliers(data, settings.train.batch_tokens)
    session = Session(
        settings, device, opened, data, *split_held_out(held_out), passes, ranks, data.state_dict(),
        initial=initial, begun=begun,
    )  # fmt: skip
    enter(session, 0)
    return session


def _hold_out(settings: Settings, opened: Opened, device: torch.device) -> Tensor:
    """The source's held-out activations, the same ones at every call."""
    return opened.source.held_out(settings.data.held_out_tokens).to(device)


def split_held_out(held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Those that figures are measured on, and those that calibrate."""
    for_calibration = torch.arange(len(held_out), device=held_out.device) % CALIBRATION_PERIOD == 0
    return held_out[~for_calibration], held_out[for_calibration]


def run_cache(folder: Path) -> Path:
    """Where a run keeps activations that nobody asked to keep."""
    return folder / "activations"


def enter(session: Session, number: int) -> None:
    """Go to the start of a pass: its learners of this process in the place of the last pass's, the data rewound."""
    session.learners = []  # before new ones are made
    settings, ranks, specs = session.settings, session.ranks, session.passes[number]
    division = divide([spec.width for spec in specs], ranks, settings.train.batch_tokens)
    session.together = division.together
    together = ranks if division.together else Ranks()
    owners = dict(zip(specs, division.owners, strict=True))
    session.learners = [
        Learner(spec, settings.train, session.source.d_in, settings.n_steps, session.device, together, session.begun)
        for spec, owner in owners.items()
        if division.together or owner == ranks.rank
    ]
    session.owned = frozenset(spec.name for spec, owner in owners.items() if owner == ranks.rank)
    session.number, session.step, session.looked, session.whole = number, 0, False, False
    session.data.load_state_dict(session.start)


def begin(session: Session) -> None:
    """Set what an outlier is, the mean, the input scale and the learners' start from the first training activations.

    The data stays where it is.
    """
    sample = session.data.peek(SAMPLE_TOKENS).to(session.device)
    check_activations(sample, session.source)
    if session.settings.outlier_norm is not None and math.isinf(session.limit):  # else set in an earlier pass
        session.leave_out(norm_limit(sample, session.settings.outlier_norm))
        sample = sample[is_kept(sample, session.limit)]
        check_activations(sample, session.source)
    session.mean = sample.mean(0) if session.settings.train.center else None
    session.scale = estimate_scale(sample if session.mean is None else sample - session.mean)
    for learner in session.learners:
        if session.initial:
            learner.inherit(session.initial.sae, session.scale, session.mean)
        else:
            learner.initialise(session.normalise(sample))
    if session.initial:
        session.initial.forget()
    session.whole = True


def save(session: Session, folder: Path) -> None:
    """Write state/step-N whole, every process the learners it owns, then remove older ones."""
    target = folder / "state" / f"step-{session.number * session.n_steps + session.step:09d}"
    if target.exists():  # never is there none that is whole
        target = target.with_name(f"{target.name}-again")
    temporary = target.with_name(f"{target.name}.tmp")
    ranks = session.ranks
    ranks.first(lambda: _make_empty(temporary))
    if ranks.is_first:
        save_state(temporary, session.state_dict())
    for learner in session.own_learners:
        save_state(temporary / learner.name, learner.state_dict())
    ranks.wait()
    ranks.first(lambda: _put_alone(temporary, target))


def load(session: Session, saved: Path) -> None:
    """Go back to a saved moment, which any number of processes may have written; UserError for other activations."""
    state = load_state(saved)
    if state["pass"] != session.number:
        enter(session, state["pass"])
    session.load_state_dict(state)
    if "first_held_out" in state:  # states of before have none
        check_same_activations(state["first_held_out"], session.held_out[:N_COMPARED].cpu(), session.source.name)
    for learner in session.learners:
        learner.load_state_dict(load_state(saved / learner.name))


def newest_state(folder: Path) -> Path | None:
    """Where the newest whole state of a run is, or None if it never got that far."""
    states = sorted(path for path in (folder / "state").glob("step-*") if path.suffix != ".tmp")
    return states[-1] if states else None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _put_alone(temporary: Path, target: Path) -> None:
    """Give a complete state its name and remove all others."""
    if target.exists():
        shutil.rmtree(target)
    temporary.replace(target)
    for old in target.parent.iterdir():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
