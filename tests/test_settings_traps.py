"""Settings and figures that look right and are not: each is refused in one sentence, before anything long."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_publish import make_run
from tiny_models import WORDS, save_tiny_model

from sae_train import train
from sae_train.cli import main
from sae_train.config import leaves, resolve
from sae_train.config.settings import Settings
from sae_train.config.units import parse_count
from sae_train.errors import UserError


def takes_floats(name: str) -> bool:
    kind = str(Settings.model_fields[leaves()[name]].annotation.model_fields[name].annotation)
    return "float" in kind.replace("float32", "").replace("bfloat16", "").replace("float16", "")


FLOATS = [name for name in leaves() if takes_floats(name)]


def test_the_floats_of_the_tree_are_found():
    assert {"lr", "grad_clip", "aux_coefficient", "memory_gib", "jumprelu_bandwidth", "l0"} <= set(FLOATS)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", float("inf"), np.float32("nan")])
def test_no_number_may_be_infinite_or_none(name, value):
    with pytest.raises(UserError, match=r"finite|than|an L0|a share|above 1"):
        resolve({name: value})


@pytest.mark.parametrize(("warm_up", "decay"), [(0.6, 0.6), (0.05, 0.96), (0.99, 0.2)])
def test_warm_up_and_decay_that_overlap_are_refused(warm_up, decay):
    with pytest.raises(UserError, match="overlap"):
        resolve({"lr_warm_up": warm_up, "lr_decay": decay})
    resolve({"lr_warm_up": 1 - decay, "lr_decay": decay})


@pytest.mark.parametrize("text", ["1,5M", "1,50k", "3.000", "1,0000", "0,100", "1.5", "1,000.5", "12,34,567", ",100"])
def test_a_count_in_another_country_s_writing_is_refused(text):
    with pytest.raises(ValueError, match="not a count"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1,500,000", 1_500_000), ("1.50M", 1_500_000), (1e6, 10**6), (np.float64(3e16), 3 * 10**16), ("1,000k", 10**6)],
)
def test_a_count_may_have_commas_between_its_thousands(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("l0", ["0.4", "0.99", 1e-3, "8,0.5"])
def test_an_l0_below_one_latent_a_token_is_refused(l0):
    with pytest.raises(UserError, match="at least 1"):
        resolve({"l0": l0, "arch": "relu"})


@pytest.mark.parametrize("seed", [2**63, 10**30])
def test_a_seed_that_torch_does_not_take_is_refused(seed):
    with pytest.raises(UserError, match="seed"):
        resolve({"seed": seed})
    with pytest.raises(UserError, match="eval_seed"):
        resolve({"eval_seed": seed})


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": " ".join(WORDS)}) + "\n" for _ in range(40)))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    return save_tiny_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "absent.txt"], "absent.txt"),
        (["--dataset", "empty.txt"], "empty"),
        (["--dataset", "broken.parquet"], "broken.parquet"),
        (["--dataset", "text.jsonl"], "no column 'text'"),
        (["--dataset", "nobody/nothing"], "nobody/nothing"),
        (["--drop", "two words"], "single token"),
        (["--hierarchy", "first-leter"], "did you mean"),
        (["--hierarchy", "absent.json"], "absent.json"),
        (["--template", "{word} {word}"], "template"),
        (["--precision", "bfloat16"], "take auto or float32"),
        (["--memory-gib", "1e-6"], "GiB"),
        (["--name", "taken"], "exists"),
        (["--context", "1000"], "context"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(flags, words, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "taken").mkdir(parents=True)
    common = ["--model", "model", "--width", "32", "--l0", "4", "--device", "cpu"]
    text = [] if "--dataset" in flags else ["--dataset", "text.jsonl", "--text-column", "body"]
    for command in ([*common, *text, *flags, "--dry-run"], [*common, *text, *flags]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["taken"]
    assert main([*common, "--dataset", "text.jsonl", "--text-column", "body", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("final", "words"),
    [
        ({"metrics/l0": float("nan")}, "L0 of topk-64-l0_4 was not measured"),
        ({"metrics/l0": float("inf")}, "L0 of topk-64-l0_4 was not measured"),
        ({"absorption/valid": None, "toy/mcc": float("nan")}, "absorption eval of topk-64-l0_4 is missing"),
    ],
)
def test_figures_that_are_no_numbers_are_not_published(final, words, tmp_path, capsys):
    make_run(tmp_path / "run", **final)
    assert main(["publish", str(tmp_path / "run"), "--repo", "me/one", "--dry-run"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--license", "apache", "did you mean apache-2.0"),
        ("--license", "mit\nfoo: bar", "choose from"),
        ("--license", "my own", "choose from"),
        ("--base-model", "../lm", "owner/name"),
        ("--base-model", "a/b/c", "owner/name"),
        ("--base-model", "gpt 2", "owner/name"),
        ("--base-model", "org/модель", "owner/name"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_before_anything_is_staged(flag, value, words, tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["publish", str(tmp_path / "run"), "--repo", "me/one", flag, value, "--dry-run"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absorption/mean_full", "metrics/ce_loss_score", "absorption/mean_fraction_low"])
def test_the_card_of_a_forced_publication_has_finite_figures_alone(name, tmp_path, capsys):
    make_run(tmp_path / "run", **{name: float("nan")})
    assert main(["publish", str(tmp_path / "run"), "--repo", "me/one", "--dry-run", "--force"]) == 0
    staged = Path(capsys.readouterr().out.rsplit("look at ", 1)[1].strip())
    card = staged.read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "nan" not in card.lower().replace("chanin", "") and front["license"] == "mit"


TOY = {
    "model": "toy", "width": 32, "l0": 3, "tokens": 6400, "batch_tokens": 64, "held_out_tokens": 512,
    "absorption": False, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(("dead_tokens", "counted"), [(6401, False), ("10M", False), (6400, True), (640, True)])
def test_latents_are_not_called_alive_where_none_could_count_as_dead(dead_tokens, counted, tmp_path, capsys):
    run = train(**TOY, dead_tokens=dead_tokens, out=tmp_path)
    said, final = capsys.readouterr().out, run.info["saes"][0]["final"]
    assert ("sparsity/dead_fraction" in final) == ("sparsity/dead_features" in final) == counted
    assert ("no latent can count as dead" in said) != counted
    assert ("dead 0.0%" in said or "dead " in said.split("reached")[1]) if counted else "silent on held-out" in said


@pytest.mark.parametrize(("rows", "words"), [(1900, "begun anew 4 times"), (4500, "begun anew once"), (20_000, "")])
def test_data_that_comes_up_again_is_mentioned(rows, words, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(rows, 8)).astype("float32")
    small = {key: value for key, value in TOY.items() if key != "model"}
    run = train(**small, activations=x, out=tmp_path)
    said = capsys.readouterr().out
    assert (words in said) if words else "begun anew" not in said
    assert any("begun anew" in note for note in run.info["notes"]) == bool(words)
