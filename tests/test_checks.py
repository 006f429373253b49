"""The kernels against kernels/naive.py by the benchmark's own check, and that check against planted bugs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import checks
from sae_train.kernels import batch_topk, cpu, ops, patterns, screen
from sae_train.kernels.crossover import Crossover

ODD = checks.SHAPES[1:2]  # divides by nothing
SCREENED = ((20, 128, 2048, 9),)


def wrong(**options) -> list[checks.Difference]:
    return [d for d in checks.differences(**options) if not d.good]


def test_every_op_agrees_with_the_truth_on_awkward_shapes_and_inputs():
    assert wrong() == []
    assert len(checks.differences(shapes=ODD)) > 300


def test_selection_by_bfloat16_agrees_with_the_truth(monkeypatch):
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: True)
    assert wrong(shapes=SCREENED) == []


def edited(function, edit):
    return lambda *args, **kwargs: edit(function(*args, **kwargs))


def without_last(pair):
    """Forget the last entry of the batch."""
    values, pattern = pair
    return values[:-1], replace(
        pattern, latents=pattern.latents[:-1], offsets=pattern.offsets.clamp(max=max(0, len(values) - 1))
    )


def late_row(pair):
    """Give every row the entries of the next one."""
    return pair[0], pair[1].roll(1, 0)


def one_row_late(pattern):
    """Give every row the entries of the row before it."""
    return replace(pattern, offsets=torch.cat([pattern.offsets[:1], pattern.offsets[:-1]]))


def one_too_few(pair):
    """Lose the largest of each row to the smallest latent."""
    values, latents = pair
    return values, latents.scatter(1, values.argmax(1, keepdim=True), 0)


class Forgets:
    """torch.autograd.Function's gradient number i, left away."""

    def __init__(self, function, i):
        self.function, self.i = function, i

    def __call__(self, ctx, *grads):
        out = list(self.function(ctx, *grads))
        out[self.i] = None if out[self.i] is None else torch.zeros_like(out[self.i])
        return tuple(out)


BUGS = {
    "sums by latent miss the last latent": (cpu, "sum_by_latent", lambda out: torch.cat([out[:-1], 0 * out[:1]])),
    "sums by latent are scaled": (cpu, "sum_by_latent", lambda out: out * 1.0001),
    "sums by token are shifted": (cpu, "sum_by_token", lambda out: out.roll(1, 0)),
    "products at the entries are in another order": (cpu, "dots", lambda out: out.flip(0)),
    "products have a wrong sign": (cpu, "dots", lambda out: -out),
    "memory is not written": (cpu, "sum_by_token", lambda out: torch.empty_like(out)),
    "one of the k largest is missed": (cpu, "top_k", one_too_few),
    "latents of another row": (cpu, "top_k", late_row),
    "an entry above the floor is lost": (cpu, "_above", without_last),
    "the batch's largest lack one": (batch_topk, "largest", lambda pair: (pair[0][1:], pair[1][1:])),
    "blocks are one row late": (batch_topk, "blocks_of", one_row_late),
    "dense blocks are one row late": (patterns, "_grids", lambda grids: ((at, grid.roll(1, 0)) for at, grid in grids)),
    "the error is halved": (cpu, "decode_error", lambda pair: (pair[0], pair[1] / 2)),
    "the count is off by one": (cpu, "jumprelu_active", lambda pair: (pair[0], pair[1] + 1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_flagged(bug, monkeypatch):
    module, name, edit = BUGS[bug]
    monkeypatch.setattr(module, name, edited(getattr(module, name), edit))
    found = wrong(shapes=ODD)
    assert found and all(d.relative_rms != d.relative_rms or d.relative_rms > 5 * d.limit for d in found)


@pytest.mark.parametrize(
    ("function", "i"),
    [(cpu._Encode, i) for i in range(4)]
    + [(cpu._Decode, i) for i in range(3)]
    + [(cpu.JumpReLU, 0), (cpu.JumpReLU, 1), (cpu.Step, 1)],
)
def test_a_forgotten_gradient_is_flagged(function, i, monkeypatch):
    monkeypatch.setattr(function, "backward", staticmethod(Forgets(function.backward, i)))
    assert wrong(shapes=ODD)


def test_a_bound_that_forgets_what_rounding_leaves_over_is_flagged(monkeypatch):
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: True)
    round_rows = screen._round

    def without_rest(*given, **options):
        rounded, norms, rest = round_rows(*given, **options)
        return rounded, norms, torch.zeros_like(rest)

    monkeypatch.setattr(screen, "_round", without_rest)
    monkeypatch.setattr(screen, "ROUNDING", 0.0)
    assert wrong(shapes=SCREENED)


def test_uninitialised_memory_holds_nan_during_the_checks_and_only_then():
    with checks.poisoned():
        assert torch.zeros(3).new_empty(1000).isnan().all() and torch.empty_like(torch.zeros(9)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("slab", [2**23, 2 * 40])
def test_dense_products_and_sparse_sums_are_the_same(slab, monkeypatch):
    monkeypatch.setattr(patterns, "DENSE_ELEMENTS", slab)
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=g, dtype=torch.float64) for s in [(9, 5), (5, 40), (40,), (5,), (40, 5)]]
    outcomes = []
    for dense in (False, True):
        x, W_enc, b_enc, b_dec, W_dec = (t.clone().requires_grad_() for t in made)
        always = Crossover(mean=1.0 * dense, dense=dense)
        pre, pattern = ops.active_above(x, W_enc, b_enc, b_dec, 1.0, crossover=always)
        assert pattern.dense is dense
        recon, error = ops.decode_error(pre.square(), pattern, W_dec, b_dec, x)
        outcomes.append([recon, *torch.autograd.grad(error, (x, W_enc, b_enc, b_dec, W_dec))])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_way_changes_by_a_running_mean_and_not_to_and_fro():
    def batch(share: float) -> patterns.Pattern:
        n = round(share * 10_000)
        return patterns.Pattern(torch.zeros(n, dtype=torch.long), torch.linspace(0, n, 101).long(), 100)

    choice = Crossover()
    assert not choice.choose(batch(0.01)).dense
    taken = [choice.choose(batch(0.5 if i % 20 == 0 else 0.01)).dense for i in range(1, 21)]
    assert not any(taken)  # one batch of many
    ways = [choice.choose(batch(0.3)).dense for _ in range(10)]
    assert ways == sorted(ways) and ways[-1]
    near = [choice.choose(batch(0.048 + 0.004 * (i % 2))).dense for i in range(60)]
    assert all(near)  # inside the margin it stays as it is
    assert not [choice.choose(batch(0.01)).dense for _ in range(30)][-1]
    assert Crossover().choose(batch(0.3)).dense  # the first batch decides alone
