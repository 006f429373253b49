"""Activations on disk: blocks of a buffer go in, and come out bit for bit as long as nothing that made them changed.

A block lies there in the order in which it is handed out, in SHARDS files: each mixes the texts of the whole block and
is read front to back, memory-mapped. Files are safetensors in the dtype that the language model computes in, so nothing
is lost; `block.json`, written last, says where the text goes on and holds the checksum of each. A block of which a file
is missing, truncated or altered is made anew. Several processes write and check a share of the shards each.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.data.text_files import data_files
from sae_train.errors import UserError, first_line
from sae_train.files import BAD_JSON, write_json
from sae_train.sae.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_train.training.ranks import Ranks

SHARDS = 16  # of a block
CHUNK = 2**22  # bytes of a file that are read at a time
ABOUT = "about.json"  # beside the blocks: what they are of, for people and for plans
EARLIER = "*/block-*/state.safetensors"  # how blocks were kept by versions that had no shards


class ActivationCache:
    """Blocks (n, d_in) by number, with where the text goes on after each; `key` says what they are made from.

    All processes of `ranks` come to `read` and `write` together. While a block is handed out, a thread looks through
    the next. `n_read`, `n_written` and `n_replaced` (blocks that were damaged) count since this process started.
    """

    def __init__(
        self, folder: Path, key: str, dtype: torch.dtype, ranks: Ranks, about: dict[str, Any] | None = None
    ) -> None:
        """`about` says in a file what the blocks are of, less strictly than `key`.

        UserError for a folder with blocks of an earlier version, which would stay there unread.
        """
        if next(folder.glob(EARLIER), None):
            raise UserError(
                f"{str(folder)!r} holds activations as an earlier version of sae-train kept them, which this one does "
                "not read: remove the folder, or name another by --activation-cache"
            )
        self.folder, self.dtype, self.ranks, self.about = folder / key, dtype, ranks, about
        self.n_read = self.n_written = self.n_replaced = 0
        self.say: Callable[[str], None] = lambda sentence: None
        """takes the sentence on each block that is damaged"""
        self._thread = ThreadPoolExecutor(1, "look through activations")
        self._next: tuple[int, Future] | None = None

    def read(self, number: int, device: torch.device | str) -> KeptBlock | None:
        """Return a block, or None if there is none that can be trusted."""
        ahead, self._next = self._next, None
        found = ahead[1].result() if ahead and ahead[0] == number else self._look(number)
        self._next = number + 1, self._thread.submit(self._look, number + 1)
        damaged, missing = self.ranks.any(isinstance(found, str), found is None)
        if damaged:
            faults = self.ranks.gather(found if isinstance(found, str) else "")
            self.n_replaced += 1
            self.say(f"activations on disk: {max(faults, key=bool)}; block {number} is made anew")
        if damaged or missing:
            return None
        self.n_read += 1
        return KeptBlock(self._at(number), found, device)

    def draft(self, order: Int[Tensor, " n"], d_in: int) -> Draft:
        """Return a block that is to be computed: this process's shards of it."""
        bounds = _bounds(len(order))
        mine = self.ranks.share(len(bounds) - 1)
        return Draft(order, bounds[mine.start], bounds[mine.stop], d_in, self.dtype)

    def write(self, number: int, draft: Draft, end: dict[str, Any], device: torch.device | str) -> KeptBlock:
        """Keep a block and where the text goes on after it, and return it."""
        folder, bounds = self._at(number), _bounds(len(draft.place))
        mine = range(len(bounds) - 1)[self.ranks.share(len(bounds) - 1)]
        for i in mine:
            rows = draft.rows[bounds[i] - draft.first : bounds[i + 1] - draft.first]
            write_tensors({"x": rows}, _shard(folder, i))
        checksums = self.ranks.gather([_checksum(_shard(folder, i)) for i in mine])
        block = {"bounds": bounds, "checksums": [each for part in checksums for each in part], "end": end}
        if self.ranks.is_first:
            if self.about and not (self.folder / ABOUT).exists():
                write_json(self.folder / ABOUT, self.about)
            write_json(folder / "block.json", block | {"checksum": _checksum_of(block)})
        self.ranks.wait()
        self.n_written += 1
        return KeptBlock(folder, block, device)

    def said(self) -> str:
        """The counts for a person."""
        spoilt = f" ({self.n_replaced} of them in the place of damaged ones)" if self.n_replaced else ""
        return f"{self.n_written} blocks written{spoilt}, {self.n_read} read"

    def _at(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}"

    def _look(self, number: int) -> dict[str, Any] | str | None:
        """Return what block.json says, a fault of it or of this process's shards, or None where there is no block."""
        folder = self._at(number)
        path = folder / "block.json"
        try:
            if not path.exists():
                return None
            block = json.loads(path.read_text(encoding="utf-8"))
            if block.pop("checksum") != _checksum_of(block):
                return f"{path} is damaged"
            for i in range(len(block["checksums"]))[self.ranks.share(len(block["checksums"]))]:
                path = _shard(folder, i)
                if not path.exists():
                    return f"{path} is missing"
                if _checksum(path) != block["checksums"][i]:
                    return f"{path} is damaged"
        except (*BAD_JSON, AttributeError, KeyError, TypeError) as error:
            return f"{path} cannot be read ({first_line(error)})"
        return block


def find_kept(folder: Path, about: dict[str, Any]) -> tuple[int, int]:
    """Tokens and bytes of the blocks below a folder that are `about` this: the most that one cache there has.

    Whether they will be read is decided by their key, when model and text are open: this is for plans.
    """
    found = [(0, 0)]
    for said in folder.glob(f"*/{ABOUT}"):
        with suppress(*BAD_JSON, KeyError, TypeError, IndexError):
            if json.loads(said.read_text(encoding="utf-8")) == about:
                blocks = [json.loads(block.read_text(encoding="utf-8")) for block in said.parent.glob("*/block.json")]
                size = sum(file.stat().st_size for file in said.parent.glob("*/*.safetensors"))
                found.append((sum(block["bounds"][-1] for block in blocks), size))
    return max(found)


class Draft:
    """A block while it is computed: rows come in the text's order, and go to where they are handed out.

    It holds the rows from `first` on that are this process's to write.
    """

    def __init__(self, order: Int[Tensor, " n"], first: int, last: int, d_in: int, dtype: torch.dtype) -> None:
        self.first, self.place = first, order.argsort()
        self.rows = torch.zeros(last - first, d_in, dtype=dtype)

    def put(self, at: int, x: Float[Tensor, "m d_in"]) -> None:
        """Take the rows that stand at `at` and behind it in the text."""
        place = self.place[at : at + len(x)] - self.first
        own = (place >= 0) & (place < len(self.rows))
        self.rows[place[own]] = x.to(self.rows.dtype).cpu()[own]


class KeptBlock:
    """A block on disk, of which the shard that is handed out is mapped into memory; `end`: where the text goes on."""

    def __init__(self, folder: Path, block: dict[str, Any], device: torch.device | str) -> None:
        self.end: dict[str, Any] = block["end"]
        self._folder, self._bounds, self._device = folder, block["bounds"], torch.device(device)
        self._open: tuple[int, Tensor] | None = None

    def batch(self, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """Return these rows in float32."""
        parts = [
            self._rows(i)[max(start, first) - first : min(stop, last) - first]
            for i, (first, last) in enumerate(pairwise(self._bounds))
            if first < stop and start < last
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float()

    def _rows(self, i: int) -> Tensor:
        """A shard: on a CPU as it lies on disk, for a GPU sent there whole, without a wait for it."""
        if self._open is None or self._open[0] != i:
            x = read_tensors(_shard(self._folder, i))["x"]
            on_gpu = self._device.type == "cuda"
            self._open = i, x.pin_memory().to(self._device, non_blocking=True) if on_gpu else x
        return self._open[1]


def key_of(settings: dict[str, Any], *content: Tensor) -> str:
    """Return a short name for JSON values and the bits of tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for x in content:
        digest.update(memoryview(x.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()[:16]


def files_of(path: str | Path) -> list[tuple[str, str]]:
    """Return name and checksum of a file, or of a folder's texts; nothing where there is no path.

    A text that was copied, moved or fetched again is the same text.
    """
    return [(file.name, _checksum(file)) for file in data_files(Path(path).expanduser())]


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:02d}.safetensors"


def _bounds(n: int) -> list[int]:
    """Where the shards of a block of n rows begin, and where the last one ends."""
    shards = min(n, SHARDS)
    return [n * i // shards for i in range(shards + 1)]


def _checksum(path: Path) -> str:
    """The checksum of a file's bytes, read without holding them."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
