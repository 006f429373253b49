"""The four seams of sae-train, each open to code of your own: a source of activations, a learner, a callback, an SAE.

An object needs no base class: it fits where it has these members. Tensors are float32 and of shape (n, d_in) unless a
line says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor


class Batches(Protocol):
    """Endless training batches of raw activations, in a position that can be saved.

    `data.given.NumberedBatches` is one, made from a function of a batch's number.
    """

    epoch: int
    """how often the data began anew"""

    def __next__(self) -> Float[Tensor, "batch_tokens d_in"]:
        """Return the next batch."""

    def peek(self, n: int) -> Float[Tensor, "n d_in"]:
        """Return about the next n activations, in any order, and stay where it is."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position: the batches that followed it follow again, bit for bit."""


@runtime_checkable
class Source(Protocol):
    """Where activations come from: a language model that reads text, a planted dictionary, your own data."""

    name: str
    hook_name: str
    d_in: int

    def held_out(self, n_tokens: int) -> Float[Tensor, "n d_in"]:
        """Return at most n activations that no training batch holds, the same ones at every call."""

    def batches(self, batch_tokens: int) -> Batches:
        """Return the training batches, at their start."""


class LanguageModel(Protocol):
    """A language model seen from one hook: what loss recovered and the absorption eval ask."""

    name: str
    hook_name: str
    d_in: int
    device: torch.device
    dtype: torch.dtype
    """of its activations before they are made float32"""
    tokenizer: Any
    context: int
    """largest number of positions"""
    bos_id: int | None
    special_ids: set[int]

    def activations(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_in"]:
        """Return the activations at the hook."""

    def activations_after(
        self, prefix: Int[Tensor, " before"], tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position d_in"] | None:
        """Return the activations of tokens that all stand behind one prefix, read once; None where it cannot be."""

    def start(self, tokens: Int[Tensor, "batch position"]) -> Tensor | None:
        """Return what `logits` can start from, or None where nothing comes before the hook."""

    def logits(
        self,
        tokens: Int[Tensor, "batch position"],
        edit: Callable[[Tensor], Tensor] | None = None,
        start: Tensor | None = None,
    ) -> Float[Tensor, "batch position vocab"]:
        """Return next-token logits, with the activations at the hook passed through `edit`."""

    def logits_after(
        self, prefix: Int[Tensor, " before"], tokens: Int[Tensor, "batch position"],
        added: Float[Tensor, "batch position d_in"] | None = None,
    ) -> Float[Tensor, "batch position vocab"] | None:  # fmt: skip
        """Return next-token logits of tokens that all stand behind one prefix, read once; None where it cannot be.

        `added` is added to the tokens' activations at the hook."""

    def read_out(self, directions: Float[Tensor, "n d_in"]) -> Float[Tensor, "n vocab"] | None:
        """Return what directions of the residual stream say of the next token; None where the hook is not in it."""


class SAE(Protocol):
    """A sparse autoencoder for raw activations, whoever made it. It is only read.

    latents = encode(x), recon = decode(latents) = latents · W_dec + b_dec.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Return the latents, zero where they are not active."""

    def decode(self, latents: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        """Return the reconstruction."""


@runtime_checkable
class SparseSAE(Protocol):
    """An SAE that also gives its active latents alone, row after row, and never builds the dense (n, d_sae)."""

    def __call__(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Return the reconstruction of x."""

    def encode_entries(self, x: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (values, latents, how many of each row)."""

    def decode_entries(self, values: Tensor, latents: Tensor, counts: Tensor) -> Float[Tensor, "n d_in"]:
        """Return the reconstruction from what encode_entries returned."""


class Learner(Protocol):
    """One SAE in training, on activations scaled to ⟨‖x‖²⟩ = d_in. A step never waits for the device."""

    name: str
    failed: str | None
    """why it ended early"""

    def initialise(self, sample: Float[Tensor, "n d_in"]) -> None:
        """Set the weights before the first step."""

    def step(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Tensor]:
        """Take one optimiser step; return its figures, which stay on the device."""

    def check(self) -> str | None:
        """Look whether it failed (waits for the device); keep the reason in `failed` and return it."""

    def calibrate(self, held_out: Float[Tensor, "n d_in"]) -> None:
        """Bring L0 on held-out activations to the target, after the last step."""

    def export(self, scale: float, mean: Float[Tensor, " d_in"] | None = None) -> SAE:
        """Return the SAE for raw activations of this one, which is trained on scale · (raw − mean)."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-equal resume needs: nested dictionaries of tensors and JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""


Callback = Callable[[SAE, int], Iterable[tuple[str, Any]]]
"""An eval of your own: called with the SAE (for raw activations) and the step, it yields (name, value) pairs. Names are
such as "mine/purity"; values are numbers, and they are logged, drawn and reported by name."""
