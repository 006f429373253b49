"""One run in memory: its streams of activations, its learners, and the state that both resume from.

Nothing is written before everything has opened, so that bad input leaves no folder behind.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data.sources import kind_of
from sae_train.runs.plan import Passes, check_alone
from sae_train.runs.stream import open_stream
from sae_train.sae.files import load_state, save_state
from sae_train.training.learner import Learner
from sae_train.training.loop import Clock, StopRequest
from sae_train.training.ranks import Mesh, Ranks, arrange, choose_device, current, divide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.sources import Kind
    from sae_train.runs.initial import InitialSAE
    from sae_train.runs.stream import Stream


@dataclass
class Session:
    """What a run holds: a stream of activations for each hook, by its name or, where there is one alone, "".

    SAEs that do not fit into memory together are trained in `passes` over the same data; the learners are those of the
    pass `number`. Of several processes (`ranks`, in teams by `mesh`) each holds the learners that its team trains; the
    team looks at and saves those that it owns.
    """

    settings: Settings
    device: torch.device
    streams: dict[str, Stream]
    passes: Passes
    ranks: Ranks
    mesh: Mesh = field(default_factory=Mesh)
    number: int = 0
    learners: list[Learner] = field(default_factory=list)
    owned: frozenset[str] = frozenset()
    together: bool = False
    initial: InitialSAE | None = None
    """what learners start from, None for random directions"""
    begun: int = 0
    """the step from which a finished run goes on"""
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

    n_steps = property(lambda self: self.settings.n_steps)
    first = property(lambda self: next(iter(self.streams.values())))
    """the first hook's stream: model and text are those of all"""

    def of(self, learner: Learner) -> Stream:
        """The activations that a learner sees."""
        return self.streams[learner.spec.hook]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Scaled training batches by hook, endless; where all processes train together, this one's rows of them."""
        rows = self.mesh.data.share(self.settings.train.batch_tokens) if self.together else slice(None)
        while True:
            yield {
                hook: stream.normalise(next(stream.data)[rows].to(self.device)) for hook, stream in self.streams.items()
            }

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Put the data back to where it was if what happens inside fails."""
        starts = {hook: stream.data.state_dict() for hook, stream in self.streams.items()}
        try:
            yield
        except BaseException:
            for hook, stream in self.streams.items():
                stream.data.load_state_dict(starts[hook])
            raise

    @property
    def own_learners(self) -> list[Learner]:
        """The learners that this process looks at."""
        return [learner for learner in self.team_learners if learner.leads]

    @property
    def team_learners(self) -> list[Learner]:
        """The learners that this process looks at and saves, alone or with its team."""
        return [learner for learner in self.learners if learner.name in self.owned]

    def calibrate(self, learner: Learner) -> None:
        """Bring a finished learner's L0 to its target, on held-out activations that no figure is measured on."""
        stream = self.of(learner)
        learner.calibrate(stream.normalise(stream.calibration))

    def last_steps(self) -> dict[str, int]:
        """The last step at which each SAE whose training has begun was looked at; -1 where none was."""
        done = {spec.name: self.n_steps for specs in self.passes[: self.number] for spec in specs}
        return done | {spec.name: self.step - (not self.looked) for spec in self.passes[self.number]}

    def state_dict(self) -> dict[str, Any]:
        """What a bit-equal continuation needs beside the learners' own states."""
        streams = {hook: stream.state_dict() for hook, stream in self.streams.items()}
        return {
            "pass": self.number,
            "step": self.step,
            "looked": self.looked,
            "seconds": self.clock.training,
            "paused_seconds": self.clock.paused_for,
        } | (streams.get("") or {"streams": streams})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved moment."""
        self.step = state["step"]
        self.looked, self.whole = state.get("looked", True), True  # states of before were saved after their looks
        self.clock = Clock(state["seconds"], state["paused_seconds"])
        for hook, stream in self.streams.items():
            stream.load_state_dict(state["streams"][hook] if hook else state)


def open_session(
    settings: Settings, passes: Passes | None = None, folder: Path | None = None, kind: Kind | None = None,
    initial: InitialSAE | None = None, begun: int = 0,
) -> Session:  # fmt: skip
    """Open the source of activations and make the learners; UserError for whatever cannot work.

    The source is of the kind that the settings name, or `kind`. `passes` is by default all SAEs together; where there
    are more, activations are kept in the run's `folder`.
    """
    device, ranks = choose_device(settings.lm.device), current()
    check_alone(settings, ranks)
    passes = passes or (tuple(settings.specs),)
    keep = run_cache(folder) if folder and len(passes) > 1 else None
    opened = (kind or kind_of(settings)).open(settings, device, ranks, keep)
    streams = {hook: open_stream(settings, each, device) for hook, each in opened.items()}
    mesh = arrange(ranks, settings.train.shard_width)
    session = Session(settings, device, streams, passes, ranks, mesh, initial=initial, begun=begun)
    enter(session, 0)
    return session


def run_cache(folder: Path) -> Path:
    """Where a run keeps activations that nobody asked to keep."""
    return folder / "activations"


def enter(session: Session, number: int) -> None:
    """Go to the start of a pass: its learners of this process in the place of the last pass's, the data rewound."""
    session.learners = []  # before new ones are made
    settings, mesh, specs = session.settings, session.mesh, session.passes[number]
    division = divide([spec.width for spec in specs], mesh.data, settings.train.batch_tokens)
    session.together, team = division.together, mesh.data.rank
    owners = dict(zip(specs, division.owners, strict=True))
    session.learners = [
        Learner(
            spec,
            settings.train,
            session.streams[spec.hook].source.d_in,
            settings.n_steps,
            session.device,
            mesh if division.together else Mesh(width=mesh.width),
            session.begun,
        )
        for spec, owner in owners.items()
        if division.together or owner == team
    ]
    session.owned = frozenset(spec.name for spec, owner in owners.items() if owner == team)
    session.number, session.step, session.looked, session.whole = number, 0, False, False
    for stream in session.streams.values():
        stream.data.load_state_dict(stream.start)


def begin(session: Session) -> None:
    """Set each hook's outliers, mean and scale, and the learners' start, from the first training activations.

    The data stays where it is.
    """
    samples = {hook: stream.begin() for hook, stream in session.streams.items()}
    for learner in session.learners:
        stream = session.of(learner)
        if session.initial:
            learner.inherit(session.initial.sae, stream.scale, stream.mean)
        else:
            learner.initialise(samples[learner.spec.hook])
    if session.initial:
        session.initial.forget()
    session.whole = True


def save(session: Session, folder: Path) -> None:
    """Write state/step-N whole, every process what it holds of the learners it owns, then remove older ones."""
    target = folder / "state" / f"step-{session.number * session.n_steps + session.step:09d}"
    if target.exists():  # never is there none that is whole
        target = target.with_name(f"{target.name}-again")
    temporary = target.with_name(f"{target.name}.tmp")
    ranks = session.ranks
    ranks.first(lambda: _make_empty(temporary))
    try:
        if ranks.is_first:
            save_state(temporary, session.state_dict())
        for learner in session.team_learners:
            save_state(_place_of(learner, temporary), learner.state_dict())
    except OSError:  # a disk that is full needs the room
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    ranks.wait()
    ranks.first(lambda: _put_alone(temporary, target))


def load(session: Session, saved: Path) -> None:
    """Go back to a saved moment, which any number of processes may have written; UserError for other activations."""
    state = load_state(saved)
    if state["pass"] != session.number:
        enter(session, state["pass"])
    session.load_state_dict(state)
    for learner in session.learners:
        learner.load_state_dict(load_state(_place_of(learner, saved)))


def _place_of(learner: Learner, saved: Path) -> Path:
    """Where a saved moment has the state of a learner, or of those of its latents that this process holds."""
    shards = learner.mesh.width
    own = saved / learner.name
    return own if shards.size == 1 else own / f"{shards.rank}-of-{shards.size}"


def note_processes(session: Session, before: int | None) -> list[str]:
    """Say what it changes that a run goes on with another number of processes than it had `before`."""
    now = session.ranks.size
    if before in (None, now):
        return []
    widths = [spec.width for spec in session.passes[session.number]]
    teams = before // session.mesh.width.size
    summed = session.together or divide(widths, replace(session.mesh.data, size=teams), teams).together
    what = (
        "gradients are summed in another order, so that weights differ by rounding (and, where many latents are dead, "
        "by the tokens that the loss on them takes)"
        if summed
        else "each SAE has another process, and on CPUs with as many threads each the same bits"
    )
    return [f"begun on {_count(before)}, resumed on {now}: from step {session.step} on {what}"]


def newest_state(folder: Path) -> Path | None:
    """Where the newest whole state of a run is, or None if it never got that far."""
    states = sorted(path for path in (folder / "state").glob("step-*") if path.suffix != ".tmp")
    return states[-1] if states else None


def _count(processes: int) -> str:
    return f"{processes} processes" if processes > 1 else "1 process"


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
