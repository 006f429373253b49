"""Every setting of sae-train, once, and the readers of what people type."""

from sae_train.config.merge import flat, groups, leaves, resolve
from sae_train.config.settings import (
    CONFIGS,
    DEFAULT_HUB_DATASET,
    EvalSettings,
    LMSettings,
    SAESpec,
    Settings,
    TrainSettings,
)
from sae_train.config.units import EVAL_PRESETS, width_label

__all__ = [
    "CONFIGS",
    "DEFAULT_HUB_DATASET",
    "EVAL_PRESETS",
    "EvalSettings",
    "LMSettings",
    "SAESpec",
    "Settings",
    "TrainSettings",
    "flat",
    "groups",
    "leaves",
    "resolve",
    "width_label",
]
