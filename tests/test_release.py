"""What a release holds beside weights and card: metadata, frequencies, sae-bench's result files, SAELens' registry."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from eval_fakes import FakeLM, fake_words, word_tokenizer
from safetensors.torch import load_file, save_file
from test_publish import make_run
from test_saebench_json import result_of, violations

from sae_train import load_sae, train
from sae_train.cli import main
from sae_train.evals import assets
from sae_train.publishing.publish import publish
from sae_train.sae.files import save_sparsity

NAME = "topk-64-l0_4"
TOY = {
    "model": "toy", "width": 32, "l0": 3, "tokens": 6400, "batch_tokens": 64, "held_out_tokens": 512,
    "absorption": False, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return result_of(assets.build(FakeLM(word_tokenizer(fake_words(20)))))


def make_complete_run(folder: Path, result, archs=("topk",), model: str = "org/lm") -> Path:
    """A run with all that training leaves in SAEs' folders."""
    run = make_run(folder, archs, model)
    for arch in archs:
        own = run / "saes" / f"{arch}-64-l0_4"
        save_sparsity(torch.linspace(0, 1, 64), own)
        written = result.to_saebench_json()
        written["eval_config"]["model_name"] = model
        (own / "absorption.json").write_text(json.dumps(written))
    return run


@pytest.mark.parametrize("arch", ["topk", "relu"])
def test_a_run_leaves_how_often_latents_fire(arch, tmp_path):
    """The frequencies add up to the L0 that the run measured on the same activations."""
    run = train(**TOY, arch=arch, out=tmp_path)
    (folder,) = (run.path / "saes").iterdir()
    values = load_file(folder / "sparsity.safetensors")
    assert set(values) == {"sparsity"} and values["sparsity"].shape == (32,)
    l0 = json.loads((run.path / "run.json").read_text())["saes"][0]["final"]["metrics/l0"]
    assert float((10 ** values["sparsity"].double()).sum()) == pytest.approx(l0, rel=1e-4)


@pytest.mark.parametrize(
    ("arch", "theirs"), [("topk", "topk"), ("relu", "standard"), ("matryoshka", "matryoshka_batchtopk")]
)
def test_metadata_is_that_of_sae_lens(arch, theirs, result, tmp_path):
    staged = publish(make_complete_run(tmp_path / "run", result, (arch,)), "me/one", dry_run=True)
    metadata = json.loads((staged / f"{arch}-64-l0_4" / "cfg.json").read_text())["metadata"]
    assert metadata["training_architecture"] == theirs
    assert (metadata["l0"], metadata["num_dead_features"], metadata["training_tokens"]) == (4.01, 6, 1000)
    assert metadata["dataset_path"] == "org/text" and metadata["sae_lens_version"] == "6.54.12"
    assert metadata["sae_lens_training_version"] is None, "where it is missing, SAELens takes its own version"
    assert (
        metadata["training_architecture_details"]["l0"] == 4
        and "batch_tokens" in metadata["training_architecture_details"]
    )
    assert load_sae(staged / f"{arch}-64-l0_4").cfg.l0 == 4.01


def test_frequencies_and_results_lie_where_sae_lens_and_sae_bench_look_for_them(result, tmp_path):
    local = tmp_path / "my-lm"
    local.mkdir()
    staged = publish(make_complete_run(tmp_path / "run", result, ("topk", "relu"), str(local)), "me/two", dry_run=True)
    assert torch.equal(
        load_file(staged / NAME / "sparsity.safetensors")["sparsity"],
        load_file(tmp_path / "run" / "saes" / NAME / "sparsity.safetensors")["sparsity"],
    )
    folder = staged / "eval_results" / "absorption"
    assert {p.name for p in folder.iterdir()} == {f"me_two_{a}-64-l0_4_eval_results.json" for a in ("topk", "relu")}
    for path in folder.iterdir():
        out = json.loads(path.read_text())
        assert violations(out) == []
        assert out["eval_config"]["model_name"] == "my-lm" and out["sae_lens_release_id"] == "me/two"
        cfg = out["sae_cfg_dict"]
        assert cfg["d_sae"] == 64 and cfg["training_tokens"] == 1000 and cfg["hook_name"] == "blocks.1.hook_resid_post"
    assert not [p for p in staged.rglob("*") if p.is_file() and str(tmp_path).encode() in p.read_bytes()]


def test_the_registry_entry_has_what_sae_lens_reads_of_one(result, tmp_path):
    """The keys of a release and of an SAE in sae_lens/loading/pretrained_saes_directory.py."""
    staged = publish(make_complete_run(tmp_path / "run", result, ("topk", "relu")), "me/two", dry_run=True)
    text = (staged / "pretrained_saes.yaml").read_text()
    ((release, value),) = yaml.safe_load(text).items()
    assert "pull request" in text and "SAE.from_pretrained('two', 'topk-64-l0_4')" in text
    assert (release, value["repo_id"], value["model"], value["conversion_func"]) == ("two", "me/two", "org/lm", None)
    for sae in value["saes"]:
        assert (staged / sae["path"] / "cfg.json").is_file()
        assert (sae["l0"], sae["variance_explained"]) == (4.01, 0.9) and set(sae) == {
            "id",
            "path",
            "l0",
            "variance_explained",
        }


def test_what_a_folder_lacks_is_said_and_the_rest_is_published(tmp_path, capsys):
    staged = publish(make_run(tmp_path / "run"), "me/one", dry_run=True)
    assert f"its result in sae-bench's layout ({NAME})" in capsys.readouterr().out
    assert not (staged / "eval_results").exists() and not (staged / NAME / "sparsity.safetensors").exists()


def test_a_result_that_is_not_valid_is_no_result_file(tmp_path):
    blind = result_of(assets.build(FakeLM(word_tokenizer(fake_words(20)), letter_scale=0.0)))
    assert not (publish(make_complete_run(tmp_path / "run", blind), "me/one", dry_run=True) / "eval_results").exists()


@pytest.mark.parametrize(
    "tensors",
    [{"sparsity": torch.zeros(63)}, {"frequency": torch.zeros(64)}, {"sparsity": torch.full((64,), float("nan"))}],
    ids=["width", "name", "nan"],
)  # fmt: skip
def test_frequencies_of_another_sae_are_refused(tensors, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    save_file(tensors, run / "saes" / NAME / "sparsity.safetensors")
    assert main(["publish", str(run), "--repo", "me/one", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "sparsity" in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("taken", ["eval_config", "eval_result_metrics"])
def test_a_file_that_is_no_result_of_sae_bench_is_none(taken, result, tmp_path):
    run = make_complete_run(tmp_path / "run", result)
    path = run / "saes" / NAME / "absorption.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != taken}))
    assert not (publish(run, "me/one", dry_run=True) / "eval_results").exists()
