"""The way that needs no Triton against kernels/naive.py in float64, where both differ by rounding only (1e-12)."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kernels import checks
from benchmarks.kernels.bench_problem import Problem, batches, decoder_rows, level
from benchmarks.kernels.bench_sides import Ours
from sae_train.errors import UserError
from sae_train.kernels import cpu, naive, ops, patterns, screen


def weights(batch: int, d_in: int, d_sae: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_sae, d_in)]
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def topk(kernels, x, W_enc, b_enc, b_dec, W_dec, k):
    return kernels.decode(*kernels.encode_topk(x, W_enc, b_enc, b_dec, k), W_dec, b_dec)


def assert_same(ours, theirs, inputs):
    probe = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view(ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * probe).sum(), inputs, materialize_grads=True),
        torch.autograd.grad((theirs * probe).sum(), inputs, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["encode_topk", "encode_relu", "encode_jumprelu", "decode"])
def test_the_truth_has_the_public_names_and_arguments(name):
    assert [*inspect.signature(getattr(naive, name)).parameters, "impl"] == [
        *inspect.signature(getattr(ops, name)).parameters
    ]


def test_the_truth_has_the_values_of_a_calculation_by_hand():
    x, b_dec = torch.tensor([[3.0, 1.0]]), torch.tensor([1.0, 0.0])
    W_enc, b_enc = torch.tensor([[1.0, -1.0, 0.5], [0.0, 1.0, 1.0]]), torch.tensor([0.0, 0.5, 1.0])
    encoder = x, W_enc, b_enc, b_dec
    assert naive.pre_activations(*encoder).tolist() == [[2.0, -0.5, 3.0]]
    assert naive.encode_relu(*encoder).tolist() == [[2.0, 0.0, 3.0]]
    assert naive.encode_jumprelu(*encoder, torch.tensor([2.5, 2.5, 2.5]), 0.1).tolist() == [[0.0, 0.0, 3.0]]
    assert [t.tolist() for t in naive.encode_topk(*encoder, 2)] == [[[3.0, 2.0]], [[2, 0]]]
    W_dec = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
    assert naive.decode(torch.tensor([[3.0, 2.0]]), torch.tensor([[2, 0]]), W_dec, b_dec).tolist() == [[3.0, 6.0]]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 1100), st.data())
def test_topk_and_decode_have_the_values_and_gradients_of_the_truth(batch, d_in, d_sae, data):
    k = data.draw(st.integers(1, min(d_sae, 16)) | st.integers(1, d_sae) | st.just(d_sae), "k")
    inputs = weights(batch, d_in, d_sae)
    assert_same(topk(ops, *inputs, k), topk(naive, *inputs, k), inputs)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 1100))
def test_relu_and_jumprelu_have_the_values_and_gradients_of_the_truth(batch, d_in, d_sae):
    encoder = weights(batch, d_in, d_sae)[:4]
    assert_same(ops.encode_relu(*encoder), naive.encode_relu(*encoder), encoder)
    theta = torch.rand(d_sae, dtype=torch.float64).requires_grad_()
    assert_same(
        ops.encode_jumprelu(*encoder, theta, 0.5), naive.encode_jumprelu(*encoder, theta, 0.5), [*encoder, theta]
    )


def test_a_latent_named_twice_is_decoded_twice():
    *_, b_dec, W_dec = weights(3, 4, 8)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[5, 5], [0, 7]])
    ours, theirs = (kernels.decode(values, indices, W_dec, b_dec) for kernels in (ops, naive))
    assert_same(ours, theirs, [values, W_dec, b_dec])


def test_gradients_survive_several_slabs(monkeypatch):
    monkeypatch.setattr(cpu, "SLAB_ELEMENTS", 3 * 64)
    inputs = weights(10, 4, 64)
    assert_same(topk(ops, *inputs, 5), topk(naive, *inputs, 5), inputs)


def test_all_negative_pre_activations_give_zero_values_and_zero_encoder_gradient():
    inputs = weights(6, 4, 32)
    with torch.no_grad():
        inputs[2].fill_(-1e3)
    recon = topk(ops, *inputs, 3)
    torch.testing.assert_close(recon, inputs[3].expand_as(recon))
    grads = torch.autograd.grad(recon.sum(), inputs)
    assert not grads[0].any() and not grads[1].any() and not grads[2].any() and not grads[4].any()


def test_duplicate_columns_and_ties_keep_exactly_the_k_largest_values():
    x, W_enc, b_enc, b_dec, _ = weights(8, 4, 128)
    with torch.no_grad():
        W_enc[:, 64:] = W_enc[:, :64]
        b_enc[64:] = b_enc[:64]
    values, indices = ops.encode_topk(x, W_enc, b_enc, b_dec, 7)
    torch.testing.assert_close(values.sort(1, descending=True).values, naive.encode_topk(x, W_enc, b_enc, b_dec, 7)[0])
    torch.testing.assert_close(naive.encode_relu(x, W_enc, b_enc, b_dec).gather(1, indices), values)
    assert all(len(set(row.tolist())) == 7 for row in indices)


def test_two_stage_top_k_equals_the_plain_one():
    pre = torch.randn(33, 4096, generator=torch.Generator().manual_seed(1))
    values, indices = patterns.top_k(pre, 50)
    assert torch.equal(values.sort(1).values, pre.topk(50).values.sort(1).values)
    assert torch.equal(pre.gather(1, indices), values)


@pytest.mark.parametrize("n_threads", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_k_th_largest_is_that_of_a_sort_with_ties_and_infinities(k, dtype, n_threads, monkeypatch):
    monkeypatch.setattr(patterns, "PARTITION_THREADS", n_threads)
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(1), dtype=dtype)
    rows[1], rows[2] = 0.0, rows[2].round()  # ties
    rows[3], rows[4, :5], rows[5, 30:] = -torch.inf, torch.inf, -torch.inf
    before = rows.clone()
    assert torch.equal(patterns.kth_largest(rows, k), rows.sort(1, descending=True).values[:, k - 1])
    assert torch.equal(rows, before)


@pytest.mark.parametrize("d_sae", [2, 2**15 - 1, 2**15, 2**16])
def test_entries_by_latent_keep_the_order_of_tokens_whatever_integers_sort_them(d_sae):
    latents = torch.tensor([[d_sae - 1, 0], [d_sae // 2, d_sae - 1], [0, d_sae - 1]])
    pattern = patterns.row_pattern(latents, d_sae)
    _, tokens, offsets = pattern.by_latent
    of = {latent: tokens[offsets[latent] : offsets[latent + 1]].tolist() for latent in latents.unique().tolist()}
    expected = {0: [0, 2], d_sae - 1: [0, 1, 2]} | ({d_sae // 2: [1]} if d_sae > 2 else {})
    assert of == (expected if d_sae > 2 else {0: [0, 2], 1: [0, 1, 1, 2]}) and len(offsets) == d_sae + 1


def test_entries_above_a_floor_have_the_gradients_of_the_true_relu():
    x, W_enc, b_enc, b_dec, W_dec = inputs = weights(9, 5, 48)
    pre, pattern = ops.active_above(x, W_enc, b_enc, b_dec, 0.0)
    ours = ops.decode_active(pre.square(), pattern, W_dec, b_dec)
    assert_same(ours, naive.encode_relu(x, W_enc, b_enc, b_dec).square() @ W_dec + b_dec, inputs)


def test_a_batch_without_active_latents_reconstructs_the_bias_and_has_finite_gradients():
    x, W_enc, b_enc, b_dec, W_dec = inputs = weights(4, 3, 16)
    pre, pattern = ops.active_above(x, W_enc, b_enc, b_dec, 1e6)
    recon = ops.decode_active(pre, pattern, W_dec, b_dec)
    torch.testing.assert_close(recon, b_dec.expand_as(recon))
    assert all(g.isfinite().all() for g in torch.autograd.grad(recon.sum(), inputs, allow_unused=True) if g is not None)


@pytest.mark.parametrize("kernels", [ops, naive])
def test_jumprelu_gradients_equal_the_hand_formula(kernels):
    pre = torch.tensor([[0.2, 0.45, 0.55, 0.9]], dtype=torch.float64, requires_grad=True)
    theta = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    out = kernels.jumprelu(pre, theta, 0.2)
    assert out.tolist() == [[0.0, 0.0, 0.55, 0.9]]
    d_pre, d_theta = torch.autograd.grad(out.sum(), (pre, theta))
    assert d_pre.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    # −(θ/ε) inside |pre − θ| < ε/2, below the threshold too: the kernel sees pre, not the masked output.
    torch.testing.assert_close(d_theta, torch.tensor([0.0, -2.5, -2.5, 0.0], dtype=torch.float64))


def test_active_jumprelu_counts_with_the_rectangle_as_the_threshold_s_gradient():
    pattern = ops.Pattern(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4]), 4)
    pre = torch.tensor([0.2, 0.45, 0.55, 0.9], dtype=torch.float64, requires_grad=True)
    theta = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    values, active = ops.jumprelu_active(pre, pattern, theta, 0.2)
    assert values.tolist() == [0.0, 0.0, 0.55, 0.9] and active.item() == 2
    (grad,) = torch.autograd.grad(active, theta, retain_graph=True)
    torch.testing.assert_close(grad, torch.tensor([0.0, -5.0, -5.0, 0.0], dtype=torch.float64))
    d_pre, d_theta = torch.autograd.grad(values.sum(), (pre, theta))
    assert d_pre.tolist() == [0.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(d_theta, torch.tensor([0.0, -2.5, -2.5, 0.0], dtype=torch.float64))


def test_the_true_count_has_the_rectangle_as_the_threshold_s_gradient():
    pre = torch.tensor([0.2, 0.45, 0.55, 0.9], dtype=torch.float64, requires_grad=True)
    theta = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    out = naive.step(pre, theta, 0.2)
    assert out.tolist() == [0.0, 0.0, 1.0, 1.0]
    d_pre, d_theta = torch.autograd.grad(out.sum(), (pre, theta), materialize_grads=True)
    assert not d_pre.any()
    torch.testing.assert_close(d_theta, torch.tensor([0.0, -5.0, -5.0, 0.0], dtype=torch.float64))


def test_each_latent_can_have_a_rectangle_of_its_own():
    pattern = ops.Pattern(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4]), 4)
    pre = torch.tensor([0.2, 0.45, 0.55, 0.9], dtype=torch.float64)
    theta = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    _, active = ops.jumprelu_active(pre, pattern, theta, torch.tensor([1.0, 0.08, 0.2, 1.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(active, theta)
    torch.testing.assert_close(grad, torch.tensor([-1.0, 0.0, -5.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("screened", [True, False])
def test_a_training_step_makes_no_tensor_of_the_size_of_batch_times_d_sae(arch, screened, monkeypatch):
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: screened)
    monkeypatch.setattr(screen, "SLAB_ELEMENTS", 32 * 2048)
    monkeypatch.setattr(cpu, "SLAB_ELEMENTS", 32 * 2048)
    p = Problem(arch, 128, 2048, 256, 4)
    rows = decoder_rows(p)
    x = batches(p, rows)[0]
    side = Ours(p, rows, level(p, rows, x), False)
    if arch == "batchtopk":
        side.learner.initialise(x)
    side.step(x)
    assert checks.dense_blocks(lambda: side.step(x), 256, 128, 2048) == set()


def test_an_absent_implementation_is_refused_in_one_sentence():
    x, W_enc, b_enc, b_dec, _ = weights(2, 2, 4)
    with pytest.raises(UserError, match="runs on CUDA, not on cpu"):
        ops.encode_topk(x, W_enc, b_enc, b_dec, 1, impl="triton")
