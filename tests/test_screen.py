"""Selection by bfloat16 and float32 together: exact, whatever the rounding, on any processor."""

from __future__ import annotations

import pytest
import torch

from sae_train.kernels import cpu, naive, ops, screen

N, D, F, K = 40, 48, 1024, 8


def problem(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations (N, D), latent-major weights (F, D) and biases that try the bound in one way each."""
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(N, D, generator=g), torch.randn(F, D, generator=g), torch.randn(F, generator=g)
    if kind == "uneven norms":
        W *= torch.rand(F, 1, generator=g) ** 4 * 30
        x *= torch.rand(N, 1, generator=g) ** 4 * 30
    if kind == "close together":  # differences far below what bfloat16 can tell
        W = W[:1] + 1e-4 * W
    if kind == "cancelling bias":  # products of 300 or so that a bias takes away
        x, W, b = x + 3, W + 2, -300 + b
    if kind == "duplicates":
        W, b = W[: F // 8].repeat(8, 1), b[: F // 8].repeat(8)
    if kind == "all negative":
        b = b - 200
    if kind == "zeros":
        x[::2] = 0
    if kind == "one group holds the top":
        W[3 :: F // 16] += 2
        x = x.abs()
    return x, W.contiguous(), b


def truth(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pre-activations in float64."""
    return naive.pre_activations(x.double(), W.double().t(), b.double(), 0.0)


KINDS = ("plain", "uneven norms", "close together", "cancelling bias", "duplicates", "all negative", "zeros",
         "one group holds the top")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_every_entry(kind):
    x, W, b = problem(kind)
    pre = truth(x, W, b)
    u, slack = next(screen.Screen.of(x, W, b).slabs())
    assert ((pre - u).abs() <= slack[:, None] + 2 * screen.ROUNDING * u.abs()).all()


def test_half_the_bound_would_not_hold():
    """The bound is no guess with room to spare: rounding one operand alone reaches more than half of its term."""
    x, W = torch.full((4, 128), 1 + 2.0**-8), torch.ones(F, 128)
    u, slack = next(screen.Screen.of(x, W, torch.zeros(F)).slabs())
    assert ((x @ W.t() - u).abs() > slack[:, None] / 2).all()


@pytest.mark.parametrize("slab", [2**23, 7 * F])
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_largest_are_those_of_float32(kind, slab, monkeypatch):
    monkeypatch.setattr(screen, "SLAB_ELEMENTS", slab)
    x, W, b = problem(kind)
    values, latents = screen.topk(x, W, b, K)
    pre = truth(x, W, b).float()
    scale = x.norm(dim=1, keepdim=True) * W.norm(dim=1).max() + b.abs().max()
    assert all(len(set(row)) == K for row in latents.tolist())
    assert ((values - pre.gather(1, latents)).abs() <= 3e-6 * scale).all()
    assert ((values.sort(1).values - pre.topk(K).values.sort(1).values).abs() <= 3e-6 * scale).all()


@pytest.mark.parametrize("level", [2.0, 0.0, -0.5])
def test_candidates_are_all_that_can_reach_the_level_token_by_token_and_group_by_group(level):
    u = torch.randn(7, 8 * screen.GROUP, generator=torch.Generator().manual_seed(2)).bfloat16()
    u[1], u[2], u[3, ::3] = -9.0, 9.0, -torch.inf  # no candidate, nothing else, some that can never be one
    slack = torch.rand(7, generator=torch.Generator().manual_seed(3))
    latents, counts = screen._candidates(u, screen._maxima(u), torch.full((7,), level), slack)
    for row, found in enumerate(latents.split(counts.tolist())):
        reach = u[row].float() + 2 * screen.ROUNDING * u[row].abs().float() + slack[row]
        assert set((reach >= level).nonzero().view(-1).tolist()) <= set(found.tolist())
        assert (reach[found] >= level - 8 * screen.ROUNDING * (abs(level) + 1)).all()
        assert found.tolist() == sorted(found.tolist(), key=lambda latent: (latent % 8, latent))


@pytest.mark.parametrize("k", [1, F // screen.GROUP])
@pytest.mark.parametrize("kind", ["plain", "duplicates", "all negative", "zeros"])
def test_one_latent_and_one_for_each_group_are_selected_exactly(kind, k):
    x, W, b = problem(kind)
    values, latents = screen.topk(x, W, b, k)
    pre = truth(x, W, b)
    assert all(len(set(row)) == k for row in latents.tolist())
    torch.testing.assert_close(values.double().sort(1).values, pre.topk(k).values.sort(1).values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values.double(), pre.gather(1, latents), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("per_latent", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_above_a_floor_are_those_of_float32(kind, per_latent):
    x, W, b = problem(kind)
    pre = truth(x, W, b)
    floor = pre.quantile(0.98, dim=0).float() if per_latent else float(pre.flatten().topk(F).values[-1])
    values, pattern = screen.above(x, W, b, floor)
    dense = torch.zeros(N, F).index_put((pattern.tokens, pattern.latents), values)
    near = 3e-6 * (x.norm(dim=1, keepdim=True) * W.norm(dim=1).max() + b.abs().max())
    sure, out = pre > floor + near, pre < floor - near
    assert ((dense != 0) | ~sure).all() and not dense[out].any()
    assert ((dense - pre).abs() <= near)[sure].all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_entry_above_a_floor_has_a_minus_sign(kind):
    x, W, b = problem(kind)
    pre = truth(x, W, b)
    for floor in (0.0, float(pre.median()), pre.quantile(0.5, dim=0).float()):
        u, _ = next(screen.Screen.raised(x, W, b, floor).slabs())
        assert not (u.signbit() & (pre > floor)).any()


@pytest.mark.parametrize("long", ["token", "latent"])
def test_one_long_row_does_not_make_the_others_candidates(long, monkeypatch):
    x, W, b = problem("plain")
    {"token": x, "latent": W}[long][0] *= 1000
    exact, seen = screen._exact, []
    monkeypatch.setattr(screen, "_exact", lambda *args: seen.append(args[3]) or exact(*args))
    values, _ = screen.above(x, W, b, 12.0)
    assert len(values) <= len(seen[0]) <= 1.3 * len(values)


def test_no_entry_above_a_floor_is_an_empty_pattern():
    values, pattern = screen.above(*problem("plain"), 1e6)
    assert values.numel() == 0 and pattern.offsets.tolist() == [0] * (N + 1)


def test_training_selects_and_differentiates_alike_with_and_without(monkeypatch):
    x, W, b = problem("plain")
    leaves = [x, W.t().clone(), b, torch.randn(D, generator=torch.Generator().manual_seed(1))]
    outcomes = []
    for pays in (True, False):
        monkeypatch.setattr(screen, "pays", lambda *_, pays=pays: pays)
        ts = [t.clone().requires_grad_() for t in leaves]
        for pre, pattern in (ops.active_topk(*ts, K), ops.active_above(*ts, 15.0)):
            dense = torch.zeros(N, F).index_put((pattern.tokens, pattern.latents), pre)
            outcomes.append([dense.detach(), *torch.autograd.grad(dense.square().sum(), ts)])
    for with_it, without in zip(outcomes[:2], outcomes[2:], strict=True):
        assert with_it[0].count_nonzero() == without[0].count_nonzero() > 0
        for a, c in zip(with_it, without, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4 * float(c.abs().max()))


@pytest.mark.parametrize("hurt", ["x", "W", "b"])
def test_nan_reaches_the_values_or_is_seen_in_the_input(hurt, monkeypatch):
    monkeypatch.setattr(screen, "pays", lambda *_: True)
    x, W, b = problem("plain")
    {"x": x, "W": W, "b": b}[hurt][5] = float("nan")
    for values, _ in (
        ops.active_topk(x, W.t(), b, torch.zeros(D), K),
        ops.active_above(x, W.t(), b, torch.zeros(D), 15.0),
    ):
        assert values.isnan().any()


def test_small_wide_and_odd_problems_are_left_to_the_plain_way(monkeypatch):
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: True)
    x = torch.zeros(4, 512)
    assert screen.pays(x, 16_384, 50)
    assert not screen.pays(x, 16_384, 400) and not screen.pays(x, 16_385, 50) and not screen.pays(x[:, :64], 16_384, 50)
    assert not screen.pays(x.double(), 16_384, 50) and not screen.pays(x, 1024, 1)
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: False)
    assert not screen.pays(x, 16_384, 50)
    assert cpu.screen is screen
