"""The activations of one hook in a run: where they come from, what is held out, and how its learners see them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config import LEAST_HELD_OUT
from sae_train.data.buffer import check_activations, check_held_out, estimate_scale
from sae_train.data.origin import check_same_activations
from sae_train.data.outliers import WithoutOutliers, is_kept, norm_limit
from sae_train.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.sources import Opened
    from sae_train.protocols import Batches
    from sae_train.sae.model import SAE
    from sae_train.training.learner import Learner

CALIBRATION_PERIOD = 3  # one held-out activation in three sets the final L0; no figure is measured on those
N_COMPARED = 16  # held-out activations of a saved state, which a resumed run has again
SAMPLE_TOKENS = 16_384  # training activations that set the input scale and the learners' start


@dataclass
class Stream:
    """One hook's activations; learners see scale · (x − mean) of raw activations x, with ⟨‖·‖²⟩ = d_in.

    `held_out` and `calibration` are raw activations that training never sees, apart from each other. Where outliers are
    left out, those with a norm above `limit` are missing from both, and from the data.
    """

    settings: Settings
    device: torch.device
    opened: Opened
    data: Batches
    held_out: Tensor
    calibration: Tensor
    start: dict[str, Any]
    """the data's position before the first batch"""
    scale: float = 0.0
    mean: Tensor | None = None
    limit: float = math.inf
    held_out_left_out: int = 0

    source = property(lambda self: self.opened.source)
    language = property(lambda self: self.opened.language)

    def normalise(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Raw activations as the learners see them."""
        return (x if self.mean is None else x - self.mean) * self.scale

    def export(self, learner: Learner) -> SAE:
        """A learner's SAE for raw activations."""
        sae = learner.export(self.scale, self.mean)
        sae.cfg = replace(sae.cfg, hook_name=self.source.hook_name)
        return sae

    def begin(self) -> Float[Tensor, "n d_in"]:
        """Set what an outlier is, the mean and the input scale from the first training activations; return these.

        The data stays where it is.
        """
        sample = self.data.peek(SAMPLE_TOKENS).to(self.device)
        check_activations(sample, self.source)
        if self.settings.outlier_norm is not None and math.isinf(self.limit):  # else set in an earlier pass
            self.leave_out(norm_limit(sample, self.settings.outlier_norm))
            sample = sample[is_kept(sample, self.limit)]
            check_activations(sample, self.source)
        self.mean = sample.mean(0) if self.settings.train.center else None
        self.scale = estimate_scale(sample if self.mean is None else sample - self.mean)
        return self.normalise(sample)

    def leave_out(self, limit: float) -> None:
        """Keep activations whose norm is above the limit away from training and from all held-out figures."""
        assert isinstance(self.data, WithoutOutliers)
        self.limit = self.data.limit = limit
        x = hold_out(self.settings, self.opened, self.device)
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

    def state_dict(self) -> dict[str, Any]:
        """What a bit-equal continuation needs."""
        return {
            "scale": self.scale,
            "mean": self.mean,
            "limit": self.limit,
            "buffer": self.data.state_dict(),
            "first_held_out": self.held_out[:N_COMPARED].cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved moment; UserError for other activations than those of then."""
        self.scale, self.mean = state["scale"], state.get("mean")
        if self.mean is not None:
            self.mean = self.mean.to(self.device)
        if self.settings.outlier_norm is not None:
            self.leave_out(state["limit"])
        self.data.load_state_dict(state["buffer"])
        if "first_held_out" in state:  # states of before have none
            check_same_activations(state["first_held_out"], self.held_out[:N_COMPARED].cpu(), self.source.name)


def open_stream(settings: Settings, opened: Opened, device: torch.device) -> Stream:
    """Take what an opened source gives; UserError for activations that nothing can be learned or measured on."""
    held_out = hold_out(settings, opened, device)
    check_held_out(len(held_out), opened.source.name)
    check_activations(held_out, opened.source)
    data = opened.source.batches(settings.train.batch_tokens)
    if settings.outlier_norm is not None:
        data = WithoutOutliers(data, settings.train.batch_tokens)
    return Stream(settings, device, opened, data, *split_held_out(held_out), data.state_dict())


def hold_out(settings: Settings, opened: Opened, device: torch.device) -> Tensor:
    """The source's held-out activations, the same ones at every call."""
    return opened.source.held_out(settings.data.held_out_tokens).to(device)


def split_held_out(held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Those that figures are measured on, and those that calibrate."""
    for_calibration = torch.arange(len(held_out), device=held_out.device) % CALIBRATION_PERIOD == 0
    return held_out[~for_calibration], held_out[for_calibration]
