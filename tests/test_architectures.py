"""The architectures in training: selection against a dense sort, losses and gradients against dense float64."""

from __future__ import annotations

import pytest
import torch

from sae_train.config import SAESpec, TrainSettings, resolve, units
from sae_train.errors import UserError
from sae_train.kernels import cpu, ops
from sae_train.runs.plan import make_plan
from sae_train.sae.model import SAE, SAEConfig
from sae_train.training.architectures import TRAINED
from sae_train.training.ranks import Mesh

B, D, F = 12, 5, 64
PREFIXES = (1 / 8, 1 / 2, 1.0)


def made(arch: str, l0: float = 3.0):
    """An architecture with random float64 weights, and a batch."""
    g = torch.Generator().manual_seed(0)
    form = TRAINED[arch].form
    sae = SAE(SAEConfig(form, D, F, k=int(l0) if form == "topk" else None, dtype="float64"))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    settings = TrainSettings(matryoshka_prefixes=PREFIXES)
    kind = TRAINED[arch](sae, SAESpec(arch=arch, width=F, l0=l0), settings, Mesh())
    x = torch.randn(B, D, generator=g, dtype=torch.float64)
    if form == "jumprelu":
        kind.state["threshold"] = torch.tensor(0.1, dtype=torch.float64)
    return kind, x


def dense_batch_topk(pre: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of relu(pre), of equal ones the first, by a stable sort of everything."""
    flat = pre.relu().flatten()
    chosen = flat.sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(flat).scatter(0, chosen, 1.0).view_as(pre)


def pre_of(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def dense_loss(arch: str, sae: SAE, x: torch.Tensor, l0: float) -> tuple[torch.Tensor, ...]:
    """(error, sparsity, extra) as the papers write them, on dense latents; 0 for what an architecture has not."""
    zero = torch.zeros((), dtype=torch.float64)
    if arch == "gated":
        s = (x - sae.b_dec) @ sae.W_enc
        gate = (s + sae.b_gate).relu()
        f = (s + sae.b_gate > 0) * (sae.r_mag.exp() * s + sae.b_mag).relu()
        frozen = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        sparsity = (gate * sae.W_dec.norm(dim=1)).sum(1).mean()
        recon = f @ sae.W_dec + sae.b_dec
        return (x - recon).pow(2).sum(1).mean(), sparsity, (x - frozen).pow(2).sum(1).mean()
    pre = pre_of(sae, x)
    f = pre.relu() * dense_batch_topk(pre, round(l0 * len(x)))
    shares = PREFIXES if arch == "matryoshka" else (1.0,)
    ends = [round(share * F) for share in shares]
    errors = [(x - f[:, :end] @ sae.W_dec[:end] - sae.b_dec).pow(2).sum(1).mean() for end in ends]
    return sum(errors) / len(errors), zero, zero


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka", "gated"])
@pytest.mark.parametrize("slab", [2**20, 3 * F])
def test_the_loss_has_the_value_and_gradients_of_the_dense_formula(arch, slab, monkeypatch):
    monkeypatch.setattr(cpu, "SLAB_ELEMENTS", slab)
    kind, x = made(arch)
    run = kind.forward(x)
    zero = torch.zeros((), dtype=torch.float64)
    ours = run.error, zero if run.sparsity is None else run.sparsity, zero if run.extra is None else run.extra
    theirs = dense_loss(arch, kind.sae, x, 3.0)
    leaves = [kind.sae.W_enc, kind.sae.W_dec, *kind.leaves.values()]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weighted = [1.0, 0.7, 1.3]
    grads = [
        torch.autograd.grad(sum(w * t for w, t in zip(weighted, terms, strict=True)), leaves)
        for terms in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gated_s_auxiliary_term_gives_no_gradient_to_the_decoder():
    kind, x = made("gated")
    extra = kind.forward(x).extra
    assert torch.autograd.grad(extra, kind.sae.W_dec, allow_unused=True, retain_graph=True) == (None,)
    (encoder,) = torch.autograd.grad(extra, kind.sae.W_enc)
    assert encoder.any()


@pytest.mark.parametrize("floor", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("slab", [2**20, 2 * F])
@pytest.mark.parametrize("count", [1, 18, 30])
def test_batchtopk_keeps_exactly_the_largest_of_the_batch_whatever_the_floor(floor, slab, count, monkeypatch):
    monkeypatch.setattr(cpu, "SLAB_ELEMENTS", slab)
    kind, x = made("batchtopk")
    weights = kind.sae.W_enc, kind.sae.b_enc, kind.sae.b_dec
    found, pattern, smallest = ops.active_batch_topk(x, *weights, count, torch.tensor(floor, dtype=torch.float64))
    assert found.numel() == count and smallest == found.min()
    mask = torch.zeros(B, F, dtype=torch.float64).index_put((pattern.tokens, pattern.latents), torch.ones(()).double())
    assert torch.equal(mask, dense_batch_topk(pre_of(kind.sae, x), count))


@pytest.mark.parametrize("slab", [2**20, 2 * F])
def test_equal_pre_activations_are_kept_in_the_order_of_token_and_latent(slab, monkeypatch):
    monkeypatch.setattr(cpu, "SLAB_ELEMENTS", slab)
    x, W_enc, zero = torch.ones(B, D), torch.ones(D, F) / D, torch.zeros(F)
    found, pattern, _ = ops.active_batch_topk(x, W_enc, zero, torch.zeros(D), F + 3, torch.tensor(0.0))
    assert found.numel() == F + 3
    assert pattern.tokens.tolist() == [0] * F + [1] * 3
    assert pattern.latents.tolist() == [*range(F), 0, 1, 2]


def test_fewer_positive_pre_activations_than_asked_are_all_kept():
    x, W_enc, b_enc = torch.ones(4, D), torch.zeros(D, F), torch.full((F,), -1.0)
    b_enc[5] = 1.0
    found, pattern, _ = ops.active_batch_topk(x, W_enc, b_enc, torch.zeros(D), 40, torch.tensor(0.3))
    assert pattern.latents.tolist() == [5] * 4 and found.tolist() == [1.0] * 4


def test_prefix_reconstructions_equal_dense_ones_and_the_last_is_the_whole():
    kind, x = made("matryoshka")
    sae, pre = kind.sae, pre_of(kind.sae, x)
    f = pre.relu() * dense_batch_topk(pre, 3 * B)
    values, pattern, _ = ops.active_batch_topk(
        x, sae.W_enc, sae.b_enc, sae.b_dec, 3 * B, torch.tensor(0.0, dtype=torch.float64)
    )
    blocks = ops.decode_blocks(values, pattern, torch.tensor([0, 8, 32, 64]), sae.W_dec)
    for i, end in enumerate((8, 32, 64)):
        torch.testing.assert_close(blocks.cumsum(1)[:, i], f[:, :end] @ sae.W_dec[:end], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kind.forward(x).recon, f @ sae.W_dec + sae.b_dec, rtol=1e-12, atol=1e-12)


def test_the_names_that_the_settings_take_are_those_that_can_be_trained():
    assert list(TRAINED) == list(units.ARCHITECTURES)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"matryoshka_prefixes": "1/2,1/4,1"}, "rising shares"),
        ({"matryoshka_prefixes": "1/4,1/2"}, "the last of them 1"),
        ({"matryoshka_prefixes": "0,1"}, "is not a share"),
        ({"width": 16, "l0": 2, "matryoshka_prefixes": "1/64,1"}, "at width 16 a prefix adds no latent"),
    ],
)
def test_prefixes_that_cannot_be_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        make_plan(resolve({"arch": "matryoshka"} | given))


def test_topk_refuses_a_fractional_l0():
    with pytest.raises(UserError, match="topk keeps a whole number"):
        make_plan(resolve({"l0": 2.5}))


def test_l0_may_be_fractional_where_it_is_a_mean():
    assert resolve({"arch": "batchtopk,matryoshka,gated", "l0": 2.5}).specs[0].l0 == 2.5


def test_jumprelu_starts_with_the_encoder_scale_that_reconstructs_best():
    """At half or twice that scale (thresholds with it) the error is larger; without it many latents overshoot."""
    kind, _ = made("jumprelu", l0=8.0)
    sae, x = kind.sae, torch.randn(400, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.zero_()
        kind.start(x)

    def error(scale):
        pre = (x - sae.b_dec) @ sae.W_enc
        return ((pre * (pre > sae.threshold) * scale) @ sae.W_dec + sae.b_dec - x).pow(2).sum()

    pre = (x - sae.b_dec) @ sae.W_enc
    assert float((pre > sae.threshold).sum() / len(x)) == pytest.approx(16, rel=0.02)
    assert all(error(1.0) < error(scale) for scale in (0.5, 0.9, 1.1, 2.0))
    assert sae.W_enc.norm(dim=0).max() < 0.7


def test_the_price_of_jumprelu_s_l0_follows_the_error():
    """λ = coefficient·⟨‖e‖²⟩/L0*, without a gradient of its own."""
    kind, x = made("jumprelu")
    run = kind.forward(x)
    assert not run.price.requires_grad
    torch.testing.assert_close(run.price * 3.0, run.error.detach())
