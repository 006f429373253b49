"""The SAE: its formula, folding of the input scale and of decoder norms."""

from __future__ import annotations

import pytest
import torch

from sae_train.errors import UserError
from sae_train.sae.model import ARCHITECTURES, SAE, SAEConfig, fold_decoder_norm, fold_scale
from sae_train.training.metrics import held_out_metrics


def random_sae(architecture: str, d_in: int = 6, d_sae: int = 32, unit: bool = True) -> SAE:
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(architecture, d_in, d_sae, k=4 if architecture == "topk" else None))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        if unit:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        if architecture == "jumprelu":
            sae.threshold.abs_()
    return sae


X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_encode_and_decode_follow_the_formula(architecture):
    sae = random_sae(architecture)
    pre = (X - sae.b_dec) @ sae.W_enc + (sae.b_gate if architecture == "gated" else sae.b_enc)
    expected = {
        "relu": lambda: pre.relu(),
        "topk": lambda: pre.relu() * (pre >= pre.topk(4).values[:, -1:]),
        "jumprelu": lambda: pre * (pre > sae.threshold),
        "gated": lambda: (pre > 0) * ((pre - sae.b_gate) * sae.r_mag.exp() + sae.b_mag).relu(),
    }[architecture]()
    torch.testing.assert_close(sae.encode(X), expected)
    torch.testing.assert_close(sae(X), expected @ sae.W_dec + sae.b_dec)
    assert sae.W_enc.shape == (6, 32) and sae.W_enc.t().is_contiguous()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_folding_the_scale_lets_the_sae_take_raw_activations_with_unit_decoder_rows(architecture):
    sae, scale = random_sae(architecture), 3.7
    raw = fold_decoder_norm(fold_scale(sae, scale))
    torch.testing.assert_close(raw(X / scale), sae(X) / scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw.encode(X / scale), sae.encode(X) / scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw.W_dec.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
@torch.no_grad()
def test_folding_decoder_norms_keeps_the_function(architecture):
    sae = random_sae(architecture, unit=False)
    torch.testing.assert_close(fold_decoder_norm(sae)(X), sae(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_held_out_metrics_equal_their_definitions(architecture):
    sae = random_sae(architecture)
    found, latents, error = held_out_metrics(sae, X), sae.encode(X), X - sae(X)
    assert found["metrics/l0"] == pytest.approx((latents > 0).sum(1).float().mean().item())
    ev = 1 - error.square().sum() / (X - X.mean(0)).square().sum()
    assert found["metrics/explained_variance"] == pytest.approx(ev.item(), rel=1e-5)
    assert found["metrics/mse"] == pytest.approx((error.square().sum() / X.square().sum()).item(), rel=1e-5)
    torch.testing.assert_close(found["density"], (latents > 0).float().mean(0))


def test_what_an_architecture_does_not_have_is_refused():
    with pytest.raises(UserError, match="encode_sparse needs a topk"):
        random_sae("relu").encode_sparse(X)
    with pytest.raises(UserError, match="unknown"):
        SAE(SAEConfig("relux", 2, 4))
