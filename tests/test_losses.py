"""Loss terms against hand formulas and finite differences."""

from __future__ import annotations

import torch

from sae_train.kernels import ops
from sae_train.training import losses

G = torch.Generator().manual_seed(0)


def tensors(batch=6, d_in=4, d_sae=12):
    shapes = [(batch, d_in), (d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,)]
    return [torch.randn(s, generator=G, dtype=torch.float64) for s in shapes]


def test_mse_sums_over_d_in_and_averages_over_the_batch():
    assert losses.mse(torch.ones(3, 5), torch.zeros(3, 5)).item() == 5.0


def test_l1_weights_each_latent_by_its_decoder_norm():
    W_dec = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    pattern = ops.Pattern(torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3]), d_sae=2)
    value = losses.l1(torch.tensor([1.0, 2.0, 1.0]), pattern, W_dec)
    assert value.item() == (5 + 4 + 5) / 2


def test_aux_k_gradient_equals_finite_differences_and_reaches_the_encoder():
    x, W_enc, b_enc, W_dec, b_dec = tensors()
    recon, dead = torch.zeros_like(x), torch.tensor([1, 4, 7])
    inputs = [t.requires_grad_() for t in (W_enc, b_enc, W_dec)]
    assert torch.autograd.gradcheck(lambda *w: losses.aux_k(x, recon, *w, b_dec, dead), inputs, eps=1e-7, atol=1e-6)
    d_W, d_b, _ = torch.autograd.grad(losses.aux_k(x, recon, *inputs, b_dec, dead), inputs)
    alive = [i for i in range(12) if i not in dead.tolist()]
    assert d_W[:, dead].abs().sum() > 0 and d_b[dead].abs().sum() > 0
    assert not d_W[:, alive].any() and not d_b[alive].any()


def test_aux_k_keeps_only_the_k_largest_dead_latents():
    x, W_enc, b_enc, W_dec, b_dec = tensors()
    dead, recon = torch.arange(12), torch.zeros_like(x)
    acts = torch.relu((x - b_dec) @ W_enc + b_enc)
    kept = torch.zeros_like(acts).scatter(1, acts.topk(2).indices, acts.topk(2).values)
    expected = (x - kept @ W_dec).square().sum(1).mean() / x.square().sum(1).mean()
    torch.testing.assert_close(losses.aux_k(x, recon, W_enc, b_enc, W_dec, b_dec, dead), expected)


def test_aux_k_leaves_the_reconstruction_without_gradient():
    x, W_enc, b_enc, W_dec, b_dec = tensors()
    recon = torch.zeros_like(x).requires_grad_()
    value = losses.aux_k(x, recon, W_enc.requires_grad_(), b_enc, W_dec, b_dec, torch.tensor([0]))
    assert torch.autograd.grad(value, recon, allow_unused=True) == (None,)


def test_pre_activation_loss_pulls_only_dead_latents_below_their_threshold():
    x = torch.tensor([[1.0]])
    W_enc, b_enc = torch.tensor([[0.1, 2.0, 0.3]]), torch.zeros(3)
    W_dec, theta = torch.tensor([[2.0], [1.0], [1.0]]), torch.tensor([0.5, 0.5, 0.5])
    value = losses.pre_activation(x, W_enc, b_enc, W_dec, torch.zeros(1), theta, torch.tensor([0, 1]))
    torch.testing.assert_close(value, torch.tensor(0.4 * 2.0))


def test_k_aux_is_the_power_of_two_nearest_half_of_d_in():
    assert [losses.nearest_power_of_two(d / 2) for d in (2, 240, 256, 768, 2304)] == [1, 128, 128, 512, 1024]
