"""The Triton kernels compiled ahead of time for sm_80 and sm_90, on any machine: little is spilled, shared memory fits.

Full sizes with TRITON_COMPILE_ALL=1; by default the shapes of one model, which keeps the suite quick.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sae_train.kernels.shapes import plan, warps_for  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted functions do not compile"
)
ALL = os.environ.get("TRITON_COMPILE_ALL") == "1"
D_SAE = 65_536
# The encoder with a floor spills five registers, and is faster with them than with twice the warps.
MAX_STACK_WITH_FLOOR = 64
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Of a multiprocessor, and the warps that must find room in them: sums, which wait for memory, need more.
REGISTERS = 65_536
MIN_WARPS, MIN_WARPS_OF_SUMS = 8, 16
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FLOAT, INT, LONG = "*fp32", "*i32", "*i64"


def usage(fn, types: list[str], constants: dict, cc: int, warps: int, stages: int, tmp_path) -> tuple[int, int, int]:
    """Compile and return (bytes of stack, bytes of shared memory, registers of a thread) of one program."""
    runtime = iter(types)
    signature = {name: "constexpr" if name in constants else next(runtime) for name in fn.arg_names}
    pointers = [i for i, name in enumerate(fn.arg_names) if signature[name].startswith("*")]
    source = ASTSource(fn, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack, local, registers = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("STACK", "LOCAL", "REG"))
    return stack + local, kernel.metadata.shared, registers


def encoder(d_in: int, dtype: str, precision: str, k: int | None, cc: int) -> tuple:
    from sae_train.kernels.encode import encode_kernel

    how = plan(k, D_SAE, 2 if dtype == "*bf16" else 4, capability=cc)
    described = [f"tensordesc<{dtype[1:]}[{rows},{how.block_k}]>" for rows in (how.block_m, how.group)]
    types = [*described, FLOAT, FLOAT, INT, INT, INT, "i32", "i32", "i32"]
    constants = dict(d_in=d_in, HAS_FLOOR=k is None, R=how.R, BLOCK_M=how.block_m, GROUP=how.group, BLOCK_K=how.block_k)
    constants |= dict(BAND=8, PACKED=dtype == "*bf16", PRECISION=precision, UPCAST=False)
    return encode_kernel, types, constants, how.warps, how.stages


def repair(d_in: int, dtype: str, precision: str, path: str, cc: int) -> tuple:
    from sae_train.kernels.select import repair_kernel

    how = plan(50, D_SAE, 2 if dtype == "*bf16" else 4, path, cc)
    types = [INT, INT, INT, FLOAT, INT, FLOAT, dtype, dtype, FLOAT, "i32", "i32", "i32", "i32"]
    constants = dict(d_in=d_in, DENSE=how.path == "slab", R=how.R, K_PAD=64, N_GROUPS=how.n_groups(D_SAE))
    constants |= dict(
        BLOCK_M=how.block_m, GROUP=how.group, BLOCK_K=how.block_k, PACKED=dtype == "*bf16" and how.path == "fused"
    )
    constants |= dict(PRECISION=precision, UPCAST=False)
    return repair_kernel, types, constants, how.warps, how.stages


def refill(d_in: int, dtype: str, precision: str, path: str, cc: int) -> tuple:
    from sae_train.kernels.select import refill_kernel

    how = plan(None, D_SAE, 2 if dtype == "*bf16" else 4, path, cc)
    types = [INT, LONG, FLOAT, FLOAT, INT, "i32", FLOAT, dtype, dtype, FLOAT, "i32", "i32", "i32"]
    constants = dict(d_in=d_in, DENSE=path == "slab", R=how.R, N_GROUPS=how.n_groups(D_SAE), BLOCK_M=how.block_m)
    constants |= dict(GROUP=how.group, BLOCK_K=how.block_k, PACKED=dtype == "*bf16" and path == "fused")
    constants |= dict(PRECISION=precision, UPCAST=False)
    return refill_kernel, types, constants, how.warps, how.stages


def selection(name: str) -> tuple:
    from sae_train.kernels import encode, select

    how = plan(50, D_SAE, 4, "slab")
    block = how.candidates(D_SAE)
    return {
        "group": (
            encode.group_kernel,
            [FLOAT, FLOAT, INT, INT, INT, "i32", "i32", "i32"],
            dict(HAS_FLOOR=False, R=how.R, GROUP=how.group, BLOCK=32),
            4,
            3,
        ),
        "select": (select.select_kernel, [INT, INT, FLOAT, INT, INT, "i32", "i32"], dict(R=how.R, BLOCK=block), 4, 3),
        "compact": (
            select.compact_kernel,
            [INT, INT, INT, LONG, FLOAT, INT, "i32", "i32"],
            dict(R=8, BLOCK=8192),
            warps_for(8192),
            3,
        ),
    }[name]


def sums(name: str, d: int) -> tuple:
    from sae_train.kernels import grids, sparse

    block = dict(d=d, BLOCK_E=16, BLOCK_D=256)
    row = dict(d=d, BLOCK_D=triton.next_power_of_2(d))
    return {
        "bag": (
            sparse.bag_kernel,
            [LONG, FLOAT, FLOAT, LONG, LONG, FLOAT, FLOAT, FLOAT],
            dict(d=d, BLOCK_E=4, BLOCK_D=128, HAS_BIAS=True, HAS_SUMS=True),
            1,
            3,
        ),
        "sum": (sparse.sum_kernel, [FLOAT, LONG, LONG, FLOAT], dict(BLOCK=32), 1, 3),
        "to_grid": (grids.move_kernel, [FLOAT, INT, LONG, FLOAT, "i32", "i32"], dict(TO_GRID=True, BLOCK=256), 4, 3),
        "from_grid": (grids.move_kernel, [FLOAT, INT, LONG, FLOAT, "i32", "i32"], dict(TO_GRID=False, BLOCK=256), 4, 3),
        "dots": (sparse.dots_kernel, [FLOAT, FLOAT, INT, LONG, FLOAT], block, 4, 3),
        "join": (sparse.join_kernel, [FLOAT, FLOAT, LONG, LONG, FLOAT, FLOAT], dict(d=d, BLOCK_D=128), 4, 3),
        "remove_parallel": (sparse.remove_parallel_kernel, [FLOAT, FLOAT], row, 4, 3),
        "normalise": (sparse.normalise_kernel, [FLOAT, INT], row, 4, 3),
        "error": (
            sparse.decode_loss_kernel,
            [FLOAT, INT, LONG, *[FLOAT] * 6],
            dict(d=d, BLOCK_E=64, BLOCK_D=64),
            4,
            3,
        ),
        "jumprelu": (sparse.jumprelu_kernel, [FLOAT, INT, FLOAT, FLOAT, INT, LONG, "i32"], dict(BLOCK=1024), 4, 3),
        "jumprelu_backward": (
            sparse.jumprelu_backward_kernel,
            [FLOAT, LONG, LONG, LONG, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT],
            dict(BLOCK=32),
            1,
            3,
        ),
    }[name]


CASES = {f"{dtype[1:]}-{p}-{d}-{k}": (encoder, d, dtype, p, k) for d, dtype, p, k in [
    (768, "*bf16", "ieee", 50), (768, "*bf16", "ieee", None), (768, FLOAT, "tf32", 50),
]}  # fmt: skip
CASES["repair"] = (repair, 768, "*bf16", "ieee", "fused")
CASES["repair-slab"] = (repair, 1, FLOAT, "ieee", "slab")
CASES["refill"] = (refill, 768, "*bf16", "ieee", "fused")
CASES["refill-slab"] = (refill, 1, FLOAT, "ieee", "slab")
CASES |= {name: (selection, name) for name in ("group", "select", "compact")}
SUMS = ("bag", "sum", "to_grid", "from_grid", "dots", "join", "error", "jumprelu", "jumprelu_backward")
CASES |= {name: (sums, name, 2304) for name in (*SUMS, "remove_parallel", "normalise")}
if ALL:
    for d in (512, 768, 2304, 4096):
        for dtype, p in (("*bf16", "ieee"), (FLOAT, "tf32"), (FLOAT, "ieee")):
            CASES |= {f"{dtype[1:]}-{p}-{d}-{k}": (encoder, d, dtype, p, k) for k in (20, 50, 200, None)}
            CASES[f"repair-{dtype[1:]}-{p}-{d}"] = (repair, d, dtype, p, "fused")
            CASES[f"refill-{dtype[1:]}-{p}-{d}"] = (refill, d, dtype, p, "fused")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cc", (80, 90))
def test_a_kernel_compiles_with_few_spills_and_within_registers_and_shared_memory(case, cc, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    make, *args = CASES[case]
    by_capability = (cc,) if make in (encoder, repair, refill) else ()
    fn, types, constants, warps, stages = make(*args, *by_capability)
    stack, shared, registers = usage(fn, types, constants, cc, warps, stages, tmp_path)
    with_floor = case.startswith("bf16") and case.endswith("-None")
    assert stack <= (MAX_STACK_WITH_FLOOR if with_floor else 0)
    assert shared <= MAX_SHARED[cc]
    at_once = REGISTERS // (registers * 32 * warps)
    assert at_once * warps >= (MIN_WARPS_OF_SUMS if case in SUMS else MIN_WARPS)
    if cc == 90 and case.startswith("bf16"):  # one program multiplies while another selects
        assert at_once >= 2 and 2 * shared <= MAX_SHARED[cc]
