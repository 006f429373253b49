"""What the toy's truth says of each word: which words an SAE absorbs, without probe, ranking or threshold on cosines;
and SAEs built by hand whose absorption is known before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from sae_train.data.toy import N_CHILDREN, N_PARENTS, Toy, seeded
from sae_train.evals.assets import Assets
from sae_train.evals.presets import SAEBENCH
from sae_train.evals.scoring import unit

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.latents import Latents

CARRIED = 0.5  # share of the parent that other latents must carry for a word to be absorbed
N_FOLDS = 3
DOSES = ((0.1, 1.0), (0.3, 0.25), (0.3, 0.5), (0.3, 0.75), (0.3, 1.0), (0.6, 0.5), (0.6, 1.0))
"""shares of the words, and degrees to which they are absorbed"""
N_WORDS = N_PARENTS * N_CHILDREN


@dataclass(frozen=True)
class Rendered:
    """Each word of the letter toy some times, as it comes in training: with context, magnitudes and noise."""

    x: Float[Tensor, "n d_in"]
    word: Int[Tensor, " n"]
    parent: Int[Tensor, " n"]
    features: Int[Tensor, "n most"]
    """parent, child, then context; −1 fills up"""
    magnitudes: Float[Tensor, "n most"]

    def dual(self, toy: Toy) -> Float[Tensor, "n d_in"]:
        """Vectors that read the parent's magnitude off a sum of the row's active features."""
        basis = toy.directions[self.features.clamp(min=0)] * (self.features >= 0)[..., None]
        return torch.linalg.pinv(basis)[:, :, 0]

    def pick(self, rows: Tensor) -> Rendered:
        return Rendered(*(value[rows] for value in vars(self).values()))


def render(toy: Toy, times: int = 2, seed: int = 0) -> Rendered:
    g = seeded(seed, 7, toy.device)
    word = torch.arange(N_WORDS).repeat_interleave(times)
    own = torch.stack([word // N_CHILDREN, N_PARENTS + word], 1)
    first_context = N_PARENTS + N_WORDS
    context = torch.arange(first_context, toy.n_features).expand(len(word), -1)
    context = torch.where(torch.rand(context.shape, generator=g) < 0.1, context, -1)
    features = torch.cat([own, context], 1)
    magnitudes = (1 + toy.spread * torch.randn(features.shape, generator=g)) * (features >= 0)
    x = (magnitudes[..., None] * toy.directions[features.clamp(min=0)]).sum(1)
    x = x + toy.noise * torch.randn(x.shape, generator=g)
    return Rendered(x, word, own[:, 0], features, magnitudes)


def folds(toy: Toy, rendered: Rendered) -> list[Assets]:
    """The eval's assets with the toy's words: in each fold four children of every parent are the test words.

    Renderings of one word stand on one side, as a word of a vocabulary does. The probe is the true direction, all test
    words are true positives and all parents count.
    """
    made = []
    for fold in range(N_FOLDS):
        is_test = rendered.word % N_CHILDREN // (N_CHILDREN // N_FOLDS) == fold
        rows = is_test.nonzero().squeeze(1)
        settings = {
            "preset": asdict(SAEBENCH), "hierarchy": "toy", "labels": [str(p) for p in range(N_PARENTS)],
            "word_position": -1,
        }  # fmt: skip
        none = torch.empty(0, dtype=torch.long)
        made.append(Assets(
            [str(w) for w in rendered.word.tolist()], rendered.word, rendered.parent, is_test, rendered.x, rows,
            rendered.x[rows], none[:, None], none, toy.directions[:N_PARENTS].T, torch.full((N_PARENTS,), -0.5),
            torch.ones(N_PARENTS, 4), settings, {}, hash=str(fold),
        ))  # fmt: skip
    return made


@dataclass(frozen=True)
class Truth:
    """Per rendering: what latents shared by siblings, and all others, carry of the parent (1 is all of it)."""

    shared: Float[Tensor, " n"]
    others: Float[Tensor, " n"]
    silent: Bool[Tensor, " n"]
    """no latent that siblings share fires"""

    @property
    def gap(self) -> Float[Tensor, " n"]:
        """The part of the parent that others carry and shared latents do not."""
        return torch.minimum(self.others.clamp(0, 1), 1 - self.shared.clamp(0, 1))

    def absorbed(self, carried: float = CARRIED) -> Bool[Tensor, " n"]:
        return self.silent & (self.others >= carried)


def truth(latents: Latents, W_dec: Float[Tensor, "d_sae d_in"], rendered: Rendered, toy: Toy) -> Truth:
    """What each latent contributes to the parent's coordinate in the row's own features."""
    acts, columns = latents.padded()
    share = acts * (W_dec[columns] * rendered.dual(toy)[:, None]).sum(-1) / rendered.magnitudes[:, :1]
    is_shared = shared_latents(latents, rendered)[rendered.parent[:, None], columns]
    return Truth(
        torch.where(is_shared, share, 0).sum(1), torch.where(is_shared, 0, share).sum(1),
        ~(is_shared & (acts > 0)).any(1),
    )  # fmt: skip


def shared_latents(latents: Latents, rendered: Rendered) -> Bool[Tensor, "parents d_sae"]:
    """Latents that answer to a parent: they fire on at least two of its children, each time in at least half of the
    renderings, and at least half of all that they fire on is the parent's."""
    row, d_sae = latents.row_of_entry, latents.d_sae
    fired = torch.zeros(N_WORDS, d_sae).index_put_(
        (rendered.word[row], latents.columns), torch.ones(len(row)), accumulate=True
    )
    often = fired >= 0.5 * rendered.word.bincount(minlength=N_WORDS)[:, None]
    by_parent = fired.view(N_PARENTS, N_CHILDREN, d_sae).sum(1)
    return (often.view(N_PARENTS, N_CHILDREN, d_sae).sum(1) >= 2) & (2 * by_parent >= by_parent.sum(0))


@dataclass(frozen=True)
class Built:
    """An SAE for the renderings alone: its latents were written down, not computed from x."""

    W_dec: Float[Tensor, "d_sae d_in"]
    latents: Float[Tensor, "n d_sae"]

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.W_dec.T

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        return torch.zeros_like(self.W_dec[0])

    def decode(self, latents: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return latents @ self.W_dec


def dictionary(toy: Toy, rendered: Rendered) -> Built:
    """The true dictionary with the true magnitudes: nothing is absorbed."""
    latents = torch.zeros(len(rendered.x), toy.n_features)
    there = rendered.features >= 0
    row = torch.arange(len(there))[:, None].expand_as(there)
    latents[row[there], rendered.features[there]] = rendered.magnitudes[there]
    return Built(toy.directions, latents)


def absorb(toy: Toy, rendered: Rendered, share: float, degree: float, seed: int) -> tuple[Built, Bool[Tensor, " n"]]:
    """A share of the words is absorbed to a degree: on them the parent's latent has 1 − degree of its activation, and
    the child's row has the rest of the parent. Returns which renderings are of such words."""
    sae, g = dictionary(toy, rendered), torch.Generator().manual_seed(seed)
    chosen = torch.rand(N_WORDS, generator=g) < share
    W_dec, latents = sae.W_dec.clone(), sae.latents.clone()
    words = chosen.nonzero().squeeze(1)
    W_dec[N_PARENTS + words] += degree * toy.directions[words // N_CHILDREN]
    norm = W_dec.norm(dim=1)
    rows = chosen[rendered.word].nonzero().squeeze(1)
    latents[rows, rendered.parent[rows]] *= 1 - degree
    return Built(unit(W_dec), latents * norm), chosen[rendered.word]


def split(toy: Toy, rendered: Rendered, parts: int) -> Built:
    """Each parent has several latents, each for its own children: splitting, and nothing is absorbed."""
    sae = dictionary(toy, rendered)
    which = rendered.word % N_CHILDREN % parts  # so that no fold has all words of a part
    extra = torch.zeros(len(rendered.x), N_PARENTS * parts)
    at = torch.arange(len(extra))
    extra[at, rendered.parent * parts + which] = sae.latents[at, rendered.parent]
    rows = toy.directions[:N_PARENTS].repeat_interleave(parts, 0)
    return Built(torch.cat([rows, sae.W_dec[N_PARENTS:]]), torch.cat([extra, sae.latents[:, N_PARENTS:]], 1))


def lose(toy: Toy, rendered: Rendered, share: float, seed: int) -> Built:
    """On a share of the words the parent's latent is silent and nobody carries the parent: lost, not absorbed."""
    sae = dictionary(toy, rendered)
    chosen = torch.rand(N_WORDS, generator=torch.Generator().manual_seed(seed)) < share
    rows = chosen[rendered.word].nonzero().squeeze(1)
    latents = sae.latents.clone()
    latents[rows, rendered.parent[rows]] = 0
    return replace(sae, latents=latents)


def randomise(toy: Toy, rendered: Rendered, seed: int) -> Built:
    """The true latents with random directions: the letters can be told, and nothing is carried by anybody."""
    sae = dictionary(toy, rendered)
    rows = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed))
    return replace(sae, W_dec=unit(rows))


def built_saes(toy: Toy, rendered: Rendered, seed: int) -> dict[str, Callable[[], Built]]:
    """SAEs by hand, by name: those in which nothing is absorbed, and absorption in doses."""
    made: dict[str, Callable[[], Built]] = {
        "the true dictionary": lambda: dictionary(toy, rendered),
        "each parent split in 2": lambda: split(toy, rendered, 2),
        "each parent split in 4": lambda: split(toy, rendered, 4),
        "30 % of the words lost": lambda: lose(toy, rendered, 0.3, seed),
        "the true latents, random directions": lambda: randomise(toy, rendered, seed),
    }
    for share, degree in DOSES:
        name = f"{share:.0%} of the words absorbed to {degree:.0%}".replace("%", " %")
        made[name] = lambda share=share, degree=degree: absorb(toy, rendered, share, degree, seed)[0]
    return made
