"""Activations made from a planted sparse dictionary: the name of a data set comes in; known unit directions, their
exact frequencies and an endless, seeded stream of activations go out.

Features come in groups that are independent of each other. In an active group exactly one of its events happens, and an
event switches a set of features on: the events of a tree are its paths from the root, those of a correlated pair are
the one, the other, and both. A sample costs its active features, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Event = tuple[float, tuple[int, ...]]
"""share of its group's activity, and the features that it switches on"""
Group = tuple[float, list[Event]]
"""probability of being active in a sample, and its events, whose shares sum to 1"""

HELD_OUT_SEED = 2**32  # streams for training have smaller seeds
N_PARENTS, N_CHILDREN, N_CONTEXT = 26, 12, 20
N_FEATURES, N_TREE = 512, 8


class Sample(NamedTuple):
    """n activations and the features that are in them: feature features[e] is active in row rows[e]."""

    x: Float[Tensor, "n d_in"]
    rows: Int[Tensor, " entries"]
    features: Int[Tensor, " entries"]


@dataclass(frozen=True)
class Toy:
    """x = Σ a_f·directions[f] + ε over the active features f; a_f ~ N(1, spread²), ε ~ N(0, noise²) per coordinate."""

    hook_name: str
    directions: Float[Tensor, "n_features d_in"]
    parents: Int[Tensor, " n_features"]
    """a feature's parent, which is active whenever it is; -1 for none"""
    active: Float[Tensor, " n_groups"]
    event_group: Int[Tensor, " n_events"]
    event_share: Float[Tensor, " n_events"]
    members: Int[Tensor, "n_events most"]
    """features of each event, from a root down; -1 fills up"""
    edges: Float[Tensor, " n_events"]
    """number of the group plus the shares of its events up to and with this one: where a choice by u ∈ [0, 1) ends"""
    spread: float = 0.1
    noise: float = 0.02

    @property
    def n_features(self) -> int:
        return len(self.directions)

    @property
    def d_in(self) -> int:
        return self.directions.shape[1]

    @property
    def device(self) -> torch.device:
        return self.directions.device

    @property
    def event_frequency(self) -> Float[Tensor, " n_events"]:
        """Probability of each event in a sample."""
        return self.active[self.event_group] * self.event_share

    @property
    def frequency(self) -> Float[Tensor, " n_features"]:
        """Probability of each feature in a sample; their sum is the true L0."""
        p = self.event_frequency[:, None].expand_as(self.members)
        there = self.members >= 0
        return p.new_zeros(self.n_features).index_add_(0, self.members[there], p[there])

    @property
    def words(self) -> Float[Tensor, "n_events d_in"]:
        """Every event once, alone, with magnitudes 1 and no noise."""
        rows = self.directions[self.members.clamp(min=0)]
        return (rows * (self.members >= 0)[..., None]).sum(1)

    def words_of(self, parent: int) -> tuple[Bool[Tensor, " n_events"], Bool[Tensor, " n_events"]]:
        """Return the events that have a feature in them, and those that have one of its children in them as well."""
        child = (self.parents[self.members] == parent) & (self.members >= 0)
        return (self.members == parent).any(1), child.any(1)

    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """Draw n activations; the generator's device must be the toy's."""
        rows, features = self._draw(n, generator)
        new = {"generator": generator, "device": self.device}
        x = self.noise * torch.randn(n, self.d_in, **new)
        a = 1 + self.spread * torch.randn(len(rows), 1, **new)
        return Sample(x.index_add_(0, rows, a * self.directions[features]), rows, features)

    def _draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows and features of n samples, sorted by row.

        A Poisson number of hits, of mean −log(1 − p) in each cell (row, group), leaves a cell empty with probability
        1 − p, independently of all others: exactly Bernoulli(p), at the cost of the hits.
        """
        new = {"generator": generator, "device": self.device}
        always = (self.active >= 1).nonzero().squeeze(1)
        hits = torch.where(self.active >= 1, 0.0, -torch.log1p(-self.active.clamp(max=1 - 1e-12))).cumsum(0)
        n_hits = int(torch.poisson(n * hits[-1], generator=generator))
        where = torch.rand(n_hits, dtype=torch.float64, **new) * hits[-1]
        group = torch.searchsorted(hits, where, right=True).clamp(max=len(hits) - 1)
        row = torch.randint(n, (n_hits,), **new)
        every = torch.arange(n, device=self.device)[:, None] * len(hits) + always
        cells = torch.cat([every.flatten(), row * len(hits) + group]).unique()
        rows, groups = cells // len(hits), cells % len(hits)
        chosen = groups + torch.rand(len(cells), dtype=torch.float64, **new)
        features = self.members[torch.searchsorted(self.edges, chosen, right=True)]
        there = features >= 0
        return rows[:, None].expand_as(features)[there], features[there]

    def to(self, device: torch.device | str) -> Toy:
        """Return the same toy on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def plant(
    name: str, groups: Sequence[Group], parents: Sequence[int], directions: Float[Tensor, "n_features d_in"]
) -> Toy:
    """Make a toy of groups of features, each feature in at most one group, and unit directions."""
    events = [(number, *event) for number, (_, events) in enumerate(groups) for event in events]
    most = max(len(members) for _, _, members in events)
    sums = [number + total for number, (_, events) in enumerate(groups) for total in _running([s for s, _ in events])]
    return Toy(
        hook_name=name,
        directions=directions,
        parents=torch.tensor(parents),
        active=torch.tensor([p for p, _ in groups], dtype=torch.float64),
        event_group=torch.tensor([number for number, _, _ in events]),
        event_share=torch.tensor([share for _, share, _ in events], dtype=torch.float64),
        members=torch.tensor([[*members, *[-1] * (most - len(members))] for _, _, members in events]),
        edges=torch.tensor(sums, dtype=torch.float64),
    )


def _running(shares: list[float]) -> list[float]:
    """Running sums that end at 1 exactly."""
    return [*accumulate(shares[:-1]), 1.0]


def random_directions(n: int, d_in: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d_in"]:
    """Return unit vectors; without a generator the same ones for the same sizes."""
    rows = torch.randn(n, d_in, generator=generator or torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True)


def zipf(n: int, offset: float) -> Float[Tensor, " n"]:
    """Return n shares that sum to 1, the i-th proportional to 1 / (i + offset), i from 0."""
    weights = 1 / (torch.arange(n, dtype=torch.float64) + offset)
    return weights / weights.sum()


def seeded(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Return a generator of its own for every (seed, number)."""
    state = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


def held_out_sample(toy: Toy, n: int) -> Sample:
    """Return n activations that no stream for training gives, with the features that are in them."""
    return toy.sample(n, seeded(HELD_OUT_SEED, 0, toy.device))


def open_toy(dataset: str, device: torch.device | str = "cpu") -> Toy:
    """Plant one of the data sets: letters, dictionary, trees, pairs; the same one on every device."""
    return PLANTED[dataset](dataset).to(device)


def letters(name: str = "letters") -> Toy:
    """26 parents × 12 children: one child a sample, Zipf over children, its parent with it; 20 features of context."""
    generator = torch.Generator().manual_seed(0)
    n_words = N_PARENTS * N_CHILDREN
    shares = zipf(n_words, 5.0)[torch.randperm(n_words, generator=generator)].tolist()
    parents = [-1] * N_PARENTS + [word // N_CHILDREN for word in range(n_words)] + [-1] * N_CONTEXT
    words = [(share, (word // N_CHILDREN, N_PARENTS + word)) for word, share in enumerate(shares)]
    context = [(0.1, [(1.0, (N_PARENTS + n_words + i,))]) for i in range(N_CONTEXT)]
    return plant(name, [(1.0, words), *context], parents, random_directions(len(parents), 64, generator))


def dictionary(name: str = "dictionary", n_features: int = N_FEATURES, d_in: int = 128, l0: float = 8.0) -> Toy:
    """Independent features with Zipf frequencies."""
    groups = [(p, [(1.0, (i,))]) for i, p in enumerate((l0 * zipf(n_features, 20.0)).tolist())]
    return plant(name, groups, [-1] * n_features, random_directions(n_features, d_in))


def trees(name: str = "trees", n_trees: int = N_FEATURES // N_TREE, d_in: int = 128, l0: float = 8.0) -> Toy:
    """Trees of a root and seven children, one of which comes with the root in 80 % of the cases; Zipf over both."""
    n_children, with_child = N_TREE - 1, 0.8
    shares = (with_child * zipf(n_children, 2.0)).tolist()
    groups, parents = [], []
    for p in (l0 / (1 + with_child) * zipf(n_trees, 20.0)).tolist():
        root = len(parents)
        children = [(share, (root, root + 1 + i)) for i, share in enumerate(shares)]
        groups.append((p, [(1 - with_child, (root,)), *children]))
        parents += [-1] + [root] * n_children
    return plant(name, groups, parents, random_directions(len(parents), d_in))


def pairs(name: str = "pairs", n_pairs: int = N_FEATURES // 2, d_in: int = 128, l0: float = 8.0) -> Toy:
    """Pairs of equally frequent features with correlation .5; Zipf over pairs."""
    groups = []
    for i, p in enumerate((l0 / 2 * zipf(n_pairs, 20.0)).tolist()):
        both = p * p + 0.5 * p * (1 - p)
        active = 2 * p - both
        alone = (p - both) / active
        groups.append((active, [(alone, (2 * i,)), (alone, (2 * i + 1,)), (1 - 2 * alone, (2 * i, 2 * i + 1))]))
    return plant(name, groups, [-1] * 2 * n_pairs, random_directions(2 * n_pairs, d_in))


PLANTED = {"letters": letters, "dictionary": dictionary, "trees": trees, "pairs": pairs}
