"""Kinds of sources: the name of a model comes in; what it takes (for the plan) and an opened source go out.

A new kind is one class and one line in `KINDS`; nothing else asks which kind it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.activation_cache import ActivationCache
    from sae_train.protocols import Callback, LanguageModel, Source
    from sae_train.training.ranks import Ranks

KINDS = {"toy": "sae_train.data.toy_source:ToySource", "activations": "sae_train.data.given:Given"}
TEXT_SETTINGS = (  # that mean nothing where there is no text
    "hook", "dtype", "trust_remote_code", "text_column", "context", "buffer_tokens", "drop", "preset", "hierarchy",
    "template", "eval_words", "eval_contexts", "eval_seed", "eval_cache", "activation_cache",
)  # fmt: skip
ANY_OTHER = "sae_train.data.text_source:TextSource"  # a language model, wherever it is loaded from


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a source before it is opened."""

    d_in: int
    hook_name: str
    lines: tuple[str, ...]
    """for a person"""
    notes: tuple[str, ...] = ()
    n_parameters: int = 0
    """of what makes the activations and stays in memory"""
    n_parameters_to_hook: int = 0
    """that each token goes through"""
    is_quantised: bool = False
    """so that its weights are made whole again while it is loaded"""
    look_seconds: float = 0.4
    """one look at one SAE, where there is no absorption eval"""
    context: int = 0
    """positions of the language model"""
    tokenizer: Callable[[], Any] | None = None
    """loads the language model's; None where there is none"""
    dtype: str = "float32"
    """of the weights that make the activations"""
    kept_bytes: int = 0
    """what a token takes on disk where activations are kept; 0 where they are not computed but at hand"""


@dataclass(frozen=True)
class Language:
    """A language model behind the activations, with the held-out text that SAEs are looked at on."""

    lm: LanguageModel
    rows: Int[Tensor, "rows context"]
    drop_ids: set[int]
    """ids left out of SAE training, beside the special ones"""
    skip_first: bool = False
    """whether the first position of each row is left out as well"""

    @property
    def context(self) -> int:
        return self.rows.shape[1]


@dataclass(frozen=True)
class Opened:
    """An opened source, at one hook, with what else it has."""

    source: Source
    language: Language | None = None
    """for loss recovered and the absorption eval"""
    callbacks: tuple[Callback, ...] = ()
    """what this source can be asked about an SAE"""
    cache: ActivationCache | None = None
    """where its activations are kept on disk"""


class Kind(Protocol):
    """A source as the settings name it, not opened yet."""

    def problems(self, settings: Settings) -> list[str]:
        """Return a sentence for each setting that it cannot do."""

    def describe(self, settings: Settings, device: torch.device) -> dict[str, Facts]:
        """Return its sizes by hook, by "" where there is one, without loading it; UserError for what is not there."""

    def open(self, settings: Settings, device: torch.device, ranks: Ranks, folder: Path | None) -> dict[str, Opened]:
        """Load it and open it at each hook, as `describe` has them.

        `folder` is where a run may keep activations, None where nothing needs them twice.
        """

    def language_model(self, settings: Settings, device: torch.device) -> Any:
        """Load the language model alone; UserError where there is none."""


def kind_of(settings: Settings) -> Kind:
    """Return the kind of source that the settings' model names."""
    module, _, name = KINDS.get(settings.lm.model, ANY_OTHER).partition(":")
    return getattr(import_module(module), name)()


def text_settings_asked(settings: Settings, but: tuple[str, ...] = ()) -> list[str]:
    """Name the settings about text and prompts that are not at their defaults, `but` aside."""
    groups = (settings.lm, settings.data, settings.eval)
    defaults = {name: field.default for group in groups for name, field in type(group).model_fields.items()}
    values = {name: value for group in groups for name, value in group}
    return [name for name in TEXT_SETTINGS if name not in but and values[name] != defaults[name]]
