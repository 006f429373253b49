"""One run in memory: settings in; language model (or toy), data, learners and their saved state out.

Nothing is written before everything has opened, so that bad input leaves no folder behind.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.activations import load_language_model
from sae_train.buffer import ActivationBuffer, estimate_scale, held_out_activations
from sae_train.checkpoint import load_state, save_state
from sae_train.errors import UserError
from sae_train.learner import Learner
from sae_train.ranks import Ranks, current, divide
from sae_train.tokens import open_tokens
from sae_train.toy import ToyStream, held_out_sample, open_toy
from sae_train.trainer import Clock, choose_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sae_train.activations import LanguageModel
    from sae_train.config import Settings
    from sae_train.tokens import TokenStream
    from sae_train.toy import Toy

LM_BATCH_TOKENS = 4096
CALIBRATION_PERIOD = 3  # one held-out activation in three sets the final L0; no figure is measured on those
SAMPLE_TOKENS = 16_384  # training activations that set the input scale and the learners' start


@dataclass
class Session:
    """What a run holds; `scale` maps raw activations to ⟨‖x‖²⟩ = d_in.

    A toy's stream is its buffer too, and it has no tokens to drop. `held_out` and `calibration` are raw activations
    that training never sees, apart from each other. Of several processes (`ranks`) each holds the learners that it
    trains and looks at and saves those that it owns.
    """

    settings: Settings
    model: LanguageModel | Toy
    stream: TokenStream | ToyStream
    buffer: ActivationBuffer | ToyStream
    drop_ids: set[int]
    held_out: Tensor
    calibration: Tensor
    learners: list[Learner]
    owned: frozenset[str]
    ranks: Ranks = field(default_factory=Ranks)
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

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a bit-equal continuation needs beside the learners' own states."""
        return {
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


def open_session(settings: Settings) -> Session:
    """Load the language model, open the text and make the learners; UserError for whatever cannot work."""
    device = choose_device(settings.lm.device)
    ranks = current()
    if settings.is_toy:
        return open_toy_session(settings, device, ranks)
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
    buffer = ActivationBuffer(
        shared,
        stream,
        batch_tokens=settings.train.batch_tokens,
        buffer_tokens=settings.data.buffer_tokens,
        drop_ids=drop,
        seed=0,
    )
    held_out = held_out_activations(shared, stream.held_out, drop, settings.data.held_out_tokens)
    return _session(settings, lm, stream, buffer, drop, held_out, ranks)


def open_toy_session(settings: Settings, device: torch.device, ranks: Ranks) -> Session:
    """Plant the toy that the settings name and make the learners; each process makes all samples."""
    toy = open_toy(settings.dataset, device)
    stream = ToyStream(toy, settings.train.batch_tokens)
    held_out = held_out_sample(toy, settings.data.held_out_tokens).x
    return _session(settings, toy, stream, stream, set(), held_out, ranks)


def _session(
    settings: Settings, model: LanguageModel | Toy, stream: Any, buffer: Any, drop: set[int], held_out: Tensor,
    ranks: Ranks,
) -> Session:  # fmt: skip
    """Divide held-out activations and SAEs, and make this process's learners."""
    division = divide([spec.width for spec in settings.specs], ranks, settings.train.batch_tokens)
    for_calibration = torch.arange(len(held_out), device=held_out.device) % CALIBRATION_PERIOD == 0
    together = ranks if division.together else Ranks()
    owners = dict(zip(settings.specs, division.owners, strict=True))
    learners = [
        Learner(spec, settings.train, model.d_in, settings.n_steps, model.device, together)
        for spec, owner in owners.items()
        if division.together or owner == ranks.rank
    ]
    return Session(
        settings, model, stream, buffer, drop, held_out[~for_calibration], held_out[for_calibration], learners,
        owned=frozenset(spec.name for spec, owner in owners.items() if owner == ranks.rank),
        ranks=ranks, together=division.together,
    )  # fmt: skip


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
    target = folder / "state" / f"step-{step:09d}"
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
    session.load_state_dict(load_state(saved))
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
