"""Files that somebody else made, or damaged: they give a result or one sentence, and write nowhere else."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae_train import load_sae, resume, train
from sae_train.cli import main
from sae_train.config import resolve
from sae_train.config.merge import read_yaml
from sae_train.errors import UserError
from sae_train.publishing.publish import publish
from sae_train.report import export_report, write_report
from sae_train.runs.runner import Runner
from sae_train.sae.files import save_sae
from sae_train.sae.model import SAE, SAEConfig

SWEEP = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)
SAE_FILES, RUN_FILES, SETTINGS_FILES = 40, 60, 60  # mutated files a test
NUMBERS = (0, -1, 1, 3, 1.5, 1e400, -(10**30), 2**70, float("nan"))
TEXTS = ("", "none", "False", "yes", "3", "topk", "../up", "\x00", "a/b", "ß" * 300, "{x}")
OTHERS = (None, True, False, [], {}, [8], ["standard"], [[1]], {"a": 1}, {"k": "x"}, [None], [{"name": 5}])


@st.composite
def mutated(draw, content: dict) -> dict:
    """The content with one to three of its values, anywhere in it, replaced, dropped, renamed or wrapped."""
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(places(changed)))
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "wrap", "add"])):
            case "drop":
                del holder[key]
            case "wrap":
                holder[key] = [holder[key]]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(st.sampled_from(OTHERS)))
            case _:
                holder[key] = copy.deepcopy(draw(st.sampled_from((*NUMBERS, *TEXTS, *OTHERS))))
        if not places(changed):
            break
    return changed


def places(node) -> list:
    """Every (dictionary or list, key) below a value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def sentence_or_result(action) -> bool:
    """Whether an action gave a result; else it must have said what was wrong in a few lines."""
    try:
        action()
    except UserError as error:
        assert 0 < len(str(error)) < 3000 and "Traceback" not in str(error)
        return False
    return True


def write_sae(folder: Path, architecture: str) -> Path:
    sae = SAE(SAEConfig(architecture, 4, 8, k=2 if architecture == "topk" else None, model_name="m", hook_name="h"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_sae(sae, folder)
    return folder


OLD_SAELENS = {
    "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "d_in": 4, "d_sae": 8,
    "normalize_activations": "none", "finetuning_scaling_factor": False, "hook_name": "blocks.1.hook_resid_pre",
    "hook_head_index": None, "model_from_pretrained_kwargs": {"center_writing_weights": False}, "lr": 1e-3,
    "seqpos_slice": [None], "prepend_bos": True, "context_size": 64,
    "metadata": {"l0": 2.0, "sae_lens_version": "6.0.0"},
}  # fmt: skip
SPARSIFY = {"activation": "topk", "k": 2, "num_latents": 8, "d_in": 4, "signed": False, "normalize_decoder": True}
DICTIONARY = {
    "trainer": {"dict_class": "AutoEncoderTopK", "k": 2, "layer": 3, "lm_name": "m", "activation_dim": 4,
                "dict_size": 8, "submodule_name": "resid_post_layer_3"},
    "buffer": {"ctx_len": 64, "io": "out"},
}  # fmt: skip
LLAMA = {
    "d_model": 4, "d_sae": 8, "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
    "act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise", "use_glu_encoder": False,
    "dataset_average_activation_norm": {"in": 3.0, "out": 3.0}, "sparsity_include_decoder_norm": True, "top_k": 50,
}  # fmt: skip
GEMMA = {"architecture": "jump_relu", "model_name": "m", "hf_hook_point_in": "model.layers.3.output", "l0": 3}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, tuple[Path, str, dict]]:
    """A folder of each layout, the name of its settings file and what that says."""
    made = {}
    for architecture in ("topk", "jumprelu"):
        folder = write_sae(tmp_path_factory.mktemp(architecture), architecture)
        made[architecture] = (folder, "cfg.json", json.loads((folder / "cfg.json").read_text()))
    tensors = load_file(made["topk"][0] / "sae_weights.safetensors")
    made["old"] = (write_sae(tmp_path_factory.mktemp("old"), "topk"), "cfg.json", OLD_SAELENS)
    linear = {"encoder.weight": tensors["W_enc"].t().contiguous(), "encoder.bias": tensors["b_enc"]}
    folder = tmp_path_factory.mktemp("sparsify") / "layers.3"
    folder.mkdir()
    save_file(linear | {name: tensors[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    made["sparsify"] = (folder, "cfg.json", SPARSIFY)
    folder = tmp_path_factory.mktemp("dictionary")
    torch.save(linear | {"decoder.weight": tensors["W_dec"].t(), "b_dec": tensors["b_dec"]}, folder / "ae.pt")
    made["dictionary_learning"] = (folder, "config.json", DICTIONARY)
    folder = tmp_path_factory.mktemp("gemma")
    save_file(load_file(made["jumprelu"][0] / "sae_weights.safetensors"), folder / "params.safetensors")
    made["gemma"] = (folder, "config.json", GEMMA)
    folder = tmp_path_factory.mktemp("llama")
    (folder / "checkpoints").mkdir()
    decoder = {"decoder.weight": tensors["W_dec"].t().contiguous(), "decoder.bias": tensors["b_dec"]}
    save_file(linear | decoder, folder / "checkpoints" / "final.safetensors")
    made["llama"] = (folder, "hyperparams.json", LLAMA)
    return made


@pytest.mark.parametrize("name", ["topk", "jumprelu", "old", "sparsify", "dictionary_learning", "gemma", "llama"])
def test_settings_of_saes_give_a_result_or_one_sentence(name, layouts):
    folder, file, content = layouts[name]
    results = set()

    @settings(SWEEP, max_examples=SAE_FILES)
    @given(mutated(content))
    def sweep(changed):
        (folder / file).write_text(json.dumps(changed))
        results.add(sentence_or_result(lambda: load_sae(folder, allow_pickle=True)(torch.ones(2, 4))))

    sweep()
    (folder / file).write_text(json.dumps(content))
    assert load_sae(folder, allow_pickle=True)(torch.ones(2, 4)).isfinite().all()
    assert results == {True, False}


BROKEN = [
    "",
    "{",
    "[]",
    "3",
    "null",
    '"text"',
    "[" * 100_000,
    '{"a":' * 50_000,
    "\ufeff{}",
    '{"k": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("text", [*BROKEN, "\ud800"], ids=range(len(BROKEN) + 1))
def test_what_is_no_json_is_refused_in_one_sentence(text, layouts, interrupted, tmp_path):
    data = text.encode("utf-8", "surrogatepass")
    for folder, file, content in layouts.values():
        (folder / file).write_bytes(data)
        with pytest.raises(UserError, match=file):
            load_sae(folder, allow_pickle=True)
        (folder / file).write_text(json.dumps(content))
    shutil.copytree(interrupted, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(data)
    for action in (write_report, resume, lambda folder: publish(folder, "me/x", dry_run=True)):
        with pytest.raises(UserError, match=r"run\.json"):
            action(tmp_path / "run")


TYPED = [
    ("topk", {"metadata": "none"}, "metadata 'none'"),
    ("topk", {"architecture": ["standard"]}, "architecture"),
    ("topk", {"activation_fn_kwargs": [8]}, "activation_fn_kwargs"),
    ("topk", {"k": True}, "k True"),
    ("old", {"hook_name": 5}, "hook_name 5"),
    ("dictionary_learning", {"trainer": "StandardTrainer"}, "trainer 'StandardTrainer'"),
    ("dictionary_learning", {"buffer": [1]}, "buffer"),
    ("sparsify", {"k": [2]}, "k"),
    ("gemma", {"hf_hook_point_in": 3}, "hf_hook_point_in 3"),
]


@pytest.mark.parametrize(("name", "changes", "words"), TYPED)
def test_a_setting_of_another_type_is_named(name, changes, words, layouts):
    folder, file, content = layouts[name]
    (folder / file).write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=rf"{file}: {words}") as caught:
        load_sae(folder, allow_pickle=True)
    (folder / file).write_text(json.dumps(content))
    assert "pydantic" not in str(caught.value) and "\n" not in str(caught.value)


class Stop(Exception):
    """Ends a run in the middle."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A small run of a toy that broke off after its first saved state."""

    def stop(_sae, step):
        if step > 40:
            raise Stop
        yield "mine/step", step

    out = tmp_path_factory.mktemp("runs")
    asked = {"model": "toy", "width": "32,64", "l0": 3, "tokens": 6400, "batch_tokens": 64, "save_every": 20,
             "absorption": False, "held_out_tokens": 512}  # fmt: skip
    with pytest.raises(Stop):
        train(**asked, out=out, name="broken", callbacks=[stop])
    return out / "broken"


def rewrite(source: Path, target: Path, **changes) -> Path:
    shutil.copytree(source, target)
    info = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(info | changes))
    return target


def test_run_files_give_a_result_or_one_sentence(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "go", lambda self: self.folder)
    folder = rewrite(interrupted, tmp_path / "run")
    content = json.loads((folder / "run.json").read_text())
    results = {"report": set(), "publish": set(), "resume": set()}
    for name in [entry["name"] for entry in content["saes"]]:
        write_sae(folder / "saes" / name, "topk")
    (folder / "metrics.jsonl").unlink()

    actions = {
        "report": lambda: write_report(folder),
        "publish": lambda: shutil.rmtree(publish(folder, "me/x", dry_run=True, force=True)),
        "resume": lambda: resume(folder),
    }

    @settings(SWEEP, max_examples=RUN_FILES)
    @given(mutated(content), st.sampled_from(list(actions)))
    def sweep(changed, action):
        (folder / "run.json").write_text(json.dumps(changed))
        results[action].add(sentence_or_result(actions[action]))

    sweep()
    assert set().union(*results.values()) == {True, False} and all(results.values())


LEFT_OUT = {"median_norm": 2.5, "trained": 7, "held_out": 3, "first_position": True}
FILE = {"name": "model.safetensors", "bytes": 5, "sha256": None}


@pytest.mark.parametrize("norm", [None, "", "none", [1], {}, 10])
def test_what_was_left_out_is_told_whatever_the_setting_says(norm, interrupted, tmp_path):
    settings = json.loads((interrupted / "run.json").read_text())["settings"] | {"outlier_norm": norm}
    folder = rewrite(interrupted, tmp_path / "run", settings=settings, outliers=LEFT_OUT)
    write_report(folder)
    limit = "10" if norm == 10 else "–"
    assert f"more than {limit} times the median norm of 2.50" in (folder / "report.html").read_text()


@pytest.mark.parametrize("change", [{"trained": "7"}, {"held_out": None}, {"first_position": []}, {"median_norm": {}}])
def test_a_count_of_outliers_of_another_type_is_refused(change, interrupted, tmp_path):
    folder = rewrite(interrupted, tmp_path / "run", outliers=LEFT_OUT | change)
    for action in (write_report, lambda folder: publish(folder, "me/x", dry_run=True, force=True)):
        with pytest.raises(UserError, match=rf"run\.json: outliers\.{next(iter(change))}"):
            action(folder)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"files": [FILE], "package": None}, "weights: `model.safetensors` (5 bytes, sha256 not taken)."),
        ({"files": [FILE], "package": "p 1"}, "(5 bytes, sha256 not taken) of the package p 1."),
        ({"hub": "me/lm"}, "weights: revision unknown of `me/lm`"),
        ({"package": "p 1"}, None),
    ],
)
def test_a_card_says_what_is_known_of_the_weights(weights, words, interrupted, tmp_path):
    folder = rewrite(interrupted, tmp_path / "run", weights=weights)
    for entry in json.loads((folder / "run.json").read_text())["saes"]:
        write_sae(folder / "saes" / entry["name"], "topk")
    staged = publish(folder, "me/x", dry_run=True, force=True)
    text = (staged / "README.md").read_text()
    shutil.rmtree(staged)
    assert "3,200 tokens" in text and (words in text if words else "model's weights" not in text)


def test_lines_of_other_types_are_left_out_and_counted(interrupted, tmp_path):
    folder = rewrite(interrupted, tmp_path / "run")
    good = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bad = [{"step": [1]}, {"step": "x"}, {"tokens": {}}, {"metrics/l0": "3"}, {"losses/loss": [1]}, {"sae": 4},
           {"sparsity/log10_density_histogram": ["a"]}]  # fmt: skip
    lines = [json.dumps(row) for row in [*good, *(good[0] | change for change in bad)]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, "[1]", "{"]))
    record = {"latent": 1, "main_of": [], "absorbs": [], "density": 0.1, "max": 2.0, "histogram": [], "examples": []}
    changes = [{}, {"density": "x"}, {"examples": [1]}, {"histogram": 3}, {"main_of": None}, {"latent": -1}]
    (folder / "latents").mkdir()
    name = json.loads((folder / "run.json").read_text())["saes"][0]["name"]
    text = "\n".join(json.dumps(record | change) for change in changes)
    (folder / "latents" / f"{name}.jsonl").write_text(text)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert f"{len(bad) + 2} unreadable row(s) of metrics.jsonl" in page
    assert f"5 unreadable record(s) of latents/{name}.jsonl" in page


@pytest.mark.parametrize(
    "change",
    [{"valid": "yes, very"}, {"intervals": [1]}, {"mean_f1": "x"}, {"baselines": {"random": {"mean_full": "y"}}}],
)
def test_an_evaluation_of_other_types_is_refused_on_publishing(change, interrupted, tmp_path):
    folder = rewrite(interrupted, tmp_path / "run")
    name = json.loads((folder / "run.json").read_text())["saes"][0]["name"]
    write_sae(folder / "saes" / name, "topk")
    rest = {"valid": True, "reason": "", "mean_f1": 0.5, "intervals": {"mean_full": [0, None]}, "baselines": {}}
    content = {
        "eval_type_id": "absorption_first_letter",
        "eval_result_metrics": {"mean": {}},
        "eval_result_details": [],
    }
    for unstructured in (rest, rest | change):
        whole = content | {"eval_result_unstructured": unstructured}
        (folder / "saes" / name / "absorption.json").write_text(json.dumps(whole))
        if unstructured is rest:
            shutil.rmtree(publish(folder, "me/x", dry_run=True, force=True))
    with pytest.raises(UserError, match=rf"absorption\.json: eval_result_unstructured\.{next(iter(change))}"):
        publish(folder, "me/x", dry_run=True, force=True)


def test_settings_files_give_a_result_or_one_sentence(tmp_path):
    path, results = tmp_path / "settings.yaml", set()
    content = read_yaml(Path(__file__).parents[1] / "configs" / "speller.yaml")

    @settings(SWEEP, max_examples=SETTINGS_FILES)
    @given(mutated(content))
    def sweep(changed):
        path.write_text(yaml.safe_dump(changed))
        results.add(sentence_or_result(lambda: resolve({}, path)))

    sweep()
    assert results == {True, False}


@pytest.mark.parametrize(
    "changes",
    [{"saes": "abc"}, {"saes": [1]}, {"saes": [{"name": 3}]}, {"settings": []}, {"passes": "all"}, {"passes": [["x"]]}],
)
def test_a_run_file_of_other_types_is_refused_on_resume(changes, interrupted, tmp_path):
    with pytest.raises(UserError, match=r"run\.json"):
        resume(rewrite(interrupted, tmp_path / "run", **changes))


def test_a_state_of_other_settings_is_refused(interrupted, tmp_path):
    asked = json.loads((interrupted / "run.json").read_text())["settings"]
    folder = rewrite(interrupted, tmp_path / "run", settings=asked | {"buffer_tokens": 128, "matryoshka_prefixes": [1]})
    state = next(folder.glob("state/step-*/topk-32-l0_3/state.safetensors"))
    shutil.copy(next(folder.glob("state/step-*/topk-64-l0_3/state.safetensors")), state)
    with pytest.raises(UserError, match="is damaged or of other settings"):
        resume(folder)


@pytest.mark.parametrize("value", [True, "true", 1, "yes"])
def test_only_the_users_own_word_turns_on_code_of_the_hubs(value, interrupted, tmp_path, capsys, monkeypatch):
    asked = json.loads((interrupted / "run.json").read_text())["settings"]
    folder = rewrite(interrupted, tmp_path / "run", settings=asked | {"trust_remote_code": value})
    assert main(["resume", str(folder)]) == 2
    assert f"sae-train resume {folder} --trust-remote-code" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(Runner, "go", lambda self: seen.append(self.settings.lm.trust_remote_code) or self.folder)
    resume(interrupted)
    assert seen == [False]


LEADING_OUT = ["../../out", "..", "/tmp/out", "a/b", "a\\b", "", "x\n", "\x00", "n" * 300]


@pytest.mark.parametrize("name", LEADING_OUT)
@pytest.mark.parametrize("place", ["run.json", "metrics.jsonl"])
def test_names_that_lead_out_of_a_folder_write_nowhere(name, place, interrupted, tmp_path):
    folder = rewrite(interrupted, tmp_path / "runs" / "run")
    if place == "run.json":
        info = json.loads((folder / place).read_text())
        info["saes"][0]["name"] = name
        (folder / place).write_text(json.dumps(info))
        for action in (
            lambda: export_report([folder], tmp_path / "figures"),
            lambda: publish(folder, "me/x", dry_run=True, force=True),
            lambda: write_report(folder),
            lambda: resume(folder),
        ):
            with pytest.raises(UserError, match=r"saes\.0\.name .*no name of a folder"):
                action()
        assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    else:
        rows = [json.loads(line) | {"sae": name} for line in (folder / place).read_text().splitlines()]
        (folder / place).write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_report(folder)
        assert "unreadable row(s) of metrics.jsonl" in (folder / "report.html").read_text()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"run"}
