"""Grids: SAEs that train side by side, and what is left to do after an interruption."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_train import runner, train
from sae_train.cli import main

SMALL = {
    "width": "64,128", "l0": 8, "arch": "batchtopk,jumprelu", "tokens": 26_000, "batch_tokens": 256,
    "buffer_tokens": 2048, "held_out_tokens": 2048, "eval_words": 600, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip
NAMES = [f"{arch}-{width}-l0_8" for arch in ("batchtopk", "jumprelu") for width in (64, 128)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A small grid that ran through."""
    return train(**SMALL, out=str(tmp_path_factory.mktemp("grid")), name="unbroken").path


def assert_same_saes(a: Path, b: Path, names: list[str]) -> None:
    for name in names:
        one, two = (load_file(run / "saes" / name / "sae_weights.safetensors") for run in (a, b))
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one), name


def test_a_grid_that_ended_while_it_wrote_its_saes_goes_on_with_those_that_are_missing(
    unbroken, tmp_path, monkeypatch
):  # fmt: skip
    saved = []

    def save_two(sae, folder):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(folder.name)
        save_sae(sae, folder)

    save_sae = runner.save_sae
    monkeypatch.setattr(runner, "save_sae", save_two)
    with pytest.raises(KeyboardInterrupt):
        train(**SMALL, out=str(tmp_path), name="broken")
    monkeypatch.setattr(runner, "save_sae", lambda sae, folder: saved.append(folder.name) or save_sae(sae, folder))
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert saved == NAMES
    assert_same_saes(unbroken, tmp_path / "broken", NAMES)
    figures = [json.loads((run / "run.json").read_text())["saes"] for run in (unbroken, tmp_path / "broken")]
    assert [sae["baseline"] for sae in figures[0]] == [sae["baseline"] for sae in figures[1]]
    assert all(sae["baseline"] for sae in figures[0])
