"""The toy as a source: activations of a planted dictionary, and what its truth says of an SAE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.data.given import NumberedBatches
from sae_train.data.sources import Facts, Opened, text_settings_asked
from sae_train.data.toy import PLANTED, Toy, held_out_sample, open_toy, seeded
from sae_train.errors import UserError
from sae_train.evals.truth import truth

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.protocols import SAE
    from sae_train.training.ranks import Ranks


class ToyStream(NumberedBatches):
    """Endless batches (batch_tokens, d_in) on the toy's device: the i-th depends on the seed and i alone."""

    def __init__(self, toy: Toy, batch_tokens: int, seed: int = 0) -> None:
        super().__init__(lambda number: toy.sample(batch_tokens, seeded(seed, number, toy.device)).x)


class PlantedActivations:
    """The toy's activations; there is no text and no end."""

    name = "toy"

    def __init__(self, toy: Toy) -> None:
        self.toy, self.hook_name, self.d_in = toy, toy.hook_name, toy.d_in

    def held_out(self, n_tokens: int) -> Float[Tensor, "n d_in"]:
        """Return n activations that no batch holds."""
        return held_out_sample(self.toy, n_tokens).x

    def batches(self, batch_tokens: int) -> ToyStream:
        """Return the training batches."""
        return ToyStream(self.toy, batch_tokens)


def compare_with_truth(toy: Toy, n: int) -> Any:
    """Return the callback that measures recovery and absorption against the toy's dictionary, on n samples."""
    return partial(_figures, toy, held_out_sample(toy, n))


def _figures(toy: Toy, sample: Any, sae: SAE, step: int) -> Iterator[tuple[str, float]]:
    for name, value in truth(sae, toy, sample).items():
        yield f"toy/{name}", value


class ToySource:
    """`--model toy`; its data sets are the planted dictionaries."""

    def problems(self, settings: Settings) -> list[str]:
        """What is asked of a toy and cannot be."""
        asked = text_settings_asked(settings)
        means = "means" if len(asked) == 1 else "mean"
        problems = [f"{', '.join(asked)} {means} nothing with the model toy, which has no text"] if asked else []
        if settings.dataset not in PLANTED:
            problems.append(f"dataset {settings.dataset!r} is none of the toy's: choose from {', '.join(PLANTED)}")
        return problems

    def describe(self, settings: Settings, device: torch.device) -> dict[str, Facts]:
        """Sizes of the planted dictionary."""
        toy, s = open_toy(settings.dataset), settings
        held_out = f"{s.data.held_out_tokens:,} activations held out"
        looks = f"{s.eval.absorption_evals} evaluations" if s.eval.absorption else "off"
        lines = (f"toy        {s.dataset} (d_in {toy.d_in}) on {device}, {held_out}", f"truth      {looks}")
        n = toy.directions.numel()
        return {"": Facts(toy.d_in, toy.hook_name, lines, n_parameters=n)}

    def open(self, settings: Settings, device: torch.device, ranks: Ranks, folder: Path | None) -> dict[str, Opened]:
        """Plant it; each process makes all samples."""
        toy = open_toy(settings.dataset, device)
        asked = (compare_with_truth(toy, settings.data.held_out_tokens),) if settings.eval.absorption else ()
        return {"": Opened(PlantedActivations(toy), callbacks=asked)}

    def language_model(self, settings: Settings, device: torch.device) -> Any:
        """There is none."""
        raise UserError("an SAE of the toy has no prompts to be evaluated on: its run measured it against the truth")
