"""What a run will take, before it starts: derived values, memory, tokens and an estimate of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from sae_train.config import width_label
from sae_train.data.harvest import waiting_room
from sae_train.data.outliers import LOOK_AHEAD
from sae_train.errors import UserError
from sae_train.evals.asset_cache import cache_folder
from sae_train.runs.disk import Kept, check_folders, disk_of, is_one_disk, write_seconds
from sae_train.runs.initial import InitialSAE, initial_of
from sae_train.runs.memory import free_memory
from sae_train.sae.forms import FORMS
from sae_train.training.architectures import TRAINED
from sae_train.training.ranks import Division, Mesh, Ranks, arrange, current, divide

if TYPE_CHECKING:
    from sae_train.config import SAESpec, Settings
    from sae_train.data.sources import Facts, Kind

Passes = tuple[tuple["SAESpec", ...], ...]
"""a grid that is too large for memory at once, in the parts that are trained one after the other"""

GIB = 2**30
TRAINING_BYTES = 4 * (1 + 1 + 2)  # float32 weights, gradients and Adam's two moments
STATE_COPIES = 3  # weights and Adam's two moments
SLAB_BYTES = 128 * 2**20  # pre-activations that a step holds at a time, with selection
ENTRY_BYTES = 64  # what one active latent of one token costs: value, indices, both sort orders, gradients
HEADROOM = 0.9
SAES = "SAEs with optimiser"


@dataclass(frozen=True)
class Plan:
    """The resolved run: `check` refuses what cannot work, `text` shows it. Memory is that of the busiest process in the
    largest pass, in bytes; `budget` is what it may be.
    """

    settings: Settings
    facts: dict[str, Facts]
    """by hook, as `Kind.describe` has them"""
    device: str
    memory: dict[str, float]
    available: float
    budget: float
    passes: Passes
    trained: list[SAESpec]
    """by the busiest process, in all passes"""
    notes: list[str] = field(default_factory=list)
    mesh: Mesh = field(default_factory=Mesh)
    division: Division | None = None
    initial: InitialSAE | None = None

    def seconds(self, after_another: bool = False) -> dict[str, float]:
        """Seconds by part, from the speed of matrix products measured now.

        `after_another`: a run before it left its activations and the eval's set-up in the same caches.
        """
        from sae_train.runs.estimate import seconds_at_hooks

        mesh, together = self.mesh, bool(self.division and self.division.together)
        how = self.device, mesh.size, mesh.size if together else mesh.width.size, after_another
        return seconds_at_hooks(self.settings, self.facts, self.trained, *how)

    def check(self) -> None:
        """Raise UserError if the memory needed is not there, or the room on disk."""
        needed = sum(self.memory.values())
        if needed > self.budget:
            largest = max(self.memory, key=self.memory.get)
            split = "split the width by --shard-width, " if self.mesh.data.size > 1 and largest == SAES else ""
            raise UserError(
                f"this plan needs about {needed / GIB:.1f} GiB of memory on {self.device}{self._each()}; "
                f"{self.available / GIB:.1f} GiB are free and {self.budget / GIB:.1f} GiB may be taken; most of it is "
                f"for the {largest} ({self.memory[largest] / GIB:.1f} GiB): {split}lower --width, --batch-tokens or "
                "--buffer-tokens, or train fewer SAEs at once"
            )
        check_folders(self.settings)
        size, (folder, free) = self.cache_bytes() - self.there_bytes(), disk_of(self.settings)
        files, (out, room) = self.files_bytes(), disk_of(self.settings, cache=False)
        if size > HEADROOM * free:
            raise UserError(
                f"the activations to be kept take {size / GIB:.1f} GiB on disk and {str(folder)!r} has "
                f"{free / GIB:.1f} GiB free: lower --tokens, take --dtype bfloat16, name a larger disk by "
                "--activation-cache, or train fewer SAEs, which need no second pass"
            )
        if files + (size if is_one_disk(folder, out) else 0.0) > HEADROOM * room:
            raise UserError(
                f"saved states and SAEs take up to {files / GIB:.1f} GiB on disk, beside {size / GIB:.1f} GiB of "
                f"activations to be kept, and {str(out)!r} has {room / GIB:.1f} GiB free: name a larger disk by --out, "
                "lower --width, or train fewer SAEs"
            )

    def text(self) -> str:
        """The plan as lines for a person."""
        s = self.settings
        lines = [
            *dict.fromkeys(chain(*zip(*(each.lines for each in self.facts.values()), strict=True))),
            f"training   {s.n_steps:,} steps × {s.train.batch_tokens:,} tokens = "
            f"{s.n_steps * s.train.batch_tokens:,} tokens for each SAE",
            *(
                f"SAE        {spec.name}: {spec.width:,} latents ({width_label(spec.width)}), L0 {spec.l0:g}, "
                f"{weights_of(spec, self.facts[spec.hook].d_in) / 1e6:,.1f} M weights"
                for spec in s.specs
            ),
            *self._passes(),
            self._files(),
            *self.kept(),
            *self._sharing(),
            *(f"memory     {size / GIB:6.2f} GiB {part}" for part, size in self.memory.items()),
            f"memory     {sum(self.memory.values()) / GIB:6.2f} GiB in all{self._each()}, "
            f"{self.available / GIB:.1f} GiB free, {self.budget / GIB:.2f} GiB to take",
            *self._time(),
            *(f"note       {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _time(self) -> list[str]:
        parts = self.seconds()
        total = roughly(sum(parts.values()))
        return [
            f"time       about {total} (from the speed of matrix products just now): "
            + ", ".join(f"{part} {roughly(seconds)}" for part, seconds in parts.items())
        ]

    def _each(self) -> str:
        return f" for each of {self.mesh.size} processes" if self.mesh.size > 1 else ""

    def cache_bytes(self) -> float:
        """What the run's activations take on disk: nothing where they are not kept."""
        s = self.settings
        if len(self.passes) == 1 and not s.data.activation_cache:
            return 0.0
        kept_bytes = sum(facts.kept_bytes for facts in self.facts.values())
        return float(s.n_steps * s.train.batch_tokens * kept_bytes)

    def files_bytes(self) -> float:
        """What a run writes at most: two states of its largest pass, one of which is being written, and its SAEs."""
        return 2 * self.state_bytes() + 4.0 * sum(self._weights())

    def state_bytes(self) -> float:
        """A saved state of the largest pass."""
        return 4.0 * STATE_COPIES * max(self._weights())

    def _weights(self) -> list[float]:
        """How many weights the SAEs of each pass have."""
        return [sum(weights_of(spec, self.facts[spec.hook].d_in) for spec in specs) for specs in self.passes]

    def there_bytes(self) -> float:
        """What of that is there already, by an earlier run."""
        own = [Kept.find(self.settings.at(hook), facts).size for hook, facts in self.facts.items()]
        return float(min(sum(own), self.cache_bytes()))

    def _passes(self) -> list[str]:
        """What is in memory together where that is not the whole grid."""
        if len(self.passes) == 1:
            return []
        return [
            f"passes     {len(self.passes)}, since the SAEs do not fit into memory together",
            *(
                f"pass {i:<6}trains {', '.join(spec.name for spec in own)}"
                for i, own in enumerate(self.passes, start=1)
            ),
        ]

    def _files(self) -> str:
        out, _ = disk_of(self.settings, cache=False)
        return f"disk       {self.files_bytes() / GIB:6.2f} GiB at most of saved states and SAEs in {out}"

    def kept(self) -> list[str]:
        """The activations that are kept on disk, and what of them is there already; no line where none are."""
        size, there, (folder, free) = self.cache_bytes(), self.there_bytes(), disk_of(self.settings)
        if not size:
            return []
        seconds = write_seconds(self.settings, size - there) if size > there else None
        end = "kept" if self.settings.data.activation_cache else "removed at the end"
        return [
            f"disk       {size / GIB:6.2f} GiB of activations in {folder}, {end}; {free / GIB:.1f} GiB free"
            + (f"; {there / GIB:.2f} GiB of them are there" if there else "")
            + (f"; about {roughly(seconds)} to write them" if seconds is not None else "")
        ]

    def _sharing(self) -> list[str]:
        """What several processes do, a line each."""
        size, n_teams, specs = self.mesh.size, self.mesh.data.size, self.settings.specs
        if size == 1:
            return []
        lines = [f"processes  {size}: each computes 1/{size} of the activations, and all of them get all activations"]
        one, some = ("process", "processes") if n_teams == size else ("team", "teams")
        if n_teams < size:
            n = size // n_teams
            lines.append(f"teams      {n_teams} of {n} processes, each of which holds 1/{n} of the latents of an SAE")
        if self.division.together:
            share = self.settings.train.batch_tokens // n_teams
            return [*lines, f"{some:<9}  all train every SAE, {share:,} tokens of a batch each; gradients are averaged"]
        for number in range(n_teams):
            names = [spec.name for spec, owner in zip(specs, self.division.owners, strict=True) if owner == number]
            lines.append(f"{f'{one} {number}':<9}  trains {', '.join(names)}")
        return lines


def make_plan(settings: Settings, kind: Kind | None = None) -> Plan:
    """Resolve a run without loading weights; UserError for whatever cannot work, an unknown model or hook among it.

    `kind` is where the activations come from, by default what the settings name.
    """
    from sae_train.data.sources import kind_of
    from sae_train.training.precision import takes_bfloat16
    from sae_train.training.ranks import choose_device

    cache_folder(settings.eval.eval_cache)
    device = choose_device(settings.lm.device)
    kind = kind or kind_of(settings)
    of_architectures = [line for arch in settings.sae.arch for line in TRAINED[arch].problems(settings)]
    problems = kind.problems(settings) + of_architectures
    if problems:
        raise UserError("\n".join(problems))
    takes_bfloat16(settings.train, device)
    ranks = current()
    check_alone(settings, ranks)
    mesh = arrange(ranks, settings.train.shard_width)
    for arch in settings.sae.arch:
        TRAINED[arch].check_split(arch, mesh.width.size)
    facts, initial = kind.describe(settings, device), initial_of(settings)
    for each in facts.values() if initial else ():
        initial.check(settings, each)
    if settings.lm.hooks:  # patterns give way to names
        settings = settings.at(",".join(each.hook_name for each in facts.values()))
    division = divide([spec.width for spec in settings.specs], mesh.data, settings.train.batch_tokens)
    trained = busiest = busiest_team(settings, division)
    available = free_memory(device) / (ranks.on_machine if device.type == "cpu" else 1)
    budget = settings.run.memory_gib * GIB if settings.run.memory_gib else HEADROOM * available
    passes = (tuple(settings.specs),)
    if ranks.size == 1:
        passes = split(settings.specs, lambda specs: sum(memory_of(settings, facts, specs).values()) <= budget)
        busiest = max(passes, key=lambda specs: sum(memory_of(settings, facts, specs).values()))
    return Plan(
        settings=settings,
        facts=facts,
        device=str(device),
        memory=memory_of(settings, facts, busiest),
        available=available,
        budget=budget,
        passes=passes,
        trained=trained,
        notes=_notes(settings, facts, passes) + ([initial.note] if initial else []),
        mesh=mesh,
        division=division,
        initial=initial,
    )


def check_alone(settings: Settings, ranks: Ranks) -> None:
    """UserError for several hooks in several processes."""
    if settings.lm.hooks and ranks.size > 1:
        raise UserError(
            f"several hooks ({settings.lm.hook}) are trained by one process, and {ranks.size} were started: name one "
            "hook, or start one process"
        )


def busiest_team(settings: Settings, division: Division) -> list[SAESpec]:
    """The SAEs of the process, or the team, that trains the most: all of them where all train together."""
    if division.together:
        return settings.specs
    owned = [[] for _ in range(1 + max(division.owners))]
    for spec, owner in zip(settings.specs, division.owners, strict=True):
        owned[owner].append(spec)
    return max(owned, key=lambda specs: sum(spec.width for spec in specs))


def weights_of(spec: SAESpec, d_in: int) -> int:
    """Number of weights of one SAE."""
    vectors = FORMS[TRAINED[spec.arch].form].vectors
    return spec.width * (2 * d_in + len(vectors)) + d_in


def memory_of(settings: Settings, facts: dict[str, Facts], specs: list[SAESpec]) -> dict[str, float]:
    """Bytes by part at the peak of a process that trains `specs`; activations of all hooks are there in any case.

    Of a team that splits their latents it is the one that looks: it then holds an SAE whole.
    """
    s, lm = settings, next(iter(facts.values()))
    # Controlled architectures start at twice their target; batchtopk looks at up to four times as many candidates.
    step = SLAB_BYTES + ENTRY_BYTES * 2 * s.train.batch_tokens * max(spec.l0 for spec in specs)
    step += max(TRAINED[spec.arch].step_bytes(s.train, facts[spec.hook].d_in) for spec in specs)
    weights, shards = [weights_of(spec, facts[spec.hook].d_in) for spec in specs], s.train.shard_width
    copies = 2 if shards == 1 else 3
    batches = 3 + (2 * LOOK_AHEAD if s.outlier_norm else 0)
    kept = lm.kept_bytes / (4 * lm.d_in) if s.data.activation_cache else 1.0  # a block on disk is of the model's dtype
    held = s.data.buffer_tokens * kept + s.data.held_out_tokens * 2 + batches * s.train.batch_tokens
    held += waiting_room(s.data.buffer_tokens) * (len(facts) > 1)
    return {
        "language model": lm.n_parameters * (4 if lm.dtype == "float32" else 2) * 1.2,
        "activation buffer": 4.0 * sum(each.d_in for each in facts.values()) * held,
        SAES: sum(weights) / shards * TRAINING_BYTES + 4.0 * max(weights) * copies,
        "training step": step,
    }


def _notes(settings: Settings, facts: dict[str, Facts], passes: Passes) -> list[str]:
    d_in = min(each.d_in for each in facts.values())
    too_many = [f"{l0:g}" for l0 in settings.sae.l0 if l0 > d_in]
    notes = list(dict.fromkeys(note for each in facts.values() for note in each.notes))
    if too_many:
        notes.append(f"L0 {', '.join(too_many)} is above d_in {d_in}: such a code is not sparse")
    dead, tokens = settings.train.dead_tokens or 0, settings.n_steps * settings.train.batch_tokens
    if dead > tokens:
        notes.append(
            f"dead_tokens {dead:,} is more than the {tokens:,} tokens of the run: no latent can count as dead or is "
            "brought back; how many are silent is measured on held-out activations alone"
        )
    if len(passes) > 1:
        notes.append(f"the SAEs do not fit into memory together: they are trained in {len(passes)} passes")
    return notes


def roughly(seconds: float) -> str:
    """An estimate of time as it is said: 50 s, 8 min, 3.5 h."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def split(specs: Sequence[SAESpec], fits: Callable[[list[SAESpec]], bool]) -> Passes:
    """Put each SAE, the widest first, into the first pass that it fits, else into a new one; in grid order within.

    An SAE that does not fit alone gets a pass of its own: whether that can work is not decided here.
    """
    passes: list[list[SAESpec]] = []
    for spec in sorted(specs, key=lambda spec: -spec.width):
        room = next((members for members in passes if fits([*members, spec])), None)
        passes.append([spec]) if room is None else room.append(spec)
    return tuple(tuple(sorted(members, key=specs.index)) for members in passes)


def find_passes(specs: Sequence[SAESpec], names: Sequence[Sequence[str]]) -> Passes:
    """Return the passes of these names, as run.json keeps them."""
    by_name = {spec.name: spec for spec in specs}
    if sorted(name for members in names for name in members) != sorted(by_name):
        raise UserError("run.json's passes hold other SAEs than its settings ask for: start the run again")
    return tuple(tuple(by_name[name] for name in members) for members in names)
