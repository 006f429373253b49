"""The kernels' benchmark: red checks stop it, sides do the same maths, absent peers are named, rows are tidy."""

from __future__ import annotations

import ast
import csv
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import bench, bench_worker, checks
from benchmarks.kernels.bench_problem import Problem, batches, decoder_rows, level
from benchmarks.kernels.bench_sides import CUDA_ONLY, SIDES
from sae_train.kernels import cpu, ops

SIZES = ["--d-in", "16", "--d-sae", "256", "--batch", "64", "--k", "4", "--threads", "1"]
FEW = ["--rounds", "2", "--part-rounds", "1", "--seconds", "0"]


@pytest.fixture(autouse=True)
def few_checks(monkeypatch):
    """The full check has tests of its own."""
    few = functools.partial(checks.differences, shapes=checks.SHAPES[1:2])
    monkeypatch.setattr(checks, "differences", few)


def test_a_red_check_ends_the_benchmark_before_anything_is_timed(monkeypatch, capsys):
    encode = cpu.pre_topk
    monkeypatch.setattr(ops.cpu, "pre_topk", lambda *args: (-encode(*args)[0], encode(*args)[1]))
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--threads", "1"])
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.main()
    assert "relative RMS" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu"])
def test_all_our_sides_reconstruct_alike_and_take_like_steps(arch):
    p = Problem(arch, 16, 256, 64, 4)
    rows = decoder_rows(p)
    xs = batches(p, rows)
    made = [
        make(p, rows, level(p, rows, xs[0]), False)
        for name, (make, archs) in SIDES.items()
        if arch in archs and name not in CUDA_ONLY
    ]
    sides = [side for side in made if hasattr(side, "reconstruct")]
    for side in sides:
        if hasattr(side, "learner"):  # the other sides do not steer L0
            side.learner.arch.moves_levels = False
    for _ in range(2):
        recons = [side.reconstruct(xs[0]).detach() for side in sides]
        for other in recons[1:]:
            torch.testing.assert_close(recons[0], other, rtol=1e-4, atol=1e-4)
        for side in sides:
            side.step(xs[0])


@pytest.mark.parametrize("arch", ["relu", "jumprelu"])
def test_levels_give_the_asked_l0(arch):
    p = Problem(arch, 16, 256, 64, 4)
    rows = decoder_rows(p)
    x = batches(p, rows)[0]
    assert ((x @ rows.t()) >= level(p, rows, x)).sum() == 64 * 4


def test_the_benchmark_writes_tidy_rows_and_names_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    out = tmp_path / "kernels.csv"
    sides = "sae-train,strong dense,strong sparse,encoder GEMM,dictionary_learning"
    options = ["--arch", "topk", "--sides", sides, "--peer-python", sys.executable, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", *SIZES, *FEW, *options])
    bench.main()
    captured = capsys.readouterr()
    assert "left out: dictionary_learning" in captured.err and "| sae-train | as shipped |" in captured.out
    rows = list(csv.DictReader(out.open()))
    steps = {row["side"]: row for row in rows if row["part"] == "step"}
    assert {"sae-train", "strong dense", "strong sparse", "encoder GEMM"} <= steps.keys()
    for row in steps.values():
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) and row["versions"].startswith("torch")
    assert {r["part"] for r in rows if r["side"] == "sae-train"} == {"step", "forward", "backward", "optimiser"}


def test_the_benchmark_needs_nothing_but_torch():
    code = "import sys; import benchmarks.kernels.bench, benchmarks.kernels.bench_worker; "
    code += "import sae_train.training.learner; "
    code += "print([m for m in ('pydantic', 'transformers', 'numpy.testing', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_package_is_missing_and_no_crash():
    answer = bench_worker.answer({"do": "build", "side": "SAELens", "equalised": False, "threads": 1,
                                  **vars(Problem("topk", 8, 64, 8, 2))}, bench_worker.Worker())  # fmt: skip
    assert "missing" in answer


@pytest.mark.parametrize(
    "script", sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")), ids=lambda path: path.stem
)
def test_a_script_imports_what_its_own_folder_offers(script):
    """`python benchmarks/x.py` has benchmarks/ on the path and not the root; imports within functions count."""
    nodes = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert not [name for name in names if name and name.split(".")[0] == "benchmarks"]
