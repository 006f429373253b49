"""Activations of a user's own: arrays, files of them, or an object that gives batches.

Also what makes a source of one's own short: `NumberedBatches`, batches of which each is a function of its number.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_train.config import TrainSettings, resolve
from sae_train.data.buffer import check_held_out
from sae_train.data.sources import Facts, Opened, text_settings_asked
from sae_train.errors import UserError, explaining
from sae_train.protocols import Source

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.training.ranks import Ranks

MOST_HELD_OUT = 5  # at most one row in so many is held out
LEAST_STEPS = 1000  # of a run whose tokens were not asked for
ROWS_CHECKED = 16  # at either end, when a run is resumed
KINDS = "a tensor or an array (rows, d_in), a .npy or .safetensors file, or an object with d_in, held_out and batches"


class NumberedBatches:
    """Endless batches of which the i-th is make(i), so that the position is one number.

    `make` returns the same (batch_tokens, d_in) for the same number; `per_epoch` is after how many the data is used up.
    """

    def __init__(self, make: Callable[[int], Float[Tensor, "batch_tokens d_in"]], per_epoch: int | None = None) -> None:
        self._make, self._per_epoch, self._batch = make, per_epoch, 0

    @property
    def epoch(self) -> int:
        """How often the data began anew."""
        return self._batch // self._per_epoch if self._per_epoch else 0

    def __iter__(self) -> Iterator[Float[Tensor, "batch_tokens d_in"]]:
        return self

    def __next__(self) -> Float[Tensor, "batch_tokens d_in"]:
        x = self._make(self._batch)
        self._batch += 1
        return x

    def peek(self, n: int) -> Float[Tensor, "n d_in"]:
        """Return the next n activations without moving."""
        parts, number = [self._make(self._batch)], self._batch
        while sum(map(len, parts)) < n:
            number += 1
            parts.append(self._make(number))
        return torch.cat(parts)[:n]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; the next batches are those that followed it."""
        self._batch = state["batch"]


class Rows:
    """A source of the rows of one array, in memory or mapped from a file: shuffled anew for every pass over them.

    The last rows are held out, at most a fifth of all.
    """

    def __init__(self, array: Any, name: str, hook_name: str, device: torch.device, n_held_out: int) -> None:
        self.array, self.name, self.hook_name, self.device = array, name, hook_name, device
        self.d_in = int(array.shape[1])
        self.n_train = len(array) - held_out_rows(len(array), n_held_out)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def held_out(self, n_tokens: int) -> Float[Tensor, "n d_in"]:
        """Return the first n of the rows that are held out."""
        return self._rows(slice(self.n_train, min(len(self.array), self.n_train + n_tokens)))

    def batches(self, batch_tokens: int) -> NumberedBatches:
        """Return whole batches; what a pass leaves over comes up in other passes. UserError for too few rows."""
        per_epoch = self.n_train // batch_tokens
        if not per_epoch:
            raise UserError(
                f"{self.name} has {self.n_train} rows to train on, less than one batch: give more, or lower "
                f"batch_tokens {batch_tokens}"
            )
        check_held_out(len(self.array) - self.n_train, self.name)

        def make(number: int) -> Tensor:
            epoch, place = divmod(number, per_epoch)
            return self._rows(self._permutation(epoch)[place * batch_tokens : (place + 1) * batch_tokens])

        return NumberedBatches(make, per_epoch)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([0, epoch]).permutation(self.n_train))
        return self._order[1]

    def _rows(self, which: slice | np.ndarray) -> Tensor:
        rows = self.array[torch.from_numpy(which) if _is_tensor_index(self.array, which) else which]
        return _as_float32(rows).to(self.device)


def _as_float32(rows: Any) -> Tensor:
    x = rows.detach() if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows))
    return x.cpu().float()


def _is_tensor_index(array: Any, which: slice | np.ndarray) -> bool:
    return isinstance(array, torch.Tensor) and isinstance(which, np.ndarray)


def held_out_rows(n_rows: int, asked: int) -> int:
    """How many of the last rows are held out."""
    return min(asked, n_rows // MOST_HELD_OUT)


@dataclass(frozen=True)
class Given:
    """What `train(activations=…)` takes, as a kind of source.

    `label` and `hook` are what run.json and the SAEs say of their origin: name the language model and the hook there,
    and `sae-train eval` finds them.
    """

    activations: Any = None
    label: str = "activations"
    hook: str = ""

    @functools.cached_property
    def array(self) -> Any:
        """The rows, where they come as an array or a file; else None."""
        return None if isinstance(self.activations, Source) else read_rows(self.activations)

    @property
    def record(self) -> dict[str, Any]:
        """What run.json keeps of them, for a resumed run to know them by."""
        file = self.activations if isinstance(self.activations, str | Path) else None
        known: dict[str, Any] = {"file": file and str(Path(file).expanduser().absolute())}
        if self.array is not None:
            ends = [self.array[:ROWS_CHECKED], self.array[-ROWS_CHECKED:]]
            bits = b"".join(_as_float32(rows).numpy().tobytes() for rows in ends)
            known |= {"shape": list(self.array.shape), "checksum": zlib.crc32(bits)}
        return known

    def problems(self, settings: Settings) -> list[str]:
        """What is asked of it and cannot be: it has no text."""
        asked = text_settings_asked(settings, but=("hook",))
        means = "means" if len(asked) == 1 else "mean"
        problems = (
            [f"{', '.join(asked)} {means} nothing with activations of your own, which have no text"] if asked else []
        )
        if settings.lm.hooks:
            problems.append(f"activations of your own are those of one hook, not of {settings.lm.hook}: name that one")
        return problems

    def describe(self, settings: Settings, device: torch.device) -> dict[str, Facts]:
        """Sizes for the plan; UserError where there are no activations to be had."""
        array, batch = self.array, settings.train.batch_tokens
        if array is None:
            d_in, n = int(self.activations.d_in), None
        else:
            Rows(array, self.label, self.hook, device, settings.data.held_out_tokens).batches(batch)
            d_in, n = int(array.shape[1]), len(array)
        line, notes = f"given      {self.label} (d_in {d_in})", []
        if n is not None:
            held_out = held_out_rows(n, settings.data.held_out_tokens)
            line += f", {n:,} rows, of which the last {held_out:,} are held out"
            passes = settings.n_steps * batch / (n - held_out)
            if passes > 1:
                notes.append(f"the run goes over its {n - held_out:,} rows {passes:.1f} times")
        return {"": Facts(d_in, self.hook, (f"{line}, on {device}",), tuple(notes))}

    def open(self, settings: Settings, device: torch.device, ranks: Ranks, folder: Path | None) -> dict[str, Opened]:
        """Take the activations as they are; each process takes all of them."""
        array = self.array
        if array is None:
            return {"": Opened(self.activations)}
        return {"": Opened(Rows(array, self.label, self.hook, device, settings.data.held_out_tokens))}

    def language_model(self, settings: Settings, device: torch.device) -> Any:
        """There is none."""
        raise UserError("activations of your own have no prompts: name the --model and --hook that they come from")


def given_settings(
    activations: Any, settings: dict[str, Any], file: str | Path | None = None
) -> tuple[Settings, Given]:
    """Resolve the settings of a run on activations of one's own: `model` and `hook` say where they come from.

    Unless tokens are asked for, the run goes over all rows once, or takes LEAST_STEPS steps where that is more.
    """
    asked = {"model": str(getattr(activations, "name", None) or Given().label)} | settings
    resolved = resolve(asked, file, presets=False)
    kind = Given(activations, resolved.lm.model, resolved.lm.hook or getattr(activations, "hook_name", ""))
    if kind.array is not None and resolved.train.tokens == TrainSettings().tokens:
        least = LEAST_STEPS * resolved.train.batch_tokens
        resolved = resolve(asked | {"tokens": max(len(kind.array), least)}, file, presets=False)
    return resolved, kind


def read_rows(activations: Any) -> Any:
    """Return a 2-D tensor or array of floats, mapped where it is a file's; UserError for anything else."""
    if activations is None:
        raise UserError("activations of your own are given in Python: sae_train.train(activations=…)")
    if isinstance(activations, str | Path):
        activations = _mapped(Path(activations).expanduser())
    shape, dtype = getattr(activations, "shape", None), str(getattr(activations, "dtype", ""))
    if shape is None or not hasattr(activations, "__getitem__"):
        raise UserError(f"activations of type {type(activations).__name__} cannot be read: give {KINDS}")
    if len(shape) != 2 or "float" not in dtype:
        raise UserError(f"activations of shape {tuple(shape)} and type {dtype} cannot be trained on: give {KINDS}")
    return activations


def _mapped(path: Path) -> Any:
    """Open a file of activations without reading it."""
    if not path.is_file():
        raise UserError(f"there is no file of activations {str(path)!r}: give {KINDS}")
    if path.suffix == ".npy":
        with explaining(lambda error: f"{str(path)!r} cannot be read as a .npy file: {error}", OSError, ValueError):
            return np.load(path, mmap_mode="r")
    if path.suffix != ".safetensors":
        raise UserError(f"{str(path)!r} is no file of activations that is known: give {KINDS}")
    from sae_train.sae.tensor_files import read_tensors

    tensors = {name: x for name, x in read_tensors(path).items() if x.ndim == 2}
    if len(tensors) != 1:
        raise UserError(f"{str(path)!r} holds {len(tensors)} tensors of shape (rows, d_in): it must hold one")
    return next(iter(tensors.values()))
