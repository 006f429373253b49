"""The model of a step against numbers counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.kernels.model import Sizes, floor, gains, parts, total
from benchmarks.kernels.profile_step import group_of

# 1,024 parameters a matrix; 8 numbers a batch; 4 entries; two groups of 128 latents with 8 candidates each, so 32.
TINY = Sizes("topk", d=4, F=256, B=2, k=2)
# (bytes, gathered, operations) of each part. A parameter of float32 has 4 bytes, a candidate 8.
BY_HAND = {
    "x − b_dec in bfloat16": (8 * 4 + 8 * 2, 0, 0),
    "W_enc in bfloat16, grouped": (1024 * 4 + 1024 * 2, 0, 0),
    "encoder to candidates": (8 * 2 + 1024 * 2 + 32 * 8, 0, 2 * 2 * 1024),
    "selection": (32 * 8 + 4 * 8, 0, 0),
    "decode, error, values' gradient": (8 * 4 + 8 * 4, 4 * 4 * 4, 64),
    "gradient of the error": (240, 0, 0),
    "entries by latent": (544, 0, 0),
    "gradient of W_dec": (4096, 4 * 4 * 2, 32),
    "gradient of W_enc": (4096, 4 * 4 * 2, 32),
    "gradient of b_dec": (4096, 0, 0),
    "projection of W_dec's gradient": (3 * 4096, 0, 0),
    "norms of the gradients": (2 * 4096, 0, 0),
    "Adam": (2 * 1024 * (4 + 4) * 4, 0, 0),
    "normalisation of W_dec": (2 * 4096, 0, 0),
}


def test_a_topk_step_has_the_bytes_and_operations_of_a_count_by_hand():
    assert {p.name: (p.bytes, p.gathered, p.flop) for p in parts(TINY)} == BY_HAND


def test_times_are_the_longest_of_memory_gathers_and_products():
    large = Sizes("topk", 768, 65536, 8192, 50)
    ms = {p.name: p.ms for p in parts(large)}
    assert ms["encoder to candidates"] == pytest.approx(2 * 8192 * 768 * 65536 / 790e12 * 1e3)  # 1.04
    assert ms["Adam"] == pytest.approx(64 * 768 * 65536 / 4.3e12 * 1e3)  # .75
    assert ms["decode, error, values' gradient"] == pytest.approx(4 * 8192 * 50 * 768 / 4.3e12 * 1e3)  # not in L2
    assert ms["gradient of W_enc"] == pytest.approx(2 * 8192 * 50 * 768 / 5.5e12 * 1e3)  # x is
    assert floor(large) == pytest.approx(1.044 + 0.114 + 0.609, abs=0.002)
    assert floor(large) < total(large)


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("d", [768, 2304])
def test_gains_are_ranked_and_no_larger_than_what_there_is(arch, d):
    s = Sizes(arch, d, 65536, 8192, 50)
    saved = list(gains(s).values())
    assert saved == sorted(saved, reverse=True) and saved[-1] >= 0
    assert saved[0] < total(s) - 2e3 * s.B * s.d * s.F / 790e12


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>", "norm"),
        ("void at::native::elementwise_kernel<128, 2, at::native::direct_copy_kernel_cuda(at::TensorIter)>", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float, 4>>", "adam"),
        ("normalise_kernel", "normalise_kernel"),
        ("bag_kernel", "bag_kernel"),
        ("some_other", "some_other"),
    ],
)
def test_kernels_count_for_the_part_that_their_names_say(kernel, group):
    assert group_of(kernel, Sizes("relu", 768, 65536, 8192, 50)) == group
