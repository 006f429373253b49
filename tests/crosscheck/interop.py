"""Our SAEs in other libraries and theirs in ours: reconstructions of the same activations, side by side.

    python tests/crosscheck/interop.py --peers-python ENV/bin/python --saebench-python ENV2/bin/python

ENV has sae-lens, eai-sparsify and dictionary-learning; ENV2 has sae-bench. Six SAEs are trained on the embedded model
(some two minutes), published to a hub on the loopback address and read from there, too. Writes docs/interop.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))
ARCHS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka", "gated")
REPO = "me/ours"
GEMMA_SCOPE = {
    "npz": ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    "safetensors": ("google/gemma-scope-2-1b-pt", "resid_post/layer_13_width_16k_l0_medium"),
}
LIMIT = 1e-5


def main() -> int:
    """Return 1 if a reconstruction differs by more than 1e-5 or a decoder is refused, else 0."""
    args = _arguments()
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    from hub_stand_in import TOKEN, Hub

    hub = Hub()
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_HOME"] = str(folder / "home")
        names, assets = _our_saes(folder, args.run)
        _publish_gemma_scope(hub, folder, assets.x.shape[1])
        job = {"side": "peers", "ours": names, "repo": REPO, "gemma_scope": GEMMA_SCOPE}
        peers = _run(args.peers_python, folder, job)
        rows = _compare(folder, peers["saes"])
        bench = _run(args.saebench_python, folder, {"side": "sae-bench", "ours": names})
        scores = _bench_scores(args.saebench_python, folder, names, assets)
    hub.close()
    text = _page(rows, peers["versions"], bench, scores)
    print(text)
    args.out.write_text(text)
    return int(any(row["difference"] > LIMIT for row in rows) or not all(bench["unit_norm"].values()))


def _our_saes(folder: Path, given: Path | None) -> tuple[list[str], Any]:
    """Train, publish to the stand-in, and keep x and our reconstructions."""
    import torch
    from saebench_absorption import load_assets
    from safetensors.torch import save_file

    from sae_train import load_sae, train
    from sae_train.publishing.publish import publish

    path = given or train(arch=",".join(ARCHS), width="1k", l0=8, tokens=300_000, batch_tokens=1024, eval_words=600,
                          absorption_evals=1, out=str(folder), name="run").path  # fmt: skip
    publish(path, REPO, force=True)
    (folder / "ours").symlink_to(path.resolve() / "saes")
    names = sorted(p.name for p in (path / "saes").iterdir())
    assets = load_assets(SimpleNamespace(model="speller", hook=None, cache=None, eval_words=1000))
    x = assets.x[:512].contiguous()
    with torch.no_grad():
        recons = {name: load_sae(REPO, name)(x) for name in names}
    save_file({"x": x}, folder / "x.safetensors")
    save_file(recons, folder / "ours.safetensors")
    return names, assets


def _publish_gemma_scope(hub: Any, folder: Path, d_in: int, d_sae: int = 512) -> None:
    """Files of both Gemma Scope formats with random values, in the stand-in and in a local cache of it."""
    import io

    import numpy as np
    from hub_stand_in import Repo
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    arrays = {name: (rng.normal(size=s) / 16).astype(np.float32) for name, s in shapes.items()}
    arrays["threshold"] = rng.uniform(0, 0.3, d_sae).astype(np.float32)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    second = save({name.replace("W_", "w_"): array for name, array in arrays.items()})
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.13.output"}
    (repo, place), (repo2, place2) = GEMMA_SCOPE.values()
    hub.repos[repo] = Repo(False, [{f"{place}/params.npz": packed.getvalue()}])
    files = {f"{place2}/params.safetensors": second, f"{place2}/config.json": json.dumps(config).encode()}
    hub.repos[repo2] = Repo(False, [files])


def _run(python: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in the other environment and read its answer."""
    job_file, output = folder / "job.json", folder / "answer.json"
    job_file.write_text(json.dumps({**job, "folder": str(folder), "output": str(output), "threads": 1}))
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    words = [python, str(HERE / "interop_peer.py"), str(job_file)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the other side failed:\n{done.stderr[-3000:]}")
    return json.loads(output.read_text())


def _compare(folder: Path, saes: list[list[str]]) -> list[dict[str, Any]]:
    """One row an SAE: the largest difference, as a share of the largest reconstruction."""
    import torch
    from safetensors.torch import load_file

    from sae_train import load_sae

    x, ours = load_file(folder / "x.safetensors")["x"], load_file(folder / "ours.safetensors")
    theirs, rows = load_file(folder / "recons.safetensors"), []
    for key, with_what in saes:
        way, kind, name = key.split("/", 2)
        if kind in ("disk", "hub"):
            recon, form, l0 = ours[name], name, None
        else:
            place = GEMMA_SCOPE[name] if kind == "gemma_scope" else (folder / way / kind / name, None)
            sae = load_sae(*place, allow_pickle=kind == "dictionary_learning")
            form = f"{sae.cfg.architecture}, {sae.cfg.hook_name or '–'}"
            with torch.no_grad():
                recon, l0 = sae(x), (sae.encode(x) != 0).sum(1).double().mean().item()
        difference = ((recon - theirs[key]).abs().max() / theirs[key].abs().max()).item()
        rows.append({"kind": kind, "name": name, "with": with_what, "form": form, "difference": difference, "l0": l0})
    return rows


def _bench_scores(python: str, folder: Path, names: list[str], assets: Any) -> dict[str, Any]:
    """sae-bench's absorption eval of our SAEs, and ours of the same, on the same words, probe and activations."""
    from saebench_absorption import export, export_latents, run_peer, schedules

    from sae_train import load_sae
    from sae_train.evals.absorption import evaluate

    export(folder, assets, "speller")
    paths = {name: str((folder / "ours" / name).resolve()) for name in names}
    for path in paths.values():
        export_latents(folder, path, load_sae(path), assets)
    run = next(run for run in schedules(assets, epochs=1) if run["name"] == "same start")
    answer = run_peer(python, folder, {"saes": list(paths.values()), "runs": [run]}, threads=1)
    theirs = {name: answer["saes"][path]["runs"]["same start"] for name, path in paths.items()}
    ours = {name: evaluate(load_sae(path), assets, "saebench-adam") for name, path in paths.items()}
    return {name: (theirs[name]["mean_fraction"], ours[name].mean_fraction, theirs[name]["mean_full"],
                   ours[name].mean_full) for name in names}  # fmt: skip


def _page(rows: list[dict[str, Any]], versions: dict[str, str], bench: dict[str, Any], scores: dict[str, Any]) -> str:
    from importlib.metadata import version

    own = f"sae-train {version('sae-train')}, torch {version('torch')}"
    theirs = ", ".join(f"{name} {value}" for name, value in versions.items())
    bench_versions = ", ".join(f"{name} {value}" for name, value in bench["versions"].items())
    parts = [
        "# Other libraries' SAEs, and ours in other libraries",
        "Written by `python tests/crosscheck/interop.py --peers-python ENV/bin/python --saebench-python "
        "ENV2/bin/python`, which runs the real packages, each set in an environment of its own.",
        f"Here: {own}. There: {theirs}; {bench_versions}.",
        "Differences are the largest over 512 residual-stream vectors of the embedded model, as a share of the largest "
        f"reconstruction; the bar is {LIMIT:g}.",
        "## Ours, read by SAELens",
        "Trained on the embedded model, published by `sae-train publish` to a stand-in of the hub, and read from the "
        "disk (`SAE.load_from_disk`) and from the repo (`SAE.from_pretrained`).",
        _table(["SAE", "from disk", "from the hub"], _ours(rows)),
        "## Theirs, read by load_sae",
        _table(["layout", "SAE", "written (Gemma Scope: read) by", "read as", "L0", "difference"], _theirs(rows)),
        "dictionary_learning keeps its weights as a pickle, which is read only where `allow_pickle=True` (or "
        "`--allow-pickle`) says so, and then by torch's restricted reader, which takes tensors and runs nothing. No "
        "library writes Gemma Scope's layouts: files of random values were made and read by SAELens and by us.",
        "## sae-bench on ours",
        "Decoder rows pass sae-bench's own check of norms, and its absorption eval runs on all, on 1,000 words: its "
        "ranking probe starts at zero and takes the rows in our order, ours is the preset `saebench-adam`, which "
        "follows it step by step (absorption.md has the whole comparison).",
        _table(["SAE", "norms", "mean fraction, sae-bench", "ours", "mean full, sae-bench", "ours"],
               [[f"`{name}`", "ok" if bench["unit_norm"][name] else "**refused**", *(f"{v:.4f}" for v in values)]
                for name, values in scores.items()]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _ours(rows: list[dict[str, Any]]) -> list[list[str]]:
    by_name = {(row["kind"], row["name"]): row for row in rows}
    names = [row["name"] for row in rows if row["kind"] == "disk"]
    return [[f"`{name}`", _cell(by_name["disk", name]), _cell(by_name["hub", name])] for name in names]


def _theirs(rows: list[dict[str, Any]]) -> list[list[str]]:
    layouts = {"sae-lens": "SAELens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning",
               "gemma_scope": "Gemma Scope"}  # fmt: skip
    return [[layouts[row["kind"]], row["name"], f"`{row['with']}`", row["form"], f"{row['l0']:.1f}", _cell(row)]
            for row in rows if row["kind"] in layouts]  # fmt: skip


def _cell(row: dict[str, Any]) -> str:
    if row["difference"] == 0:
        return "0"
    return f"{row['difference']:.0e}" if row["difference"] <= LIMIT else f"**{row['difference']:.0e}**"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", required=True, help="of an environment with the three other libraries")
    parser.add_argument("--saebench-python", required=True, help="of an environment with sae-bench")
    parser.add_argument("--run", type=Path, help="a finished run on the embedded model, instead of training one")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "interop.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
