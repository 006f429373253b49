"""Two runs of the same settings on one machine end with the same bits, without any switch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sae_train import train
from sae_train.config import SAESpec, TrainSettings
from sae_train.kernels import screen
from sae_train.training.architectures import TRAINED
from sae_train.training.learner import Learner

# With a language model in the toy's place, tests/test_run.py compares runs bit by bit, too.
SETTINGS = {
    "model": "toy",
    "dataset": "letters",
    "arch": "relu,topk,batchtopk",
    "width": 512,
    "l0": 3,
    "tokens": 12_800,
    "batch_tokens": 128,
    "held_out_tokens": 2048,
    "absorption": False,
    "device": "cpu",
}


def test_two_runs_give_bit_equal_weights(tmp_path):
    runs = [train(**SETTINGS, out=str(tmp_path), name=name) for name in ("one", "two")]
    files = [sorted((run.path / "saes").glob("*/sae_weights.safetensors")) for run in runs]
    assert len(files[0]) == len(files[1]) == 3
    for a, b in zip(*files, strict=True):
        one, two = load_file(a), load_file(b)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value.isfinite().all() and torch.equal(value, two[name]), (a.parent.name, name)


@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize("arch", TRAINED)
def test_steps_with_two_threads_give_the_same_bits(arch, screened, monkeypatch):
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: screened)
    # About 50,000 active entries: torch adds up fewer of them in one thread.
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    before, ended = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            learner = Learner(SAESpec(arch=arch, width=1024, l0=50), TrainSettings(tokens=1_024_000), 64, 1000)
            learner.initialise(x)
            for _ in range(4):
                learner.step(x)
            ended.append([p.detach().clone() for p in learner.sae.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))
