"""Two runs of the same settings on one machine end with the same bits, with several threads, without any switch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sae_train import train

SETTINGS = {
    "arch": "relu,topk,batchtopk,jumprelu,matryoshka,gated",
    "width": 2048,
    "l0": 16,
    "tokens": 25_600,
    "batch_tokens": 256,
    "buffer_tokens": 2048,
    "held_out_tokens": 2048,
    "absorption": False,
    "device": "cpu",
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_runs_give_bit_equal_weights(two_threads, tmp_path):
    runs = [train(**SETTINGS, out=str(tmp_path), name=name) for name in ("one", "two")]
    files = [sorted((run.path / "saes").glob("*/sae_weights.safetensors")) for run in runs]
    assert len(files[0]) == len(files[1]) == 6
    for a, b in zip(*files, strict=True):
        one, two = load_file(a), load_file(b)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value.isfinite().all() and torch.equal(value, two[name]), (a.parent.name, name)
