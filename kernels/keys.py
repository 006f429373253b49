"""Triton helpers on ordered keys: an int32 for each float32 value, whose integer order is the order of the values.

Everything selected by the kernels is selected by (key descending, latent ascending), so equal values go to the lowest
latent, -0 ties with 0, and NaN comes before everything (it is reported by the loss, not dropped).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below the key of every number, -inf included: marks an entry that is not there.
EMPTY = tl.constexpr(-(2**31))


@triton.jit
def to_key(value):
    """float32 → int32, order preserved: negative numbers have their lower 31 bits flipped."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return tl.where(value != value, 0x7FC00000, key)


@triton.jit
def cut_key(value, STEP: tl.constexpr):
    """to_key, cut down to a multiple of STEP, a power of two: equal within STEP/2²³ of a value is then equal."""
    return to_key(value) & -STEP


@triton.jit
def to_value(key):
    """int32 → float32, the inverse of to_key."""
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def kth_key(a, b, k):
    """Return the k-th largest key of a and b together: bisection, one bit a round."""
    kth = tl.full((), EMPTY, tl.int32)
    one = tl.full((), 1, tl.int32)
    for i in range(32):
        # The lower bits of kth are 0, so xor adds the bit; on the sign bit it adds 2³¹ without overflow.
        higher = kth ^ (one << (31 - i))
        count = tl.sum((a >= higher).to(tl.int32), 0) + tl.sum((b >= higher).to(tl.int32), 0)
        kth = tl.where(count >= k, higher, kth)
    return kth


@triton.jit
def last_latent(a, a_latents, b, b_latents, kth, k):
    """Return the largest latent that still belongs to the top k among the entries equal to the k-th key."""
    need = k - tl.sum((a > kth).to(tl.int32), 0) - tl.sum((b > kth).to(tl.int32), 0)
    equal_a, equal_b = a == kth, b == kth
    last = tl.full((), 0x7FFFFFFF, tl.int32)
    if tl.sum(equal_a.to(tl.int32), 0) + tl.sum(equal_b.to(tl.int32), 0) > need:
        last = tl.full((), 0, tl.int32)
        one = tl.full((), 1, tl.int32)
        for i in range(31):
            higher = last | (one << (30 - i))
            count = tl.sum((equal_a & (a_latents < higher)).to(tl.int32), 0)
            count += tl.sum((equal_b & (b_latents < higher)).to(tl.int32), 0)
            last = tl.where(count < need, higher, last)
    return last


@triton.jit
def in_top(key, latent, kth, last):
    """Whether an entry is at or before the k-th entry in the order (key descending, latent ascending)."""
    return (key > kth) | ((key == kth) & (latent <= last))
