"""`sae-train eval --suite`: what sae-bench is given and what becomes of its results, with stand-ins for it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sae_bench_stand_in import StandIn, is_running
from test_eval_of_files import write_sae
from tiny_gguf import save_twins

from sae_train.cli import main
from sae_train.config import resolve
from sae_train.config.flags import SuiteFlags
from sae_train.data.language_model import load_language_model
from sae_train.data.text_source import drop_ids
from sae_train.errors import UserError
from sae_train.evals import baselines
from sae_train.evals.fidelity import FidelityData, loss_recovered
from sae_train.report.suite import suite_tables
from sae_train.runs import suite as suites
from sae_train.runs import suite_text
from sae_train.runs.corpus import corpus_rows
from sae_train.runs.display import Display
from sae_train.runs.suite import find_suite, identity_of, run_suite
from sae_train.sae.files import load_sae, save_sae
from sae_train.sae.model import SAE, SAEConfig

ALL = "core,sparse-probing,scr,tpp"
LOSSES = ("metrics/ce_loss_score", "metrics/kl_div_with_sae")
UNKNOWN_TEXT = {"text_column": "text"}
FEW = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1, "batch_size_prompts": 4}


@pytest.fixture
def peer(tmp_path, monkeypatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def speller():
    return load_language_model("speller", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def embedded_rows(speller):
    """The embedded text, opened once for the tests that read it."""
    given = {"dataset": "generated"}
    return corpus_rows(speller, SAE(SAEConfig("relu", 4, 8)), Path("no run"), resolve(given), given)


@pytest.fixture(autouse=True)
def opened_once(monkeypatch, request):
    def find(lm, sae, checkpoint, settings, given):
        if given == {"dataset": "generated"}:
            return request.getfixturevalue("embedded_rows")
        if given == UNKNOWN_TEXT:
            return None, "it does not say what text it was trained on"
        return corpus_rows(lm, sae, checkpoint, settings, given)

    monkeypatch.setattr(suites, "corpus_rows", find)


def ask(peer: StandIn, evals: str = ALL, **settings) -> suites.Suite:
    config = peer.python.with_name("suite.yaml")
    config.write_text(yaml.safe_dump(settings))
    return find_suite(SuiteFlags(evals, peer.python, config), trust_remote_code=True)


def run(peer: StandIn, lm, folder: Path, evals: str = ALL, given=None, **settings) -> SAE:
    """Let the stand-in evaluate the SAE in a folder, by default on four rows of the embedded text."""
    sae, given = load_sae(folder), {"dataset": "generated"} if given is None else given
    settings = {"core": FEW} | settings
    with Display() as display:
        run_suite(ask(peer, evals, **settings), sae, lm, folder, resolve(given), given, folder, display)
    return sae


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("accuracy", "--suite cannot run 'accuracy': it runs core, sparse-probing, scr, tpp"),
        ("core,", "--suite cannot run '': it runs"),
        (
            "core,unlearning",
            r"'unlearning' \(one of its data sets is gated.*\): it runs core, sparse-probing",
        ),
        ("autointerp", r"'autointerp' \(.*a key\): it runs"),
        ("absorption", r"'absorption' \(sae-train eval measures it itself"),
    ],
)
def test_what_is_not_run_is_refused_with_what_is(name, sentence, peer):
    with pytest.raises(UserError, match=sentence):
        find_suite(SuiteFlags(name, peer.python))


def test_evals_are_named_as_sae_bench_spells_them_too(peer):
    assert ask(peer, "sparse_probing, core").evals == ("sparse-probing", "core")
    assert find_suite(SuiteFlags()) is None


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, "not installed"),
        (Path(sys.executable), "has no sae-bench"),
        (Path("no/python"), "cannot be started"),
    ],
)
def test_a_missing_sae_bench_is_told_with_the_two_commands_that_install_it(python, reason):
    with pytest.raises(UserError, match=reason) as told:
        find_suite(SuiteFlags("core", python))
    assert "`python -m venv " in str(told.value) and "pip install sae-bench==0.6.0" in str(told.value)
    assert "\n" not in str(told.value) and "--suite-python" in str(told.value)


@pytest.mark.parametrize("names", [None, ["fancyzhx/ag_news", "codeparrot/github-code"]])
def test_a_data_set_that_runs_code_needs_the_flag(names, peer, tmp_path):
    config = tmp_path / "suite.yaml"
    config.write_text(yaml.safe_dump({"sparse-probing": {"dataset_names": names} if names else {}}))
    flags = SuiteFlags("sparse-probing", peer.python, config)
    with pytest.raises(UserError, match="codeparrot/github-code, which runs code from the hub: give --trust-remote-c"):
        find_suite(flags)
    assert find_suite(flags, trust_remote_code=True)
    config.write_text(yaml.safe_dump({"sparse-probing": {"dataset_names": ["fancyzhx/ag_news"]}}))
    assert find_suite(flags)


@pytest.mark.parametrize("allowed", [False, True])
def test_data_sets_run_code_where_the_flag_allows_it_alone(allowed, peer, speller, tmp_path):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    given = {"dataset": "generated"}
    with Display() as display:
        settings = resolve(given | {"trust_remote_code": allowed})
        run_suite(ask(peer, "core", core=FEW), load_sae(folder), speller, folder, settings, given, folder, display)
    [note] = peer.notes("loaded")
    assert note["trust_remote_code"] is allowed


def test_settings_are_read_by_eval(peer, tmp_path):
    assert ask(peer, "core", sparse_probing={"k_values": [1]}).settings == {"sparse-probing": {"k_values": [1]}}
    with pytest.raises(UserError, match="'corr' is no group of settings of an eval: there are core, sparse-probing"):
        ask(peer, "core", corr={})
    with pytest.raises(UserError, match="'core' is no group of settings"):
        ask(peer, "core", core=4)
    with pytest.raises(UserError, match="--suite-config is read with --suite alone"):
        find_suite(SuiteFlags(suite_config=tmp_path / "suite.yaml"))


def test_sae_bench_gets_the_sae_the_model_and_its_own_settings(peer, speller, tmp_path):
    folder = write_sae(tmp_path / "relu-sae", "relu", "float32")
    run(peer, speller, folder, sparse_probing={"probe_train_set_size": 80})
    for note in peer.notes("sae"):
        assert note["files"] == ["cfg.json", "sae_weights.safetensors"] and note["device"] == "cpu"
        assert note["sae"]["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
        assert note["sae"]["metadata"]["model_name"] == "speller" and note["sae"]["metadata"]["prepend_bos"] is True
    assert [note["eval"] for note in peer.notes("eval")] == ALL.split(",")
    core, probing, scr, tpp = peer.notes("eval")
    assert {note["release"] for note in peer.notes("eval")} == {"relu-sae"}
    assert core["verbose"] and core["exclude_special_tokens_from_reconstruction"]
    assert core["compute_featurewise_density_statistics"] and core["dtype"] == "float32" and core["device"] == "cpu"
    own = {"random_seed": 42, "llm_batch_size": 32, "llm_dtype": "float32", "model_name": "speller"}
    assert probing["config"].items() >= (own | {"probe_train_set_size": 80}).items()
    assert scr["config"].items() >= (own | {"train_set_size": 4000, "perform_scr": True}).items()
    assert tpp["config"]["perform_scr"] is False
    assert all(note["force_rerun"] for note in peer.notes("eval"))
    assert not any(Path(note["artifacts"]).exists() for note in (probing, scr, tpp))
    bridged = peer.notes("bridged")
    assert {note["bridged"] for note in bridged} == {str(Path(suites.__file__).parents[1] / "embedded")}


def rows_given(peer: StandIn) -> torch.Tensor:
    return torch.from_numpy(np.stack(pd.read_parquet(f"{peer.file}.parquet")["tokens"]))


def test_the_core_eval_reads_each_row_of_the_saes_own_text_once(peer, speller, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_text, "loss_recovered", lambda *_: dict.fromkeys(LOSSES, 0.25))
    monkeypatch.setattr(suite_text.FidelityData, "build", lambda *_: None)
    folder = write_sae(tmp_path / "sae", "topk", "float32")
    sae = run(peer, speller, folder, "core", core={})
    [core] = peer.notes("eval")
    n = core["n_eval_reconstruction_batches"]
    rows = rows_given(peer)
    assert rows.shape == (n * core["eval_batch_size_prompts"], core["context_size"]) == (128, 128)
    assert n == core["n_eval_sparsity_variance_batches"] and (rows[:, 0] == speller.bos_id).all()
    result = json.loads((folder / "eval_results/core/sae_custom_sae_eval_results.json").read_text())
    assert result["eval_config"]["dataset"] == "generated" and result["eval_result_metrics"]["sparsity"]["l0"] == 7.97
    left_out = speller.special_ids | drop_ids(speller.tokenizer, "speller", resolve({}).data.drop)
    kept = ~torch.isin(rows.flatten(), torch.tensor(sorted(left_out)))
    x = torch.cat([speller.activations(row[None])[0] for row in rows])[kept]
    [table] = suite_tables(folder, identity_of(sae))
    values = {name: (theirs, here) for name, theirs, here in table.rows}
    assert values["L0"] == ("7.97", f"{(sae.encode(x) != 0).sum(1).float().mean():.2f}")
    ev = 1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert values["explained variance"] == ("0.501", f"{ev:.3f}")
    assert values["KL divergence recovered"] == ("–", "–")  # −1 is sae-bench's word for no number
    assert values["CE loss recovered"] == ("0.946", "0.250")


def test_loss_recovered_is_measured_on_the_rows_that_were_handed_over(peer, speller, tmp_path):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    sae = run(peer, speller, folder, "core")
    ours = json.loads((folder / "eval_results/suite.json").read_text())["evals"]["core"]["ours"]
    drop = drop_ids(speller.tokenizer, "speller", resolve({}).data.drop)
    same = loss_recovered(speller, sae, FidelityData.build(speller, rows_given(peer), drop))
    assert len(rows_given(peer)) == 4
    for name in LOSSES:
        assert ours[name.removeprefix("metrics/")] == pytest.approx(same[name])


@pytest.mark.parametrize(
    ("core", "shape"),
    [
        (FEW | {"n_eval_reconstruction_batches": 2}, (8, 128)),
        ({"context_size": 16, "batch_size_prompts": 500}, (128, 16)),
    ],
)
def test_less_text_is_handed_over_where_settings_ask_for_less(core, shape, peer, speller, tmp_path):
    run(peer, speller, write_sae(tmp_path / "sae", "topk", "float32"), "core", core=core)
    [note] = peer.notes("eval")
    rows = rows_given(peer)
    assert (note["n_eval_reconstruction_batches"] * note["eval_batch_size_prompts"], note["context_size"]) == shape
    assert (len(rows), note["context_size"]) == shape


@pytest.mark.parametrize("core", [{"batch_size_prompts": 0}, {"n_eval_reconstruction_batches": "many"}])
def test_sizes_of_the_core_eval_are_whole_numbers(core, peer, speller, tmp_path):
    with pytest.raises(UserError, match=f"{next(iter(core))} .* is no whole number of at least 1"):
        run(peer, speller, write_sae(tmp_path / "sae", "topk", "float32"), "core", core=core)


@pytest.mark.parametrize(
    ("core", "given", "dataset"),
    [({}, UNKNOWN_TEXT, "Skylion007/openwebtext"), ({"dataset": "lighteval/MATH"}, None, "lighteval/MATH")],
)
def test_without_a_text_of_the_sae_or_with_a_named_one_sae_bench_reads_it_itself(
    core, given, dataset, peer, speller, tmp_path
):
    folder = write_sae(tmp_path / "sae", "topk", "float32")
    sae = run(peer, speller, folder, "core", given=given, core=core)
    [note] = peer.notes("eval")
    assert note["dataset"] == dataset and note["n_eval_reconstruction_batches"] == 200
    [table] = suite_tables(folder, identity_of(sae))
    assert {row[2] for row in table.rows} == {"–"}


def test_a_gguf_file_is_handed_over_as_a_folder_of_its_weights(peer, tmp_path):
    gguf, _ = save_twins(tmp_path)
    lm = load_language_model(gguf, "blocks.1.hook_resid_post")
    cfg = SAEConfig("relu", 32, 64, model_name=str(gguf), hook_name=lm.hook_name)
    save_sae(SAE(cfg), tmp_path / "sae")
    run(peer, lm, tmp_path / "sae", "sparse-probing", given={"model": str(gguf)})
    [note] = peer.notes("bridged")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(note["there"])
    assert peer.notes("eval")[0]["config"]["model_name"] == "tiny.gguf"


def test_a_model_that_transformer_lens_knows_is_asked_for_by_its_name(peer, tmp_path):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    job = {"evals": ["sparse-probing", "tpp"], "sae": str(folder), "name": "sae", "model": "gpt2", "model_name": "gpt2",
           "trust_remote_code": False, "device": "cpu", "dtype": "float32", "text": None, "settings": {},
           "out": str(tmp_path / "out"), "answer": str(tmp_path / "answer.json")}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert suites.subprocess.run([peer.python, suites.BRIDGE, tmp_path / "job.json"]).returncode == 0
    assert peer.notes("by_name", "bridged") == [{"by_name": "gpt2", "device": "cpu", "dtype": "float32"}]


def test_results_are_kept_until_sae_settings_or_text_change(peer, speller, tmp_path, capsys):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    sae = run(peer, speller, folder, "core,tpp")
    capsys.readouterr()
    run(peer, speller, folder, "core,tpp")
    assert len(peer.notes("eval")) == 2
    said = capsys.readouterr().out
    assert "sae-bench core: kept from " in said and "sae-bench tpp: kept" in said and "L0 7.97" in said
    run(peer, speller, folder, "core,tpp", tpp={"train_set_size": 8})
    assert [note["eval"] for note in peer.notes("eval")] == ["core", "tpp", "tpp"]
    other = tmp_path / "other.txt"
    other.write_text("lily hugged the bear. " * 6000)
    run(peer, speller, folder, "core", given={"dataset": str(other)})
    assert len(peer.notes("eval")) == 4
    (folder / "eval_results/core/sae_custom_sae_eval_results.json").unlink()
    run(peer, speller, folder, "core", given={"dataset": str(other)})
    assert len(peer.notes("eval")) == 5
    with torch.no_grad():
        sae.W_enc[0, 0] += 1
    assert not suite_tables(folder, identity_of(sae))  # what is there is another SAE's
    save_sae(sae, folder)
    run(peer, speller, folder, "tpp", tpp={"train_set_size": 8})
    assert len(peer.notes("eval")) == 6 and len(suite_tables(folder, identity_of(sae))) == 1


@pytest.mark.parametrize(
    ("how", "sentences"),
    [
        ("hub tpp", ["sae-bench's tpp needs the Hugging Face hub", "'some/texts of tpp'"]),
        ("hub core", ["sae-bench's core needs the Hugging Face hub", "'some/texts of core'"]),
        ("other tpp", ["sae-bench's tpp failed: RuntimeError: two tensors of other shapes"]),
        ("other core", ["sae-bench's core failed: RuntimeError: two tensors of other shapes"]),
        ("crash tpp", ["sae-bench's tpp failed: it ended with code 9"]),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_what_was_done(how, sentences, peer, speller, tmp_path):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    peer.fail(how)
    evals = "sparse-probing,core" if how.endswith("core") else "core,tpp"
    with pytest.raises(UserError) as told:
        run(peer, speller, folder, evals)
    log = folder / "eval_results/suite.log"
    for sentence in [*sentences, str(log)]:
        assert sentence in str(told.value)
    assert "\n" not in str(told.value) and "@suite begin" in log.read_text()
    assert [table.name for table in suite_tables(folder, identity_of(load_sae(folder)))] == [evals.split(",")[0]]
    peer.fail("")
    run(peer, speller, folder, evals)
    assert not log.exists() and len(peer.notes("eval")) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"core": {"batches": 4}},
            "--suite-config: core has no setting batches: there are batch_size_prompts, ",
        ),
        ({"core": {"compute_kl": False}}, "core has no setting compute_kl"),  # multiple_evals does not take it
        ({"sparse-probing": {"model_name": "gpt2"}}, "sparse-probing has no setting model_name"),
        ({"tpp": {"perform_scr": True}}, "tpp has no setting perform_scr"),
        ({"scr": {"train_set_size": "all"}}, "--suite-config: scr: .*train_set_size.*valid integer"),
    ],
)
def test_settings_that_sae_bench_does_not_take_are_refused_by_its_own_class(
    settings, sentence, peer, speller, tmp_path
):
    with pytest.raises(UserError, match=sentence):
        run(peer, speller, write_sae(tmp_path / "sae", "relu", "float32"), next(iter(settings)), **settings)


def test_an_interruption_ends_sae_bench_too(peer, speller, tmp_path, monkeypatch):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    peer.fail("silence core")
    lines, started = suites._lines, []

    def interrupted(stream):
        for line in lines(stream):
            if line.startswith("waiting"):
                started.append(int(line.split()[1]))
                raise KeyboardInterrupt
            yield line

    monkeypatch.setattr(suites, "_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(peer, speller, folder, "core")
    assert started and not is_running(started[0])


def test_the_command_line_puts_the_numbers_on_the_page(peer, tmp_path, monkeypatch, capsys):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    monkeypatch.setattr(baselines, "all_scores", lambda *_, **__: {})
    config = tmp_path / "few.yaml"
    config.write_text(yaml.safe_dump({"core": FEW, "sparse-probing": {"dataset_names": ["fancyzhx/ag_news"]}}))
    flags = ["eval", str(folder), "--eval-words", "600", "--dataset", "generated"]
    monkeypatch.setenv("SAE_BENCH_PYTHON", str(peer.python))
    peer.fail("hub sparse-probing")
    assert main([*flags, "--suite", "core,sparse-probing", "--suite-config", str(config)]) == 2
    assert "needs the Hugging Face hub" in capsys.readouterr().err
    page = (folder / "absorption.html").read_text()
    assert "By sae-bench’s own evals" in page and "<td>7.97</td>" in page and "0.770" not in page
    peer.fail("")
    assert main([*flags, "--suite", "core,sparse-probing,scr,tpp", "--suite-config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "core: kept" in said and "Reconstruction Batches" not in said
    assert "sparse-probing (accuracy, SAE latents / residual stream’s values): the best 1 0.710 / 0.600" in said
    page = (folder / "absorption.html").read_text()
    for row in (
        '<th scope="row">the best 2</th><td>0.770</td><td>0.650</td>',
        '<th scope="row">all</th><td>0.940</td><td>0.950</td>',
        '<th scope="row">latents put to 0: 10</th><td>0.200</td>',
        '<th scope="row">latents put to 0: 10</th><td>0.030</td>',
    ):
        assert row in page, row
    assert main(flags) == 0  # a later evaluation without --suite keeps them
    assert "the best 2" in (folder / "absorption.html").read_text()


@pytest.mark.parametrize("damage", ["cut", "other types", "other place"])
def test_a_damaged_record_or_result_is_left_out(damage, peer, speller, tmp_path):
    folder = write_sae(tmp_path / "sae", "relu", "float32")
    who = identity_of(run(peer, speller, folder, "core,tpp"))
    result, record = folder / "eval_results/tpp/sae_custom_sae_eval_results.json", folder / "eval_results/suite.json"
    if damage == "cut":
        result.write_text(result.read_text()[:40])
    elif damage == "other types":
        result.write_text(json.dumps({"eval_result_metrics": {"tpp_metrics": {"tpp_threshold_2_total_metric": "<b>"}}}))
    else:
        content = json.loads(record.read_text())
        content["evals"]["tpp"]["file"] = "../../../secret.json"
        record.write_text(json.dumps(content))
        shutil.copy(result, tmp_path / "secret.json")
    assert "tpp" not in [table.name for table in suite_tables(folder, who)]
