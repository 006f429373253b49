"""One SAE of a grid as it is asked for, and what every group of settings is: checked, and never changed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sae_train.config.units import l0_label, width_label


class SettingsGroup(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SAESpec(SettingsGroup):
    """One SAE of a grid: what is asked for."""

    arch: str
    width: int
    l0: float
    seed: int = 0
    hook: str = ""
    """where the run has several; empty where it has one"""

    @property
    def name(self) -> str:
        """Folder and display name, such as 'topk-16k-l0_50', 'relu-4k-l0_8-seed_1' or, of several hooks,
        'topk-16k-l0_50-blocks.8.hook_resid_post'."""
        hook, seed = f"-{self.hook}" if self.hook else "", f"-seed_{self.seed}" if self.seed else ""
        return f"{self.arch}-{width_label(self.width)}-l0_{l0_label(self.l0)}{hook}{seed}"
