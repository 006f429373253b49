"""The architectures that can be trained, by the name that `--arch` takes.

They stand in `config.units.ARCHITECTURES`; `register_architecture` adds one of your own.
"""

from importlib import import_module

from sae_train.config.units import ARCHITECTURES
from sae_train.training.architectures.base import Architecture, Forward


def _load(place: str) -> type[Architecture]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


TRAINED: dict[str, type[Architecture]] = {name: _load(place) for name, place in ARCHITECTURES.items()}


def register_architecture(name: str, architecture: type[Architecture]) -> None:
    """Make an architecture known by a name: `train(arch=name)` takes it from then on, in this process."""
    TRAINED[name] = architecture
    ARCHITECTURES[name] = f"{architecture.__module__}:{architecture.__qualname__}"


__all__ = ["TRAINED", "Architecture", "Forward", "register_architecture"]
