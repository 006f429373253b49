"""Bootstrap intervals against exact formulas and planted effects."""

from __future__ import annotations

import pytest
import torch

from sae_train.evals.intervals import bootstrap, letters_by_seeds, paired_difference


def test_bootstrap_of_words_has_the_spread_of_the_mean():
    g = torch.Generator().manual_seed(0)
    values = (torch.rand(300, 2, generator=g) < torch.tensor([0.2, 0.7])).double()
    groups = torch.arange(300) % 3
    draws = bootstrap(values, groups, 4, 4000, seed=0)
    assert draws.shape == (4000, 4, 2) and draws[:, 3].isnan().all()
    for group in range(3):
        own = values[groups == group]
        assert torch.allclose(draws[:, group].mean(0), own.mean(0), atol=0.005)
        assert torch.allclose(draws[:, group].std(0), own.std(0, correction=0) / len(own) ** 0.5, rtol=0.05)
    assert torch.equal(draws[:, :3], bootstrap(values, groups, 4, 4000, seed=0)[:, :3])


def test_columns_are_resampled_together():
    values = torch.rand(50, 1, generator=torch.Generator().manual_seed(1))
    draws = bootstrap(torch.cat([values, 1 - values], 1), torch.zeros(50, dtype=torch.long), 1, 500, seed=0)
    assert torch.allclose(draws.sum(-1), torch.ones(500, 1, dtype=torch.float64))


def test_letters_and_seeds_both_widen_the_interval():
    letters = torch.linspace(0, 1, 26, dtype=torch.float64)
    same_seeds = letters.expand(3, 26)
    found = letters_by_seeds(same_seeds, n_draws=20_000)
    expected = letters.std(correction=0) / 26**0.5
    assert found.visible / 2.8 == pytest.approx(float(expected), rel=0.03)
    assert found.low == pytest.approx(0.5 - 1.96 * float(expected), abs=0.01)
    moved = letters_by_seeds(same_seeds + torch.tensor([[-0.3], [0.0], [0.3]]), n_draws=20_000)
    assert moved.visible > 1.5 * found.visible and moved.mean == pytest.approx(0.5)


def test_pairing_removes_what_letters_share():
    g = torch.Generator().manual_seed(0)
    letters = torch.rand(26, generator=g, dtype=torch.float64)
    a = letters + 0.01 * torch.randn(3, 26, generator=g)
    b = a - 0.03
    difference = paired_difference(a, b)
    assert difference.excludes_zero and difference.mean == pytest.approx(0.03)
    assert difference.visible < 0.03 < letters_by_seeds(a).visible
    nothing = paired_difference(a, letters + 0.01 * torch.randn(3, 26, generator=g))
    assert not nothing.excludes_zero
