"""The design of a study: a YAML file of settings that all its SAEs share, with grids of SAEs, as settings of runs.

Each grid is split by width and training seed into runs; architectures and L0 of one run share a stream of activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_train.config.merge import groups, read_yaml, resolve
from sae_train.config.settings import CONFIGS, Settings
from sae_train.config.units import l0_label, width_label
from sae_train.errors import UserError

FULL, QUICK = CONFIGS / "study.yaml", CONFIGS / "study_quick.yaml"
GRID = tuple(groups()["sae"].model_fields)  # what a grid says, and no other place
NEEDED = ("arch", "width", "l0")
KEPT_BY_THE_STUDY = ("name", "out", "absorption")
EXAMPLE = "grids: [{arch: topk, width: [1k, 4k], l0: [8, 16, 32, 64], seed: [0, 1, 2]}]"


def read_design(file: str | Path, out: str | Path) -> list[Settings]:
    """The runs of a design below the folder `out`, narrow SAEs first; UserError for a design that cannot be one."""
    shared = read_yaml(file)
    grids = shared.pop("grids", None)
    _check_shape(str(file), shared, grids)
    shared |= {"out": str(out), "activation_cache": shared.get("activation_cache") or str(Path(out, "activations"))}
    parts = [part for grid in grids for part in _split(shared, grid)]
    _check_grids(str(file), parts)
    return sorted(parts, key=lambda part: part.sae.width)


def _check_shape(file: str, shared: dict[str, Any], grids: Any) -> None:
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"the design {file!r} needs a list of grids, such as {EXAMPLE}")
    problems = [f"{key} stands beside the grids of {file!r}: give it in each grid" for key in GRID if key in shared]
    problems += [
        f"{key} is set by the study itself: leave it out of {file!r}" for key in KEPT_BY_THE_STUDY if key in shared
    ]
    for number, grid in enumerate(grids, start=1):
        problems += [
            f"grid {number} of {file!r} holds {key!r}: a grid has {', '.join(GRID)}, all else is shared by the study"
            for key in grid
            if key not in GRID
        ]
        problems += [f"grid {number} of {file!r} lacks {key}" for key in NEEDED if grid.get(key) is None]
    if problems:
        raise UserError("\n".join(problems))


def _split(shared: dict[str, Any], grid: dict[str, Any]) -> list[Settings]:
    """A run for each width and seed of a grid."""
    sae = resolve(shared | grid).sae
    stem, targets = "+".join(sae.arch), "+".join(map(l0_label, sae.l0))
    return [
        resolve(
            shared
            | grid
            | {"width": width, "seed": seed, "name": f"{stem}-{width_label(width)}-l0_{targets}-seed_{seed}"}
        )
        for width in sae.width
        for seed in sae.seed
    ]


def _check_grids(file: str, parts: list[Settings]) -> None:
    names = [spec.name for part in parts for spec in part.specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two grids of {file!r} ask for {twice[0]}: name each SAE once")
    if len({(spec.arch, spec.width, spec.l0) for part in parts for spec in part.specs}) < 2:
        raise UserError(
            f"the design {file!r} has nothing to compare: give at least two architectures, widths or L0, such as "
            f"{EXAMPLE}"
        )
    if parts[0].train.init_from and len({seed for part in parts for seed in part.sae.seed}) > 1:
        raise UserError(
            f"the design {file!r} asks for several seeds, which make no difference where all SAEs start from "
            f"{parts[0].train.init_from!r}: give one"
        )
    if parts[0].lm.hooks:
        raise UserError(f"the design {file!r} names several hooks and a study is of one: make a design for each")
    if parts[0].lm.model == "toy":
        raise UserError("a study compares how words are absorbed, and the toy has none: docs/toy.md shows its truth")
