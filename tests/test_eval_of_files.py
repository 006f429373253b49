"""`sae-train eval` of files of any precision and origin: whole results, and nothing lost of what was computed."""

import json

import pandas as pd
import pytest
import torch

from sae_train.cli import main
from sae_train.evals import assets, baselines
from sae_train.sae.files import load_sae, save_sae
from sae_train.sae.model import SAE, SAEConfig

D_IN = 256


def write_sae(folder, architecture: str, dtype: str, **known):
    directions = torch.randn(256, D_IN, generator=torch.Generator().manual_seed(0))
    origin = {"model_name": "speller", "hook_name": "blocks.1.hook_resid_post"} | known
    sae = SAE(SAEConfig(architecture, D_IN, 256, k=8 if architecture == "topk" else None, dtype=dtype, **origin))
    with torch.no_grad():
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.t())
        for name in sae.form.vectors:
            getattr(sae, name).fill_({"threshold": 0.5, "r_mag": 0.0}.get(name, -0.2))
    save_sae(sae, folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("relu", "bfloat16"), ("jumprelu", "bfloat16"), ("gated", "float16"), ("topk", "float64")],
)
def test_an_sae_of_any_precision_is_evaluated_to_the_end(architecture, dtype, tmp_path):
    folder = write_sae(tmp_path, architecture, dtype)
    assert main(["eval", str(folder), "--eval-words", "600"]) == 0
    content = json.loads((folder / "absorption.json").read_text())
    assert content["eval_result_unstructured"]["valid"]
    assert set(content["eval_result_unstructured"]["baselines"]) == {
        "random", "random_words", "shuffled_labels", "random_directions", "probe",
    }  # fmt: skip


@pytest.mark.parametrize("failing", ["all_scores", "random_score"])
def test_a_baseline_that_fails_leaves_the_main_result(failing, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(baselines, failing, fail)
    folder = write_sae(tmp_path, "topk", "float32")
    with pytest.raises(RuntimeError):
        main(["eval", str(folder), "--eval-words", "600"])
    content = json.loads((folder / "absorption.json").read_text())
    assert content["eval_result_unstructured"]["valid"] and content["eval_result_metrics"]["mean"]
    assert len(pd.read_parquet(folder / "absorption.parquet")) and (folder / "absorption.html").is_file()


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_prompts_begin_as_the_texts_that_the_sae_was_trained_on(prepend_bos, tmp_path, monkeypatch, capsys):
    folder = write_sae(tmp_path, "relu", "float32", prepend_bos=prepend_bos)
    assert load_sae(folder).cfg.prepend_bos is prepend_bos
    begun, build = [], assets.build

    def look(lm, *args, **kwargs):
        begun.append(lm.bos_id)
        return build(lm, *args, **kwargs)

    monkeypatch.setattr(assets, "build", look)
    monkeypatch.setattr(baselines, "all_scores", lambda *_, **__: {})
    assert main(["eval", str(folder), "--eval-words", "600"]) == 0
    assert (begun != [None]) is prepend_bos
    assert ("have no BOS token" in capsys.readouterr().out) is not prepend_bos
