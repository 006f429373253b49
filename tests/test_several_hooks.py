"""Several hooks in one pass: each SAE has the bits of the one trained alone at its hook, and everything says which."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_tokens import sentences, write
from tiny_models import save_tiny_model

from sae_train import load_sae, resume, train
from sae_train.cli import main
from sae_train.config import resolve
from sae_train.config.study import read_design
from sae_train.data.buffer import ActivationBuffer
from sae_train.data.harvest import Harvest, kept_activations
from sae_train.data.hooked_model import LanguageModel
from sae_train.data.language_model import load_at_hooks
from sae_train.data.tokens import open_tokens
from sae_train.errors import UserError
from sae_train.publishing.publish import publish
from sae_train.report.data import load_runs
from sae_train.report.export import gallery
from sae_train.runs import estimate
from sae_train.runs.plan import GIB, check_alone, make_plan
from sae_train.training.ranks import Ranks

HOOKS = ("blocks.1.mlp.hook_post", "blocks.0.hook_attn_out", "blocks.1.hook_resid_post")
# An outlier is so near that each hook leaves out others, and they go through the text at paces of their own.
SMALL = {
    "width": 64, "l0": 8, "arch": "topk,jumprelu", "tokens": 6500, "batch_tokens": 64, "buffer_tokens": 640,
    "held_out_tokens": 2048, "absorption": False, "absorption_evals": 1, "device": "cpu", "outlier_norm": 1.3,
}  # fmt: skip
ARCHS = ("topk", "jumprelu")


def name_of(arch: str, hook: str = "") -> str:
    return f"{arch}-64-l0_8{hook and f'-{hook}'}"


def assert_same(a: Path, b: Path) -> None:
    one, two = (load_file(folder / "sae_weights.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), (a, b)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures_of(row: dict) -> dict:
    kept = ("step", "losses", "metrics", "sparsity")
    return {name: value for name, value in row.items() if name.split("/")[0] in kept}


def assert_same_run(a: Path, b: Path) -> None:
    for hook in HOOKS:
        for arch in ARCHS:
            assert_same(a / "saes" / name_of(arch, hook), b / "saes" / name_of(arch, hook))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """A grid at three hooks."""
    return train(**SMALL, hook=list(HOOKS), out=str(tmp_path_factory.mktemp("hooks")), name="together").path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """Two hooks with the absorption eval."""
    given = SMALL | {"absorption": True, "eval_words": 600, "outlier_norm": 10, "tokens": 12_000, "arch": "topk"}
    out = tmp_path_factory.mktemp("evaluated")
    return train(**given, hook="blocks.1.hook_resid_post,blocks.2.hook_resid_post", out=str(out)).path


@pytest.mark.parametrize("hook", HOOKS)
def test_each_sae_equals_the_one_trained_alone_at_its_hook(together, hook, tmp_path):
    alone = train(**SMALL, hook=hook, out=str(tmp_path), name="alone")
    for arch in ARCHS:
        assert_same(together / "saes" / name_of(arch, hook), alone.path / "saes" / name_of(arch))
    run = json.loads((together / "run.json").read_text())
    own = run["hooks"][hook]
    assert {key: own[key] for key in ("d_in", "scale", "outliers")} == {
        key: alone.info[key] for key in ("d_in", "scale", "outliers")
    }
    assert "hooks" not in alone.info and "hook_name" not in alone.info["saes"][0]
    assert not [name for name, _ in gallery(load_runs([alone.path])) if name.startswith("layers/")]
    assert [figures_of(row) for row in rows_of(together) if row["hook_name"] == hook] == [
        figures_of(row) for row in rows_of(alone.path)
    ]


def test_hooks_leave_out_activations_of_their_own(together):
    hooks = json.loads((together / "run.json").read_text())["hooks"]
    assert len({hooks[hook]["outliers"]["trained"] for hook in HOOKS}) == 3


def test_the_files_of_a_run_say_the_hook_of_each_sae(together):
    run = json.loads((together / "run.json").read_text())
    assert run["settings"]["hook"] == run["hook_name"] == ",".join(HOOKS)
    assert [run["hooks"][hook]["d_in"] for hook in HOOKS] == [512, 256, 256]
    assert {sae["name"]: sae["hook_name"] for sae in run["saes"]} == {
        name_of(arch, hook): hook for hook in HOOKS for arch in ARCHS
    }
    for sae in run["saes"]:
        folder = together / "saes" / sae["name"]
        cfg = load_sae(folder).cfg
        assert (cfg.hook_name, cfg.d_in) == (sae["hook_name"], run["hooks"][sae["hook_name"]]["d_in"])
        card = (folder / "README.md").read_text()
        assert f"for `{cfg.hook_name}` of `speller`" in card and f"(n, {cfg.d_in})" in card
    assert all(row["sae"].endswith(row["hook_name"]) for row in rows_of(together))


def test_an_interrupted_run_resumes_to_the_bits_of_the_unbroken_one(together, tmp_path, interrupted_after):
    with interrupted_after(45):
        train(**SMALL, hook=",".join(HOOKS), out=str(tmp_path), name="cut")
    assert_same_run(together, resume(tmp_path / "cut").path)


def test_passes_and_a_cache_of_activations_change_no_bit_and_serve_runs_at_one_hook(together, tmp_path, capsys):
    given = SMALL | {"hook": ",".join(HOOKS), "activation_cache": str(tmp_path / "cache")}
    budget = sum(make_plan(resolve(given)).memory.values()) / GIB - 1e-6
    run = train(**given, memory_gib=budget, out=str(tmp_path), name="passes")
    assert len(run.info["passes"]) > 1
    assert_same_run(together, run.path)
    capsys.readouterr()
    alone = train(**given | {"hook": HOOKS[1]}, out=str(tmp_path), name="alone")
    assert "0 blocks written" in capsys.readouterr().out
    assert_same(together / "saes" / name_of("topk", HOOKS[1]), alone.path / "saes" / name_of("topk"))


def test_scores_tables_and_report_tell_hooks_apart_and_show_absorption_by_layer(evaluated):
    hooks = [f"blocks.{i}.hook_resid_post" for i in (1, 2)]
    run = json.loads((evaluated / "run.json").read_text())
    assets = [run["hooks"][hook]["eval_assets"]["hash"] for hook in hooks]
    assert len(set(assets)) == 2
    table = pd.read_parquet(evaluated / "absorption.parquet")
    assert {(sae.split("-")[-1], hook) for sae, hook in zip(table["sae"], table["hook_name"], strict=True)} == {
        (hook, hook) for hook in hooks
    }
    charts = dict(gallery(load_runs([evaluated])))
    drawn = charts["layers/full-layer"].table()
    finals = {sae["hook_name"]: sae["final"] for sae in run["saes"]}
    assert [row[2:4] for row in drawn[1]] == [
        [i, finals[f"blocks.{i}.hook_resid_post"]["absorption/mean_full"]] for i in (1, 2)
    ]
    page = (evaluated / "report.html").read_text()
    assert "Full absorption by layer" in page and all(hook in page for hook in hooks)


def test_a_published_run_names_its_hooks_and_a_published_sae_its_own(evaluated):
    whole = publish(evaluated, "someone/several", dry_run=True, force=True)
    hooks = [f"blocks.{i}.hook_resid_post" for i in (1, 2)]
    assert f"`{hooks[0]}` and `{hooks[1]}` of `speller`" in (whole / "README.md").read_text()
    assert set(json.loads((whole / "results.json").read_text())["hooks"]) == set(hooks)
    one = publish(evaluated / "saes" / name_of("topk", hooks[1]), "someone/one", dry_run=True, force=True)
    text = (one / "README.md").read_text()
    assert f"`{hooks[1]}` of `speller`" in text and f"`{hooks[0]}`" not in text


@pytest.fixture
def model(tmp_path) -> list[LanguageModel]:
    """A tiny model as seen from three hooks."""
    hooks = ("blocks.1.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.1.hook_resid_post")
    return load_at_hooks(save_tiny_model(tmp_path / "model"), hooks)


def open_text(lm: LanguageModel, folder: Path):
    text = write(folder / "text.txt", sentences(200))
    return open_tokens(text, lm.tokenizer, context=16, sequences=8, bos_id=lm.bos_id)


def test_one_pass_gives_each_hook_the_bits_of_a_pass_of_its_own(model, monkeypatch):
    tokens = torch.randint(3, 20, (200, 16), generator=torch.Generator().manual_seed(0))
    alone = [lm.activations(tokens) for lm in model]
    passes, forward = [], LanguageModel._forward
    monkeypatch.setattr(LanguageModel, "_forward", lambda self, *given: passes.append(1) or forward(self, *given))
    assert all(map(torch.equal, model[0].activations_at(model, tokens), alone))
    assert len(passes) == -(-200 // 64)


def test_readers_at_paces_of_their_own_share_passes_unless_one_is_too_far_behind(model, tmp_path, monkeypatch):
    stream = open_text(model[0], tmp_path)
    drop = torch.tensor(sorted(model[0].special_ids))
    rows = [next(stream) for _ in range(12)]
    stream = open_text(model[0], tmp_path)
    expected = [[kept_activations(lm, tokens, drop) for tokens in rows] for lm in model]
    passes, forward = [], LanguageModel._forward
    monkeypatch.setattr(LanguageModel, "_forward", lambda self, *given: passes.append(1) or forward(self, *given))
    ahead, beside, behind = Harvest(model, stream, most_waiting=3 * 8 * 15).readers
    for i in range(4):
        assert torch.equal(next(ahead), expected[0][i])
        assert torch.equal(next(beside), expected[1][i])
    assert len(passes) == 4 and len(behind.waiting) <= 4
    for i in range(4, 10):
        assert torch.equal(next(beside), expected[1][i]) and torch.equal(next(ahead), expected[0][i])
    assert len(passes) == 10 and sum(len(x) for x, _ in behind.waiting.values()) < 4 * 8 * 15
    assert all(torch.equal(next(behind), expected[2][i]) for i in range(10))
    assert 10 < len(passes) < 20
    n = len(passes)
    assert torch.equal(next(behind), expected[2][10]) and torch.equal(next(ahead), expected[0][10])
    assert len(passes) == n + 1


def test_buffers_that_share_passes_are_bit_equal_to_one_alone_from_any_position(model, tmp_path):
    alone = [ActivationBuffer(lm, open_text(lm, tmp_path), buffer_tokens=100, batch_tokens=20) for lm in model]
    expected = [[next(buffer) for _ in range(40)] for buffer in alone]
    stream = open_text(model[0], tmp_path)
    readers = Harvest(model, stream, most_waiting=2000).readers
    shared = [
        ActivationBuffer(lm, stream, buffer_tokens=100, batch_tokens=20, reader=reader)
        for lm, reader in zip(model, readers, strict=True)
    ]
    states = {}
    for i in range(40):
        for k, buffer in enumerate(shared):
            states[k, i] = buffer.state_dict()
            assert torch.equal(next(buffer), expected[k][i])
    for k, i in ((0, 13), (2, 7), (1, 13)):
        shared[k].load_state_dict(json.loads(json.dumps(states[k, i])))
    for step in range(5):
        for k, i in ((0, 13), (2, 7), (1, 13)):
            assert torch.equal(next(shared[k]), expected[k][i + step])


def test_a_pattern_names_hooks_in_the_plan_with_memory_and_time_for_all(monkeypatch):
    monkeypatch.setattr(estimate, "matrix_rate", lambda *_: 1e11)
    plan = make_plan(resolve({"hook": "blocks.*.hook_resid_post", "width": 64, "l0": 4}))
    names = [f"blocks.{i}.hook_resid_post" for i in range(4)]
    assert plan.settings.lm.hook == ",".join(names) and [spec.hook for spec in plan.settings.specs] == names
    text = plan.text()
    assert all(f"hook       {name} (d_in 256)" in text and f"-{name}:" in text for name in names)
    deepest = make_plan(resolve({"hook": names[-1], "width": 64, "l0": 4}))
    assert plan.memory["activation buffer"] > 4 * deepest.memory["activation buffer"]
    assert plan.memory["language model"] == deepest.memory["language model"]
    many, one = plan.seconds(), deepest.seconds()
    assert many["training"] > one["training"] and many["looks"] > one["looks"]


def test_a_pattern_that_fits_one_hook_is_a_run_at_that_hook():
    plan = make_plan(resolve({"hook": "blocks.1.mlp.*post", "width": 64, "l0": 4}))
    assert plan.settings.lm.hook == "blocks.1.mlp.hook_post" and plan.settings.specs[0].name == "topk-64-l0_4"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hook": "blocks.*.hook_resid_pst"}, "no hook of speller fits the pattern"),
        ({"hook": "blocks.1.hook_resid_post,blocks.9.hook_resid_post"}, "has no hook 'blocks.9.hook_resid_post'"),
        ({"hook": " , "}, "the list is empty"),
        ({"model": "toy", "hook": "a,b"}, "hook means nothing with the model toy"),
    ],
)
def test_hooks_that_cannot_be_are_refused_in_one_sentence(given, words, capsys):
    flags = [part for key, value in given.items() for part in (f"--{key}", value)]
    assert main([*flags, "--width", "64", "--l0", "4", "--dry-run"]) == 2
    assert words in capsys.readouterr().err


def test_several_hooks_are_refused_where_they_are_not_done(tmp_path):
    settings = resolve({"hook": "blocks.0.hook_resid_post,blocks.1.hook_resid_post"})
    with pytest.raises(UserError, match="are trained by one process, and 2 were started"):
        check_alone(settings, Ranks(0, 2))
    with pytest.raises(UserError, match="are those of one hook, not of a,b"):
        train(activations=torch.randn(3000, 8), hook="a,b", width=64, l0=4, out=str(tmp_path))
    design = tmp_path / "design.yaml"
    design.write_text(
        "hook: [blocks.0.hook_resid_post, blocks.1.hook_resid_post]\ngrids: [{arch: topk, width: 64, l0: [2, 4]}]"
    )
    with pytest.raises(UserError, match="a study is of one"):
        read_design(design, tmp_path)


def test_a_plan_looks_up_words_and_times_the_machine_once_for_all_hooks(monkeypatch):
    calls = []
    for module, name in ((estimate, "matrix_rate"), (estimate.vocab, "entries")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    seconds = make_plan(
        resolve({"hook": "blocks.*.hook_resid_post", "width": 64, "l0": 4, "dtype": "float32"})
    ).seconds()
    assert sorted(calls) == ["entries", "matrix_rate"] and seconds["set-up of the eval"] > 0
