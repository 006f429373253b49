"""Every setting of sae-train, once, and the readers of what people type.

Names are imported on first use: the kernels' benchmark runs where torch is and the settings tree's pydantic is not.
"""

from importlib import import_module
from typing import Any

PLACES = {
    "merge": ("flat", "groups", "leaves", "read_yaml", "resolve"),
    "settings": (
        "CONFIGS", "DEFAULT_HUB_DATASET", "LEAST_HELD_OUT", "LOCAL_NAMES", "PRESETS", "EvalSettings", "LMSettings",
        "Settings", "TrainSettings",
    ),
    "spec": ("SAESpec",),
    "units": ("EACH", "EVAL_PRESETS", "l0_label", "parse_contexts", "width_label"),
}  # fmt: skip
PLACE_OF = {name: module for module, names in PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in PLACE_OF:
        raise AttributeError(f"module 'sae_train.config' has no attribute {name!r}")
    return getattr(import_module(f"sae_train.config.{PLACE_OF[name]}"), name)
