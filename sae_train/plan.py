"""What a run will take, before it starts: settings in; derived values, memory, tokens and a time estimate out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sae_train.config import width_label
from sae_train.errors import UserError

if TYPE_CHECKING:
    import torch

    from sae_train.activations import ModelFacts
    from sae_train.config import SAESpec, Settings

GIB = 2**30
TRAINING_BYTES = 4 * (1 + 1 + 2)  # float32 weights, gradients and Adam's two moments
SLAB_BYTES = 128 * 2**20  # pre-activations that a step holds at a time, with selection
ENTRY_BYTES = 64  # what one active latent of one token costs: value, indices, both sort orders, gradients
HEADROOM = 0.9
EFFICIENCY = 0.5  # share of that matrix rate which the parts of a step reach
ENCODER_SHARE = 2.0  # a whole step in encoder products; 1.9 measured at d_in 256, width 16k, L0 50
TOY_EVAL_SECONDS = 0.4
EVAL_SECONDS = 3.0  # one look at one SAE: held-out figures, loss recovered, absorption


@dataclass(frozen=True)
class Plan:
    """The resolved run: `check` refuses what cannot work, `text` shows it."""

    settings: Settings
    facts: ModelFacts
    device: str
    memory: dict[str, float]
    available: float
    seconds: float
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise UserError if the memory needed is not there."""
        needed = sum(self.memory.values())
        if needed > HEADROOM * self.available:
            largest = max(self.memory, key=self.memory.get)
            raise UserError(
                f"this plan needs about {needed / GIB:.1f} GiB of memory on {self.device} and "
                f"{self.available / GIB:.1f} GiB are free; most of it is for the {largest} "
                f"({self.memory[largest] / GIB:.1f} GiB): lower --width, --batch-tokens or --buffer-tokens, "
                "or train fewer SAEs at once"
            )

    def text(self) -> str:
        """The plan as lines for a person."""
        s, facts = self.settings, self.facts
        lines = [
            *_source(s, facts, self.device),
            f"training   {s.n_steps:,} steps × {s.train.batch_tokens:,} tokens = "
            f"{s.n_steps * s.train.batch_tokens:,} tokens for each SAE",
            *_looks(s),
            *(
                f"SAE        {spec.name}: {spec.width:,} latents ({width_label(spec.width)}), L0 {spec.l0:g}, "
                f"{weights_of(spec, facts.d_model) / 1e6:,.1f} M weights"
                for spec in s.specs
            ),
            *(f"memory     {size / GIB:6.2f} GiB {part}" for part, size in self.memory.items()),
            f"memory     {sum(self.memory.values()) / GIB:6.2f} GiB in all, {self.available / GIB:.1f} GiB free",
            f"time       about {_duration(self.seconds)} (from the speed of a matrix product just now)",
            *(f"note       {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _source(s: Settings, facts: ModelFacts, device: str) -> list[str]:
    """Where activations come from."""
    held_out = f"{s.data.held_out_tokens:,} activations held out"
    if s.is_toy:
        return [f"toy        {s.dataset} (d_in {facts.d_model}) on {device}, {held_out}"]
    return [
        f"model      {s.lm.model}: {facts.architecture}, {facts.n_layers} blocks, d_model {facts.d_model}, "
        f"{facts.n_parameters / 1e6:,.1f} M weights, {s.lm.dtype} on {device}",
        f"hook       {facts.hook_name} (d_in {facts.d_model})",
        f"text       {s.dataset}, sequences of {s.context(facts.context)} tokens, {held_out}",
    ]


def _looks(s: Settings) -> list[str]:
    if s.is_toy:
        return [f"truth      {s.eval.absorption_evals} evaluations" if s.eval.absorption else "truth      off"]
    evals = f"{s.eval.absorption_evals} evaluations, preset {s.eval.preset}" if s.eval.absorption else "off"
    return [f"absorption {evals}"]


def describe_toy(dataset: str) -> ModelFacts:
    """Return a toy's size."""
    from sae_train.activations import ModelFacts
    from sae_train.toy import open_toy

    toy = open_toy(dataset)
    n = toy.directions.numel()
    return ModelFacts("planted dictionary", 0, toy.d_in, 0, toy.hook_name, n, 0)


def make_plan(settings: Settings) -> Plan:
    """Resolve a run without loading weights; UserError for an unknown model or hook."""
    from sae_train.activations import describe_language_model
    from sae_train.trainer import choose_device

    device = choose_device(settings.lm.device)
    lm = settings.lm
    if settings.is_toy:
        facts = describe_toy(settings.dataset)
    else:
        facts = describe_language_model(lm.model, lm.hook, lm.trust_remote_code)
        settings.context(facts.context)
    return Plan(
        settings=settings,
        facts=facts,
        device=str(device),
        memory=memory_of(settings, facts),
        available=_available(device),
        seconds=_seconds(settings, facts, device),
        notes=_notes(settings, facts),
    )


def weights_of(spec: SAESpec, d_in: int) -> int:
    """Number of weights of one SAE."""
    return spec.width * (2 * d_in + 1 + (spec.arch == "jumprelu")) + d_in


def memory_of(settings: Settings, facts: ModelFacts) -> dict[str, float]:
    """Bytes by part at the run's peak."""
    s, d = settings, facts.d_model
    # relu and jumprelu start at twice their target.
    step = SLAB_BYTES + ENTRY_BYTES * 2 * s.train.batch_tokens * max(spec.l0 for spec in s.specs)
    weights = sum(weights_of(spec, d) for spec in s.specs)
    return {
        "language model": facts.n_parameters * (4 if s.lm.dtype == "float32" else 2) * 1.2,
        "activation buffer": 4.0 * d * (s.data.buffer_tokens + s.data.held_out_tokens * 2 + 3 * s.train.batch_tokens),
        "SAEs with optimiser": weights * TRAINING_BYTES + 4.0 * max(weights_of(spec, d) for spec in s.specs) * 2,
        "training step": step,
    }


def _seconds(settings: Settings, facts: ModelFacts, device: torch.device) -> float:
    """Training at the speed of a matrix product measured now, and the looks."""
    looks = (
        settings.eval.absorption_evals * len(settings.specs) * (TOY_EVAL_SECONDS if settings.is_toy else EVAL_SECONDS)
    )
    return _flops(settings, facts) / (_matrix_rate(device) * EFFICIENCY) + looks


def _flops(settings: Settings, facts: ModelFacts) -> float:
    per_token = 2.0 * facts.n_parameters_to_hook
    for spec in settings.specs:
        per_token += 2.0 * facts.d_model * spec.width * ENCODER_SHARE
    return per_token * settings.n_steps * settings.train.batch_tokens


def _matrix_rate(device) -> float:
    """FLOP/s of a float32 matrix product on this device, measured in a moment."""
    import torch

    a = torch.ones(2048, 1024, device=device)
    (a @ a.T).sum().item()
    start = time.perf_counter()
    for _ in range(5):
        product = a @ a.T
    product.sum().item()
    return 5 * 2.0 * 2048 * 2048 * 1024 / (time.perf_counter() - start)


def _available(device) -> float:
    """Bytes free on the device."""
    import psutil
    import torch

    return float(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def _notes(settings: Settings, facts: ModelFacts) -> list[str]:
    too_many = [f"{l0:g}" for l0 in settings.sae.l0 if l0 > facts.d_model]
    notes = []
    if too_many:
        notes.append(f"L0 {', '.join(too_many)} is above d_in {facts.d_model}: such a code is not sparse")
    if settings.lm.hook is None and not settings.is_toy:
        notes.append(f"no hook was named: {facts.hook_name} was taken")
    return notes


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
