"""Whole runs on a GPU: every architecture trains, is measured, resumes bit for bit, and agrees with the CPU."""

import json

import pytest
import torch

from sae_train import load_sae, train
from sae_train.cli import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = {
    "width": 512,
    "l0": 16,
    "tokens": 200_000,
    "batch_tokens": 1024,
    "held_out_tokens": 8192,
    "eval_words": 600,
    "absorption_evals": 2,
}
ARCHS = ("relu", "topk", "jumprelu", "batchtopk", "matryoshka", "gated")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    return train(**SMALL, arch=",".join(ARCHS), device="cuda", out=str(out), name="gpu").path


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    out = tmp_path_factory.mktemp("cpu")
    return train(**SMALL, arch=",".join(ARCHS), device="cpu", out=str(out), name="cpu").path


def last_rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["sae"]: row for row in rows}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_gpu_trains_what_a_cpu_trains(on_gpu, on_cpu, arch):
    name = f"{arch}-512-l0_16"
    gpu, cpu = last_rows(on_gpu)[name], last_rows(on_cpu)[name]
    for figure, near in (("metrics/explained_variance", 0.01), ("metrics/l0", 0.8), ("metrics/ce_loss_score", 0.02)):
        assert gpu[figure] == pytest.approx(cpu[figure], abs=near), figure


def test_a_checkpoint_from_a_gpu_gives_the_same_latents_on_a_cpu(on_gpu):
    folder = on_gpu / "saes" / "topk-512-l0_16"
    there, here = load_sae(folder, device="cuda"), load_sae(folder)
    x = torch.randn(64, here.cfg.d_in) * 5
    torch.testing.assert_close(there.encode(x.cuda()).cpu(), here.encode(x), rtol=1e-3, atol=1e-3)


def test_the_same_run_twice_has_the_same_bits(tmp_path):
    few = {**SMALL, "tokens": 110_000, "arch": "topk,relu", "device": "cuda", "out": str(tmp_path)}
    folders = [train(**few, name=name).path for name in ("one", "two")]
    for name in ("topk-512-l0_16", "relu-512-l0_16"):
        a, b = (load_sae(folder / "saes" / name).state_dict() for folder in folders)
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_the_command_line_takes_a_gpu(tmp_path, capsys):
    main(["--width", "512", "--l0", "16", "--device", "cuda", "--out", str(tmp_path), "--dry-run"])
    assert "cuda" in capsys.readouterr().out
