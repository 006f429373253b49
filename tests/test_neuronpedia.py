"""Neuronpedia's format: its tables' fields and types, and activations that another computation finds, too.

TABLES says by hand what apps/webapp/prisma/schema.prisma of hijohnnylin/neuronpedia (commit 008d504) declares.
"""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_publish import random_sae

from sae_train import train
from sae_train.cli import main
from sae_train.data.tokens import open_tokens
from sae_train.evals.firing import N_ANY, N_TOP, WINDOW, Firing
from sae_train.evals.latents import from_dense
from sae_train.publishing import neuronpedia
from sae_train.sae.files import save_sae

TEXT, YES, WHOLE, NUMBER, TABLE = str, bool, int, (int, float), dict
SOME_TEXT, MAYBE_TEXT, MAYBE_WHOLE, MAYBE_NUMBER = (
    str,
    (str, type(None)),
    (int, type(None)),
    (int, float, type(None)),
)
LISTS = {"texts": str, "numbers": (int, float), "wholes": int}
TABLES = {
    "release": {
        "name": TEXT, "visibility": TEXT, "isNewUi": YES, "featured": YES, "description": TEXT,
        "descriptionShort": MAYBE_TEXT, "urls": "texts", "creatorEmail": MAYBE_TEXT, "creatorName": TEXT,
        "creatorNameShort": MAYBE_TEXT, "creatorId": TEXT, "defaultSourceSetName": MAYBE_TEXT,
        "defaultSourceId": MAYBE_TEXT, "defaultUmapSourceIds": "texts",
    },
    "model": {
        "id": TEXT, "displayNameShort": TEXT, "displayName": TEXT, "creatorId": TEXT, "tlensId": MAYBE_TEXT,
        "openRouterId": MAYBE_TEXT, "dimension": MAYBE_WHOLE, "thinking": YES, "visibility": TEXT,
        "defaultSourceSetName": MAYBE_TEXT, "defaultSourceId": MAYBE_TEXT, "inferenceEnabled": YES, "instruct": YES,
        "layers": WHOLE, "neuronsPerLayer": WHOLE, "owner": TEXT, "website": MAYBE_TEXT,
    },
    "sourceset": {
        "modelId": TEXT, "name": TEXT, "hasDashboards": YES, "allowInferenceSearch": YES, "visibility": TEXT,
        "description": TEXT, "type": TEXT, "creatorName": TEXT, "urls": "texts", "creatorEmail": MAYBE_TEXT,
        "creatorId": TEXT, "releaseName": MAYBE_TEXT, "hasGraphs": YES, "graphEnabled": YES, "defaultRange": WHOLE,
        "defaultShowBreaks": YES, "showDfa": YES, "showCorrelated": YES, "showHeadAttribution": YES, "showUmap": YES,
    },
    "source": {
        "id": TEXT, "modelId": TEXT, "hasDashboards": YES, "inferenceEnabled": YES, "saelensConfig": TABLE,
        "saelensRelease": MAYBE_TEXT, "saelensSaeId": MAYBE_TEXT, "hfRepoId": MAYBE_TEXT, "hfFolderId": MAYBE_TEXT,
        "visibility": TEXT, "setName": TEXT, "creatorId": TEXT, "hasUmap": YES, "num_prompts": MAYBE_WHOLE,
        "num_tokens_in_prompt": MAYBE_WHOLE, "dataset": MAYBE_TEXT, "notes": MAYBE_TEXT,
    },
    "features": {
        "modelId": TEXT, "layer": TEXT, "index": TEXT, "sourceSetName": MAYBE_TEXT, "creatorId": MAYBE_TEXT,
        "maxActApprox": MAYBE_NUMBER, "hasVector": YES, "vector": "numbers", "hookName": MAYBE_TEXT,
        "topkCosSimIndices": "wholes", "topkCosSimValues": "numbers", "neg_str": "texts", "neg_values": "numbers",
        "pos_str": "texts", "pos_values": "numbers", "frac_nonzero": NUMBER, "freq_hist_data_bar_heights": "numbers",
        "freq_hist_data_bar_values": "numbers", "logits_hist_data_bar_heights": "numbers",
        "logits_hist_data_bar_values": "numbers", "decoder_weights_dist": "numbers",
    },
    "activations": {
        "id": TEXT, "tokens": "texts", "dataIndex": MAYBE_TEXT, "index": TEXT, "layer": TEXT, "modelId": TEXT,
        "dataSource": MAYBE_TEXT, "maxValue": NUMBER, "maxValueTokenIndex": WHOLE, "minValue": NUMBER,
        "values": "numbers", "creatorId": TEXT, "lossValues": "numbers", "binMin": MAYBE_NUMBER,
        "binMax": MAYBE_NUMBER, "binContains": MAYBE_NUMBER, "qualifyingTokenIndex": MAYBE_WHOLE,
    },
    "explanations": {
        "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "description": TEXT, "authorId": TEXT,
        "typeName": MAYBE_TEXT, "explanationModelName": MAYBE_TEXT, "notes": MAYBE_TEXT, "scoreV1": NUMBER,
    },
}  # fmt: skip
# Fields without a default, neither in the table nor, for rows that Prisma writes, in the schema.
NEEDED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features": {"modelId", "layer", "index"},
    "activations": {"id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue",
                    "values", "creatorId"},
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
}  # fmt: skip
RUN = {
    "width": 256, "l0": 8, "tokens": 13_000, "batch_tokens": 128, "held_out_tokens": 1024, "buffer_tokens": 2048,
    "absorption": False, "absorption_evals": 1, "device": "cpu",
}  # fmt: skip
ROLES = {"density": 0.1, "max": 2.0, "histogram": [], "examples": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on the embedded model, of which one latent is known to do something."""
    made = train(**RUN, arch="topk,relu", out=tmp_path_factory.mktemp("runs"), name="tiny").path
    known = [{"latent": 3, "main_of": ["A"], "absorbs": []}, {"latent": 4, "main_of": [], "absorbs": ["axe", "ant"]}]
    (made / "latents").mkdir(exist_ok=True)
    lines = "".join(json.dumps(ROLES | each) + "\n" for each in known)
    (made / "latents" / "topk-256-l0_8.jsonl").write_text(lines + '{"latent": "x"}\n')
    return made


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main(["export-neuronpedia", str(run), "--tokens", "9k", "--repo", "me/tiny-saes", "--out", str(out)]) == 0
    return out / "speller"


def rows_of(folder: Path) -> list[dict]:
    """All rows of a packed table, as what imports them reads it: with the columns of each file's first line."""
    rows = []
    for path in sorted(folder.iterdir()):
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        assert lines and all(line.keys() == lines[0].keys() for line in lines), path
        rows += lines
    return rows


def violations(table: str, row: dict) -> list[str]:
    fields = TABLES[table]
    bad = [*(row.keys() - fields.keys()), *(NEEDED[table] - row.keys())]
    return bad + [name for name, value in row.items() if name in fields and not _is(value, fields[name])]


def _is(value, kind) -> bool:
    if kind in LISTS:
        return isinstance(value, list) and all(_is(each, LISTS[kind]) for each in value)
    return isinstance(value, kind) and (kind is YES or not isinstance(value, bool))


def test_every_file_is_as_neuronpedia_s_tables_ask(exported):
    folders = sorted(exported.iterdir())
    assert [f.name for f in folders] == ["1-tiny-saes-res-relu-256-l0-8", "1-tiny-saes-res-topk-256-l0-8"]
    for folder in folders:
        records = {}
        for table in ("release", "model", "sourceset", "source"):
            (line,) = (folder / f"{table}.jsonl").read_text().splitlines()
            records[table] = json.loads(line)
            assert violations(table, records[table]) == []
        source = records["source"]
        assert source["id"] == folder.name == f"1-{records['sourceset']['name']}"
        assert source["setName"] == records["sourceset"]["name"]
        assert records["sourceset"]["releaseName"] == records["release"]["name"] == "tiny-saes"
        assert {source["modelId"], records["sourceset"]["modelId"]} == {records["model"]["id"]} == {"speller"}
        assert (source["hfRepoId"], records["release"]["creatorName"]) == ("me/tiny-saes", "me")
        for table in ("features", "activations"):
            rows = rows_of(folder / table)
            assert not [bad for row in rows for bad in violations(table, row)]
            assert {(row["modelId"], row["layer"]) for row in rows} == {("speller", folder.name)}
        assert [row["index"] for row in rows_of(folder / "features")] == [str(i) for i in range(256)]
        ids = [row["id"] for row in rows_of(folder / "activations")]
        assert len(set(ids)) == len(ids)


def test_a_row_that_does_not_fit_is_noticed():
    row = {"id": "c", "modelId": "m", "layer": "l", "index": "1", "description": "x", "authorId": "a"}
    assert violations("explanations", row) == []
    assert violations("explanations", row | {"index": 1}) and violations("explanations", row | {"other": 1})
    assert violations("explanations", {"id": "c"})


def test_what_the_eval_found_is_an_explanation(exported):
    rows = rows_of(exported / "1-tiny-saes-res-topk-256-l0-8" / "explanations")
    assert not [bad for row in rows for bad in violations("explanations", row)]
    assert [(row["index"], row["description"].split(" (")[0]) for row in rows] == [
        ("3", "main latent of A"),
        ("4", "absorbs axe, ant"),
    ]
    assert not (exported / "1-tiny-saes-res-relu-256-l0-8" / "explanations").exists(), "no file is empty"


@torch.no_grad()
def latents_by_hand(run: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, context) and latents (rows, context, d_sae), by transformers and the SAE's formula."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    info = json.loads((run / "run.json").read_text())
    place = Path(__file__).parents[1] / "checkpoints" / "speller"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place).float().eval(), AutoTokenizer.from_pretrained(place)
    context = info["context"]
    stream = open_tokens("generated", tokenizer, context=context, sequences=4096 // context,
                         bos_id=tokenizer.bos_token_id, held_out_tokens=1024)  # fmt: skip
    tokens = torch.cat([next(stream), next(stream), next(stream)])[: -(-9000 // context)]
    caught = []
    layer = int(info["hook_name"].split(".")[1])
    hook = model.model.layers[layer].register_forward_hook(
        lambda _module, _given, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    model(tokens)
    hook.remove()
    x = caught[0]
    w = load_file(run / "saes" / name / "sae_weights.safetensors")
    latents = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    if name.startswith("topk"):
        smallest = latents.topk(8, dim=-1).values[..., -1:]
        latents = latents * (latents >= smallest)
    special = set(tokenizer.all_special_ids) | set(tokenizer.convert_tokens_to_ids(info["settings"]["drop"]))
    seen = ~torch.isin(tokens, torch.tensor(sorted(special)))
    if info["outliers"]:
        seen &= x.norm(dim=-1) <= info["outliers"]["median_norm"] * info["settings"]["outlier_norm"]
    return tokens, latents * seen[..., None]


@pytest.mark.parametrize("arch", ["topk", "relu"])
def test_ten_latents_fire_the_most_where_plain_pytorch_finds_it(arch, run, exported):
    name, folder = f"{arch}-256-l0_8", exported / f"1-tiny-saes-res-{arch}-256-l0-8"
    tokens, latents = latents_by_hand(run, name)
    n_seen = json.loads((folder / "source.jsonl").read_text())["num_prompts"]
    assert n_seen == len(tokens)
    features, rows = rows_of(folder / "features"), rows_of(folder / "activations")
    busiest = (latents > 0).sum((0, 1)).argsort(descending=True)[torch.linspace(0, 120, 10).long()].tolist()
    for latent in busiest:
        own = latents[..., latent]
        peaks = own.amax(1)
        expected = peaks[peaks > 0].sort(descending=True).values[:N_TOP]
        top = [row for row in rows if row["index"] == str(latent) and row["binContains"] == -1]
        torch.testing.assert_close(torch.tensor([row["maxValue"] for row in top]), expected, rtol=2e-4, atol=2e-4)
        for row in top:
            there, place = int(row["dataIndex"]), row["maxValueTokenIndex"]
            assert len(row["tokens"]) == len(row["values"]) == min(tokens.shape[1], WINDOW)
            torch.testing.assert_close(torch.tensor(row["values"]), own[there], rtol=2e-4, atol=2e-4)
            assert row["values"][place] == row["maxValue"] == max(row["values"])
        feature = features[latent]
        assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(int((own > 0).sum()), abs=2)
        assert feature["maxActApprox"] == pytest.approx(float(own.max()), rel=2e-4)
        others = [row for row in rows if row["index"] == str(latent) and row["binContains"] != -1]
        assert len(others) <= N_ANY and all(row["binMin"] <= row["maxValue"] <= row["binMax"] for row in others)
        assert all(0 < row["binContains"] <= 1 for row in others)
        assert len(feature["pos_str"]) == 10 and feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
        assert feature["neg_values"] == sorted(feature["neg_values"]) and feature["neg_values"][0] < 0


def test_an_export_that_was_interrupted_goes_on_and_a_finished_one_stays(run, tmp_path, monkeypatch, capsys):
    write, calls, command = neuronpedia._write_rows, [], ["export-neuronpedia", str(run), "--tokens", "4k"]
    command += ["--out", str(tmp_path)]

    def until_interrupted(rows):
        yield next(rows)
        raise KeyboardInterrupt

    def break_off(path, rows):
        calls.append(path)
        write(path, until_interrupted(rows) if len(calls) == 5 else rows)

    monkeypatch.setattr(neuronpedia, "_write_rows", break_off)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    assert "relu" in str(calls[4]) and calls[4].parent.name == "activations" and not calls[4].exists()
    monkeypatch.undo()
    done = sorted(path.parent.name for path in tmp_path.rglob("source.jsonl"))
    assert len(done) == 1 and not list(tmp_path.rglob("*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "speller" / done[0]).rglob("*.gz")}
    assert main(command) == 0
    assert "1 of 2 sources are written already" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("source.jsonl"))) == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert main(command) == 0 and "nothing is left" in capsys.readouterr().out


def test_a_dry_run_says_how_much_and_how_long_and_writes_nothing(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export-neuronpedia", str(run), "--tokens", "1m", "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "tokens in" in said and "in one pass for 2 SAEs" in said and "s of reading" in said and "GiB" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--tokens", "few"], "--tokens"), (["--tokens", "-3"], "--tokens"), (["--repo", "alone"], "you/name"),
     (["--model-id", "A b"], "--model-id")],
)  # fmt: skip
def test_flags_that_mean_nothing_are_one_sentence(flags, words, run, tmp_path, capsys):
    assert main(["export-neuronpedia", str(run), "--out", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_what_has_no_text_is_refused_in_one_sentence(tmp_path, capsys):
    save_sae(random_sae("topk", "org/lm"), tmp_path / "alone")
    toy = train(model="toy", width=32, l0=3, tokens=6400, batch_tokens=64, held_out_tokens=512, absorption=False,
                absorption_evals=1, device="cpu", out=tmp_path).path  # fmt: skip
    for folder, words in ((tmp_path / "alone", "no run's folder"), (toy, "no language model"), (tmp_path / "x", "x")):
        capsys.readouterr()
        assert main(["export-neuronpedia", str(folder)]) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(("context", "scale"), [(16, 1.0), (300, 1e4), (128, 1e-3)])
def test_what_is_kept_of_a_text_in_parts_is_what_the_whole_of_it_gives(context, scale):
    """Against dense latents of all rows; values grow, so that bins are doubled again and again."""
    g = torch.Generator().manual_seed(context)
    rows, d_sae = 120, 7
    tokens = torch.randint(50, (rows, context), generator=g)
    seen = torch.rand(rows, context, generator=g) < 0.9
    growing = torch.logspace(-2, 2, rows)[:, None, None] * scale
    latents = (
        growing
        * torch.rand(rows, context, d_sae, generator=g)
        * (torch.rand(rows, context, d_sae, generator=g) < torch.tensor([0, 0.001, 0.01, 0.05, 0.1, 0.3, 0.9]))
    )
    latents = latents * seen[..., None]
    firing = Firing(d_sae, context)
    for part in torch.arange(rows).split(25):
        firing.add(tokens[part], seen[part], from_dense(latents[part][seen[part]]))
    assert firing.n_rows == rows and firing.n_tokens == int(seen.sum())
    fired = (latents > 0).sum((0, 1))
    assert torch.equal(firing.counts, fired)
    for latent in range(d_sae):
        own = latents[..., latent]
        heights, middles = firing.bars(latent)
        assert sum(heights) == int(fired[latent])
        if heights:
            width = 2 * middles[0]
            assert heights[-1] and (len(heights) - 1) * width < float(own.max()) <= len(heights) * width * (1 + 1e-6)
            edges = torch.arange(len(heights) + 1) * width
            counted = [int(((own > low) & (own <= high)).sum()) for low, high in pairwise(edges)]
            assert heights == counted
        contexts = list(firing.contexts(latent))
        top = [each for each in contexts if each.interval is None]
        peaks = own.amax(1).sort(descending=True).values[: len(top)]
        assert len(top) == min(N_TOP, int((own.amax(1) > 0).sum()))
        assert [max(each.values) for each in top] == peaks.tolist()
        assert len({each.row for each in contexts}) == len(contexts)
        for each in contexts:
            start = int(own[each.row].argmax()) - each.place
            assert each.tokens == tokens[each.row, start : start + min(context, WINDOW)].tolist()
            assert each.values == own[each.row, start : start + min(context, WINDOW)].tolist()
