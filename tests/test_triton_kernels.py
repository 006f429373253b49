"""The Triton kernels: under the interpreter on a CPU (in a process of its own), and as they are where there is a GPU.

Tolerances are relative RMS against kernels/naive.py in float64: 3e-6, which is ten float32 roundings or so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU; the interpreter runs these in another process"
)
RMS = 3e-6

if INTERPRETED or torch.cuda.is_available():
    from sae_train.kernels import cpu, encoders, naive, ops, patterns
    from sae_train.kernels import select as select_module
    from sae_train.kernels.shapes import Plan

    PUBLIC = ("encode_topk", "encode_relu", "encode_jumprelu", "decode")
    TRITON = SimpleNamespace(**{name: partial(getattr(ops, name), impl="triton") for name in PUBLIC})
    TILE = {"block_m": 16, "block_k": 16, "warps": 4, "stages": 2}
    PLANS = [
        Plan("fused", 16, 4, **TILE),
        Plan("fused", 32, 2, **TILE),
        Plan("slab", 16, 2, **TILE),
        Plan("sort", 1, 1),
    ]
else:
    PLANS = [None]
each_plan = pytest.mark.parametrize("how", PLANS, ids=lambda how: how and f"{how.path}-{how.group}-{how.R}")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests below run in this process")
def test_the_kernels_pass_their_tests_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def inputs(batch: int, d_in: int, d_sae: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_sae, d_in)]
    return [torch.randn(s, generator=g).to(DEVICE).requires_grad_() for s in shapes]


def rms(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    error, scale = (ours.double() - theirs.double()).square().mean(), theirs.double().square().mean()
    return (error / scale.clamp_min(1e-30)).sqrt().item()


def assert_like_the_truth(ours, theirs, tensors):
    """Value and gradients of ours(tensors) in float32 and of theirs(tensors), by kernels/naive.py, in float64."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    ours, theirs = ours(tensors), theirs(wide)
    probe = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64, device=ours.device).view(ours.shape)
    assert rms(ours, theirs) < RMS
    gradients = [
        torch.autograd.grad((out * probe.to(out.dtype)).sum(), leaves, allow_unused=True)
        for out, leaves in ((ours, tensors), (theirs, wide))
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or rms(a, b) < RMS


def topk(kernels, k, t):
    return kernels.decode(*kernels.encode_topk(*t[:4], k), t[4], t[3])


def assert_exact(x, W, b, k, how):
    """The selection equals a stable full sort of the pre-activations as float64 has them (inputs are exact there)."""
    values, latents = encoders.topk(x, W, b, k, how)
    pre = naive.pre_activations(x.double(), W.double().t(), b.double(), 0.0)
    expected = pre.sort(dim=1, descending=True, stable=True)
    assert torch.equal(latents.long().sort(1).values, expected.indices[:, :k].sort(1).values)
    assert rms(values.sort(1, descending=True).values, expected.values[:, :k]) < RMS


@runs
@each_plan
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), [(5, 20, 203, 7), (17, 16, 128, 1)])
def test_top_k_is_the_set_of_a_full_sort(how, batch, d_in, d_sae, k):
    x, W_enc, b_enc, *_ = (t.detach() for t in inputs(batch, d_in, d_sae))
    assert_exact(x, W_enc.t().contiguous(), b_enc, k, how)


@runs
@each_plan
def test_ties_go_to_the_lowest_latent(how):
    g = torch.Generator().manual_seed(3)
    x, W = (torch.randint(-2, 3, s, generator=g).float().to(DEVICE) for s in ((5, 6), (150, 6)))
    assert_exact(x, W, W.new_zeros(150), 9, how)


@runs
@pytest.mark.parametrize("how", PLANS[:2], ids=lambda how: how and f"{how.path}-{how.group}-{how.R}")
def test_products_of_half_precision_are_selected_exactly_too(how):
    """Whole numbers up to 60 have far fewer than the 17 bits to which pre-activations are cut."""
    g = torch.Generator().manual_seed(3)
    x, W = (torch.randint(-2, 3, s, generator=g).to(DEVICE, torch.float16) for s in ((5, 24), (150, 24)))
    assert_exact(x, W, torch.zeros(150, device=DEVICE), 9, how)


@runs
def test_entries_of_half_precision_above_a_floor_are_all_and_only_those():
    g = torch.Generator().manual_seed(5)
    x, W = (torch.randn(s, generator=g).to(DEVICE, torch.float16) for s in ((4, 24), (70, 24)))
    b, floor = torch.zeros(70, device=DEVICE), torch.full((70,), 3.0, device=DEVICE)
    values, latents, offsets = encoders.above(x, W, b, floor, PLANS[0])
    pre = x.float() @ W.float().t()
    dense = torch.zeros_like(pre)
    dense[torch.arange(4, device=DEVICE).repeat_interleave(offsets.diff()), latents.long()] = values
    torch.testing.assert_close(dense, pre * (pre > floor), rtol=2**-15, atol=1e-3)


@runs
def test_rows_of_decoders_are_treated_as_the_plain_way_does():
    from sae_train.kernels import rows as plain

    grad, rows = (torch.randn(37, 20, device=DEVICE) for _ in range(2))
    ours, theirs = grad.clone(), grad.clone()
    ops.remove_parallel(ours, rows, impl="triton")
    plain.remove_parallel(theirs, rows)
    torch.testing.assert_close(ours, theirs)
    for unless in (False, True):
        ours, theirs, flag = rows.clone(), rows.clone(), torch.tensor(unless, device=DEVICE)
        ops.normalise(ours, flag, impl="triton")
        plain.normalise(theirs, flag)
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours, rows) == unless


@runs
@each_plan
def test_all_equal_and_all_negative_rows_keep_the_first_latents(how):
    x, W = torch.zeros(2, 6, device=DEVICE), torch.ones(150, 6, device=DEVICE)
    assert encoders.topk(x, W, W.new_full((150,), -3.0), 9, how)[1].sort(1).values.tolist() == [list(range(9))] * 2


def one_group_holds_the_top() -> tuple[torch.Tensor, torch.Tensor]:
    """d_sae 160 in groups of 16: latents 3, 13, 23, … are one group of 10, and hold all of the largest values."""
    g = torch.Generator().manual_seed(4)
    W = torch.rand(160, 8, generator=g) * 0.01
    W[3::10] += 1
    return torch.rand(5, 8, generator=g).to(DEVICE), W.to(DEVICE)


@runs
@pytest.mark.parametrize("path", ["fused", "slab"])
def test_rows_whose_top_k_lies_in_one_group_are_repaired(path):
    x, W = one_group_holds_the_top()
    assert_exact(x, W, W.new_zeros(160), 12, Plan(path, 16, 2, **TILE))


class Nothing:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@runs
def test_without_the_repair_the_test_above_would_fail(monkeypatch):
    monkeypatch.setattr(encoders, "repair_kernel", Nothing())
    x, W = one_group_holds_the_top()
    with pytest.raises(AssertionError):
        assert_exact(x, W, W.new_zeros(160), 12, Plan("fused", 16, 2, **TILE))


@runs
def test_nan_is_selected_not_dropped():
    x, W_enc, b_enc, *_ = (t.detach() for t in inputs(3, 8, 64))
    x[1, 2] = float("nan")
    for how in PLANS[:3]:
        assert encoders.topk(x, W_enc.t().contiguous(), b_enc, 4, how)[0].isnan().any(1).tolist() == [
            False,
            True,
            False,
        ]
        values, _, offsets = encoders.above(x, W_enc.t().contiguous(), b_enc, b_enc + 2, how)
        assert values[offsets[1] : offsets[2]].isnan().all() and offsets[2] > offsets[1]


@runs
@each_plan
@pytest.mark.parametrize("level", [-50.0, 3.0, 1e6])
def test_entries_above_a_floor_are_all_and_only_those(how, level):
    x, W_enc, b_enc, *_ = (t.detach() for t in inputs(4, 8, 70))
    floor = level + torch.rand(70, device=DEVICE)
    values, latents, offsets = encoders.above(x, W_enc.t().contiguous(), b_enc, floor, how)
    pre = x @ W_enc + b_enc
    dense = torch.zeros_like(pre)
    dense[torch.arange(4, device=DEVICE).repeat_interleave(offsets.diff()), latents.long()] = values
    assert torch.equal(offsets.diff(), (pre > floor).sum(1))
    torch.testing.assert_close(dense, pre * (pre > floor), rtol=1e-5, atol=1e-5)


@runs
@each_plan
@pytest.mark.parametrize(("level", "share"), [(0.5, 2.0), (-50.0, 1.0), (0.5, 0.5)])
def test_entries_are_the_same_in_a_room_that_is_given_and_end_where_it_does(how, level, share):
    """Groups of 16 or 32 with up to all of their members above the floor, and room for 2 or 4 candidates."""
    x, W_enc, b_enc, *_ = (t.detach() for t in inputs(3, 8, 40))
    floor = level + torch.rand(40, device=DEVICE)
    weights = W_enc.t().contiguous(), b_enc, floor
    values, latents, offsets = encoders.above(x, *weights, how)
    capacity = round(share * len(values))
    n = min(capacity, len(values))
    roomy = encoders.above(x, *weights, how, capacity)
    assert torch.equal(roomy[2], offsets) and len(roomy[0]) == len(roomy[1]) == capacity
    assert torch.equal(roomy[0][:n], values[:n]) and torch.equal(roomy[1][:n], latents[:n])
    assert not roomy[0][n:].any() and not roomy[1][n:].any()


@runs
def test_a_pattern_says_whether_entries_found_no_room():
    tensors = inputs(3, 8, 40)
    found = ops.active_above(*tensors[:4], 0.5, impl="triton")[1]
    assert found.lost is None
    for room, lost in ((len(found.latents), False), (len(found.latents) - 1, True)):
        choice = ops.Crossover(mean=0.0, room=room)
        pattern = ops.active_above(*tensors[:4], 0.5, impl="triton", crossover=choice)[1]
        assert pattern.lost.item() is lost and pattern.n_found == len(found.latents)
        assert pattern.offsets.max() <= room and choice.mean == 0.0


@runs
def test_every_op_agrees_with_the_truth_on_awkward_inputs():
    from benchmarks.kernels import checks

    found = checks.differences(DEVICE, "triton", shapes=((4, 5, 24, 3),) if INTERPRETED else checks.SHAPES)
    assert len(found) >= 200 and [d for d in found if not d.good] == []


@runs
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), [(7, 5, 150, 3), (3, 20, 64, 64), (4, 40, 260, 1)])
def test_topk_and_decode_have_the_values_and_gradients_of_the_truth(batch, d_in, d_sae, k):
    assert_like_the_truth(partial(topk, TRITON, k), partial(topk, naive, k), inputs(batch, d_in, d_sae))


@runs
def test_relu_and_jumprelu_have_the_values_and_gradients_of_the_truth():
    tensors, theta = inputs(6, 12, 90)[:4], torch.full((90,), 2.0, device=DEVICE, requires_grad=True)
    assert_like_the_truth(lambda t: TRITON.encode_relu(*t), lambda t: naive.encode_relu(*t), tensors)
    assert_like_the_truth(
        lambda t: TRITON.encode_jumprelu(*t, 1.5), lambda t: naive.encode_jumprelu(*t, 1.5), [*tensors, theta]
    )


@runs
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_one_gather_error_has_the_gradients_of_the_truth_also_where_the_reconstruction_is_used_again(share):
    def loss(recon, error):
        return (error if share == 0 else error + share * recon.square().sum())[None].expand(3)

    def ours(t):
        pre, pattern = ops.active_topk(*t[:4], 5, impl="triton")
        return loss(*ops.decode_error(pre.relu(), pattern, t[4], t[3], t[0], impl="triton"))

    def theirs(t):
        recon = topk(naive, 5, t)
        return loss(recon, (recon - t[0]).square().sum())

    assert_like_the_truth(ours, theirs, inputs(6, 20, 128))


@runs
@pytest.mark.parametrize("share", [None, 0.75])
def test_the_l0_count_of_jumprelu_has_the_straight_through_gradient(share):
    def width(t):
        return share * t[4].detach() if share else 1.5  # one for each latent, or one for all

    def ours(t):
        pre, pattern = ops.active_above(*t[:4], t[4].detach() - width(t) / 2, impl="triton")
        values, count = ops.jumprelu_active(pre, pattern, t[4], width(t), impl="triton")
        return torch.stack([values.square().sum(), count, count])

    def theirs(t):
        count = naive.step(naive.pre_activations(*t[:4]), t[4], width(t)).sum()
        return torch.stack([naive.encode_jumprelu(*t, width(t)).square().sum(), count, count])

    theta = torch.full((90,), 2.0, device=DEVICE, requires_grad=True)
    assert_like_the_truth(ours, theirs, [*inputs(6, 12, 90)[:4], theta])


@runs
def test_latents_with_more_entries_than_a_segment_are_summed_in_parts(monkeypatch):
    monkeypatch.setattr(patterns, "SEGMENT", 4)
    assert_like_the_truth(partial(topk, TRITON, 6), partial(topk, naive, 6), inputs(23, 6, 8))


@runs
def test_a_batch_without_active_latents_reconstructs_the_bias_and_has_zero_gradients():
    tensors = inputs(4, 6, 100)
    pre, pattern = ops.active_above(*tensors[:4], 1e6, impl="triton")
    recon = ops.decode_active(pre, pattern, tensors[4], tensors[3], impl="triton")
    assert torch.equal(recon, tensors[3].expand_as(recon))
    assert not any(grad.any() for grad in torch.autograd.grad(recon.sum(), [tensors[1], tensors[4]]))


@runs
def test_two_runs_give_the_same_bits():
    tensors = inputs(4, 12, 70)

    def once():
        recon = topk(TRITON, 5, tensors)
        return [recon, *torch.autograd.grad(recon.square().sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@runs
def test_sums_at_places_have_the_same_bits_each_time():
    g = torch.Generator().manual_seed(6)
    places = torch.randint(0, 5, (4000,), generator=g).to(DEVICE, torch.int32)
    values = torch.randn(4000, generator=g).to(DEVICE).requires_grad_()
    once, again = (ops.sum_at(places, values, 7) for _ in range(2))
    assert torch.equal(once, again) and once[5:].tolist() == [0.0, 0.0]
    assert rms(once, torch.bincount(places.long(), values.double(), 7)) < RMS
    (grad,) = torch.autograd.grad((once * torch.arange(7, device=DEVICE)).sum(), values)
    assert torch.equal(grad, places.float())


@runs
def test_no_tensor_of_the_size_of_batch_times_d_sae_is_made(monkeypatch):
    from benchmarks.kernels import checks

    batch, d_sae = 16, 512
    monkeypatch.setattr(encoders, "SLAB_ELEMENTS", batch * d_sae // 4)
    tensors = inputs(batch, 8, d_sae)

    def step(impl):
        pre, pattern = ops.active_topk(*tensors[:4], 4, impl=impl)
        ops.decode_error(pre.relu(), pattern, tensors[4], tensors[3], tensors[0], impl=impl)[1].backward()

    def above():
        pre, pattern = ops.active_above(*tensors[:4], 9.0, impl="triton")
        ops.decode_active(pre, pattern, tensors[4], tensors[3], impl="triton").square().sum().backward()

    assert checks.dense_blocks(lambda: step("triton"), batch, 8, d_sae) == set()
    assert checks.dense_blocks(above, batch, 8, d_sae) == set()
    dense = checks.dense_blocks(lambda: (tensors[0] @ tensors[1]).relu().sum().backward(), batch, 8, d_sae)
    assert (batch, d_sae) in dense


@runs
def test_float64_is_refused_in_one_sentence():
    from sae_train.errors import UserError

    with pytest.raises(UserError, match="float32, bfloat16 or float16"):
        ops.encode_topk(*(t.double() for t in inputs(2, 4, 64)[:4]), 2, impl="triton")
    assert cpu.Pattern is ops.Pattern and select_module.EMPTY.value == -(2**31)
