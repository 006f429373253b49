"""A grid that is too large for memory at once: SAEs come in, the passes over the activations that train them go out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_train.config import SAESpec

Passes = tuple[tuple["SAESpec", ...], ...]


def split(specs: Sequence[SAESpec], fits: Callable[[list[SAESpec]], bool]) -> Passes:
    """Put each SAE, the widest first, into the first pass that it fits, else into a new one; in grid order within.

    An SAE that does not fit alone gets a pass of its own: whether that can work is not decided here.
    """
    passes: list[list[SAESpec]] = []
    for spec in sorted(specs, key=lambda spec: -spec.width):
        room = next((members for members in passes if fits([*members, spec])), None)
        passes.append([spec]) if room is None else room.append(spec)
    return tuple(tuple(sorted(members, key=specs.index)) for members in passes)


def named(specs: Sequence[SAESpec], names: Sequence[Sequence[str]]) -> Passes:
    """Return the passes of these names, as run.json keeps them."""
    by_name = {spec.name: spec for spec in specs}
    return tuple(tuple(by_name[name] for name in members) for members in names)
