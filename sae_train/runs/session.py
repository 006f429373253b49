"""One run in memory: settings in; language model (or toy), data, learners and their saved state out.

Nothing is written before everything has opened, so that bad input leaves no folder behind.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data.activation_cache import ActivationCache, files_of, key_of
from sae_train.data.buffer import ActivationBuffer, estimate_scale, held_out_activations
from sae_train.data.language_model import load_language_model
from sae_train.data.tokens import open_tokens
from sae_train.data.toy import ToyStream, held_out_sample, open_toy
from sae_train.errors import UserError
from sae_train.runs.plan import Passes
from sae_train.sae.files import load_state, save_state
from sae_train.training.learner import Learner
from sae_train.training.loop import Clock
from sae_train.training.ranks import Ranks, choose_device, current, divide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.language_model import LanguageModel
    from sae_train.data.tokens import TokenStream
    from sae_train.data.toy import Toy

LM_BATCH_TOKENS = 4096
CALIBRATION_PERIOD = 3  # one held-out activation in three sets the final L0; no figure is measured on those
SAMPLE_TOKENS = 16_384  # training activations that set the input scale and the learners' start


@dataclass
class Session:
    """What a run holds; `scale` maps raw activations to ⟨‖x‖²⟩ = d_in.

    A toy's stream is its buffer too, and it has no tokens to drop. `held_out` and `calibration` are raw activations
    that training never sees, apart from each other. SAEs that do not fit into memory together are trained in `passes`
    over the same data; the learners are those of the pass `number`. Of several processes (`ranks`) each holds the
    learners that it trains and looks at and saves those that it owns.
    """

    settings: Settings
    model: LanguageModel | Toy
    stream: TokenStream | ToyStream
    buffer: ActivationBuffer | ToyStream
    drop_ids: set[int]
    held_out: Tensor
    calibration: Tensor
    passes: Passes
    ranks: Ranks
    start: dict[str, Any]
    cache: ActivationCache | None = None
    number: int = 0
    learners: list[Learner] = field(default_factory=list)
    owned: frozenset[str] = frozenset()
    together: bool = False
    scale: float = 0.0
    step: int = 0
    clock: Clock = field(default_factory=Clock)

    def batches(self) -> Iterator[Tensor]:
        """Scaled training batches, endless; where all processes train together, this one's rows of them."""
        rows = self.ranks.share(self.buffer.batch_tokens) if self.together else slice(None)
        for x in self.buffer:
            yield x[rows] * self.scale

    @property
    def own_learners(self) -> list[Learner]:
        """The learners that this process looks at and saves."""
        return [learner for learner in self.learners if learner.name in self.owned]

    def reached(self) -> dict[str, int]:
        """The last step of each SAE whose training has begun; at step 0 it begins anew."""
        done = {spec.name: self.settings.n_steps for specs in self.passes[: self.number] for spec in specs}
        return done | {spec.name: self.step or -1 for spec in self.passes[self.number]}

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a bit-equal continuation needs beside the learners' own states."""
        return {
            "pass": self.number,
            "step": step,
            "scale": self.scale,
            "seconds": self.clock.training,
            "paused_seconds": self.clock.paused_for,
            "buffer": self.buffer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved moment."""
        self.step, self.scale = state["step"], state["scale"]
        self.clock = Clock(state["seconds"], state["paused_seconds"])
        self.buffer.load_state_dict(state["buffer"])


def open_session(settings: Settings, passes: Passes | None = None, folder: Path | None = None) -> Session:
    """Load the language model, open the text and make the learners; UserError for whatever cannot work.

    `passes` is by default all SAEs together; where there are more, activations are kept in the run's `folder`.
    """
    device = choose_device(settings.lm.device)
    ranks = current()
    passes = passes or (tuple(settings.specs),)
    if settings.is_toy:
        return open_toy_session(settings, device, passes, ranks)
    lm = open_model(settings, device)
    shared = lm.shared_by(ranks)
    context = settings.context(lm.context)
    stream = open_tokens(
        settings.dataset,
        lm.tokenizer,
        context=context,
        sequences=max(1, LM_BATCH_TOKENS // context),
        bos_id=lm.bos_id,
        text_column=settings.data.text_column,
        held_out_tokens=settings.data.held_out_tokens,
    )
    drop = drop_ids(lm, settings.data.drop)
    held_out = held_out_activations(shared, stream.held_out, drop, settings.data.held_out_tokens)
    cache = None
    if settings.data.activation_cache or len(passes) > 1:
        cache = open_cache(settings, lm, stream, held_out, folder, ranks)
    buffer = ActivationBuffer(
        shared,
        stream,
        batch_tokens=settings.train.batch_tokens,
        buffer_tokens=settings.data.buffer_tokens,
        drop_ids=drop,
        seed=0,
        cache=cache,
    )
    return _session(settings, lm, stream, buffer, drop, held_out, passes, ranks, cache)


def open_cache(
    settings: Settings, lm: LanguageModel, stream: TokenStream, held_out: Tensor, folder: Path | None, ranks: Ranks
) -> ActivationCache:
    """Name what the activations are made from: settings, text files, the first tokens, the held-out activations."""
    if ranks.size > 1:
        raise UserError("activations are kept on disk by one process only: leave --activation-cache out")
    start = stream.state_dict()
    first = next(stream)
    stream.load_state_dict(start)
    made_from = {
        "data": settings.data.model_dump(mode="json", exclude={"activation_cache"}), "hook": lm.hook_name,
        "batch_tokens": settings.train.batch_tokens, "files": files_of(settings.dataset),
    }  # fmt: skip
    key = key_of(made_from, first, held_out)
    asked = settings.data.activation_cache
    return ActivationCache(Path(asked).expanduser() if asked else run_cache(folder), key, lm.dtype)


def run_cache(folder: Path) -> Path:
    """Where a run keeps activations that nobody asked to keep."""
    return folder / "activations"


def open_toy_session(settings: Settings, device: torch.device, passes: Passes, ranks: Ranks) -> Session:
    """Plant the toy that the settings name and make the learners; each process makes all samples."""
    toy = open_toy(settings.dataset, device)
    stream = ToyStream(toy, settings.train.batch_tokens)
    held_out = held_out_sample(toy, settings.data.held_out_tokens).x
    return _session(settings, toy, stream, stream, set(), held_out, passes, ranks)


def _session(
    settings: Settings, model: LanguageModel | Toy, stream: Any, buffer: Any, drop: set[int], held_out: Tensor,
    passes: Passes, ranks: Ranks, cache: ActivationCache | None = None,
) -> Session:  # fmt: skip
    """Divide held-out activations, and enter the first pass."""
    for_calibration = torch.arange(len(held_out), device=held_out.device) % CALIBRATION_PERIOD == 0
    opened = Session(
        settings, model, stream, buffer, drop, held_out[~for_calibration], held_out[for_calibration], passes, ranks,
        buffer.state_dict(), cache,
    )  # fmt: skip
    enter(opened, 0)
    return opened


def enter(session: Session, number: int) -> None:
    """Go to the start of a pass: its learners of this process in the place of the last pass's, the data rewound."""
    session.learners = []  # before new ones are made
    settings, ranks, specs = session.settings, session.ranks, session.passes[number]
    division = divide([spec.width for spec in specs], ranks, settings.train.batch_tokens)
    session.together = division.together
    together = ranks if division.together else Ranks()
    owners = dict(zip(specs, division.owners, strict=True))
    session.learners = [
        Learner(spec, settings.train, session.model.d_in, settings.n_steps, session.model.device, together)
        for spec, owner in owners.items()
        if division.together or owner == ranks.rank
    ]
    session.owned = frozenset(spec.name for spec, owner in owners.items() if owner == ranks.rank)
    session.number, session.step = number, 0
    session.buffer.load_state_dict(session.start)


def open_model(settings: Settings, device: torch.device) -> LanguageModel:
    """Load the language model that the settings name."""
    lm = settings.lm
    return load_language_model(lm.model, lm.hook, device, lm.dtype, lm.trust_remote_code)


def drop_ids(lm: LanguageModel, strings: tuple[str, ...]) -> set[int]:
    """Token ids of the strings left out of SAE training; UserError for a string that is not one token."""
    ids = {string: lm.tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings}
    wrong = [repr(string) for string, tokens in ids.items() if len(tokens) != 1]
    if wrong:
        raise UserError(f"drop: {', '.join(wrong)} is not a single token of {lm.name}: name whole tokens")
    return {tokens[0] for tokens in ids.values()}


def begin(session: Session) -> None:
    """Set the input scale and the learners' start from the first training activations, then rewind the data."""
    sample = first_activations(session)
    session.scale = estimate_scale(sample)
    for learner in session.learners:
        learner.initialise(sample * session.scale)


def first_activations(session: Session) -> Tensor:
    """The first SAMPLE_TOKENS training activations; the data stays where it is."""
    if isinstance(session.buffer, ToyStream):
        return session.buffer.peek(SAMPLE_TOKENS)
    start = session.stream.state_dict()
    rows = [next(session.stream) for _ in range(-(-SAMPLE_TOKENS // LM_BATCH_TOKENS))]
    session.stream.load_state_dict(start)
    return held_out_activations(session.buffer.lm, torch.cat(rows), session.drop_ids, SAMPLE_TOKENS, at_least=1)


def save(session: Session, folder: Path, step: int) -> None:
    """Write state/step-N whole, every process the learners it owns, then remove older ones."""
    target = folder / "state" / f"step-{session.number * session.settings.n_steps + step:09d}"
    temporary = target.with_name(f"{target.name}.tmp")
    ranks = session.ranks
    ranks.first(lambda: _make_empty(temporary))
    if ranks.is_first:
        save_state(temporary, session.state_dict(step))
    for learner in session.own_learners:
        save_state(temporary / learner.name, learner.state_dict())
    ranks.wait()
    ranks.first(lambda: _put_alone(temporary, target))


def load(session: Session, saved: Path) -> None:
    """Go back to a saved moment, which any number of processes may have written."""
    state = load_state(saved)
    if state["pass"] != session.number:
        enter(session, state["pass"])
    session.load_state_dict(state)
    for learner in session.learners:
        learner.load_state_dict(load_state(saved / learner.name))


def newest_state(folder: Path) -> Path | None:
    """Where the newest whole state of a run is, or None if it never got that far."""
    found = sorted(path for path in (folder / "state").glob("step-*") if path.suffix != ".tmp")
    return found[-1] if found else None


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
