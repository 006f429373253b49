"""Quality beside SAELens at the same L0, width, tokens and text: relu, topk and jumprelu SAEs of three seeds from both
trainers; explained variance, loss recovered and silent latents on the same held-out text go to a CSV and a table.

    python benchmarks/quality.py --peer-python ENV/bin/python

ENV is an environment with sae-lens. SAELens gets our token rows, its own defaults otherwise, inputs scaled to norm √d
("expected_average_only_in"), our warm-up and decay, and two learning rates of which each architecture takes the better.
Its relu and jumprelu have no L0 to ask for: each is trained with a ladder of coefficients, and its figures are read off
at our SAE's L0 by interpolation on log L0. Every SAE of SAELens is loaded by load_sae and measured by our code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.csv"
ARCHITECTURES = ("relu", "topk", "jumprelu")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
LADDERS = {"relu": (0.5, 1.0, 2.0, 4.0), "jumprelu": (0.05, 0.15, 0.5, 1.5)}
FIGURES = ("ev", "loss_recovered", "silent")
HOOK_BLOCK = 1


def main() -> None:
    args = _arguments()
    if args.saelens_job:
        saelens(json.loads(args.saelens_job.read_text()))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import pandas as pd
    import torch

    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([*ours(args), *theirs(args)])
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.5g")
    print(compare(table))


def ours(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Our SAEs, from one command."""
    from sae_train.run import Run, train

    folder = args.runs / "ours"
    if not (folder / "run.json").exists():
        train(
            name="ours", out=str(args.runs), arch=list(ARCHITECTURES), width=args.width, l0=args.l0,
            seed=list(range(args.seeds)), tokens=args.tokens, absorption=False,
        )  # fmt: skip
    measure = _measure(args)
    return [
        {"side": "sae-train", "arch": sae["arch"], "seed": sae["seed"], "lr": None, "coefficient": None}
        | measure(folder / "saes" / sae["name"])
        for sae in Run(folder).info["saes"]
    ]


def theirs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """SAELens' SAEs, a process for each seed and learning rate, measured as ours are."""
    measure, rows = _measure(args), []
    for seed in range(args.seeds):
        for lr in LEARNING_RATES:
            folder = args.runs / f"saelens-{seed}-{lr:g}"
            if not (folder / "done").exists():
                _train_theirs(args, folder, seed, lr)
            for path in sorted((folder / "saes").iterdir()):
                arch, coefficient = path.name.split("-")
                row = {"side": "SAELens", "arch": arch, "seed": seed, "lr": lr, "coefficient": float(coefficient)}
                rows.append(row | measure(path))
    return rows


def _measure(args: argparse.Namespace) -> Any:
    """From an SAE's folder to its held-out figures, on the activations and tokens that none of them was trained on."""
    from sae_train import load_sae
    from sae_train.evals import fidelity
    from sae_train.metrics import held_out_metrics

    opened = _open(args)
    data = fidelity.FidelityData.build(opened.model, opened.stream.held_out[:64], opened.drop_ids)

    def measure(folder: Path) -> dict[str, float]:
        sae = load_sae(folder)
        found = held_out_metrics(sae, opened.held_out)
        recovered = fidelity.loss_recovered(opened.model, sae, data)["metrics/ce_loss_score"]
        return {
            "l0": found["metrics/l0"], "ev": found["metrics/explained_variance"], "loss_recovered": recovered,
            "silent": float((found["density"] == 0).float().mean()),
        }  # fmt: skip

    return measure


def _open(args: argparse.Namespace) -> Any:
    from sae_train.config import resolve
    from sae_train.session import open_session

    return open_session(resolve({"width": args.width, "l0": args.l0, "tokens": args.tokens, "device": "cpu"}))


def _train_theirs(args: argparse.Namespace, folder: Path, seed: int, lr: float) -> None:
    """Write our token rows and let one process of the peer train on them."""
    import torch
    from safetensors.torch import save_file

    opened = _open(args)
    settings, kept, rows = opened.settings, 0, []
    while kept < settings.train.tokens + 2**17:
        rows.append(next(opened.stream))
        kept += rows[-1].numel() // 2  # special and dropped tokens do not count
    steps = settings.n_steps
    with tempfile.TemporaryDirectory() as temporary:
        job = {
            "rows": f"{temporary}/rows.safetensors", "out": str(folder), "model": str(ROOT / "checkpoints" / "speller"),
            "d_in": opened.model.d_in, "context": opened.stream.context, "tokens": steps * settings.train.batch_tokens,
            "batch": settings.train.batch_tokens, "buffer": settings.data.buffer_tokens, "seed": seed, "lr": lr,
            "warm_up": round(settings.train.lr_warm_up * steps), "decay": round(settings.train.lr_decay * steps),
            "drop": sorted({*opened.model.special_ids, *opened.drop_ids}), "width": settings.specs[0].width,
            "l0": args.l0, "threads": args.threads,
        }  # fmt: skip
        save_file({"rows": torch.cat(rows)}, job["rows"])
        path = Path(temporary) / "job.json"
        path.write_text(json.dumps(job))
        done = subprocess.run([args.peer_python, __file__, "--saelens-job", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"SAELens failed:\n{done.stderr[-3000:]}")
    (folder / "done").touch()


def saelens(job: dict[str, Any]) -> None:
    """The peer's side: one runner for all its SAEs of a seed and learning rate."""
    import torch

    torch.set_num_threads(job["threads"])
    from datasets import Dataset
    from sae_lens import (
        JumpReLUTrainingSAEConfig,
        LoggingConfig,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
    )
    from sae_lens.load_model import load_model
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from safetensors.torch import load_file

    torch.manual_seed(job["seed"])
    lm = load_model(
        "AutoModelForCausalLM", job["model"], device="cpu", model_from_pretrained_kwargs={"dtype": "float32"}
    )
    lm.model.model.layers = lm.model.model.layers[: HOOK_BLOCK + 1]
    lm.model.lm_head = torch.nn.Identity()
    size = {"d_in": job["d_in"], "d_sae": job["width"], "normalize_activations": "expected_average_only_in"}
    saes: dict[str, Any] = {"topk-0": TopKTrainingSAEConfig(k=job["l0"], **size)}
    for value in LADDERS["relu"]:
        config = StandardTrainingSAEConfig(l1_coefficient=value, l1_warm_up_steps=job["warm_up"], **size)
        saes[f"relu-{value}"] = config
    for value in LADDERS["jumprelu"]:
        config = JumpReLUTrainingSAEConfig(l0_coefficient=value, l0_warm_up_steps=job["warm_up"], **size)
        saes[f"jumprelu-{value}"] = config
    config = MultiSAETrainingRunnerConfig(
        saes=saes, hook_names=f"model.layers.{HOOK_BLOCK}", model_name=job["model"],
        model_class_name="AutoModelForCausalLM", context_size=job["context"], training_tokens=job["tokens"],
        train_batch_size_tokens=job["batch"], store_batch_size_prompts=4096 // job["context"], prepend_bos=False,
        n_batches_in_buffer=job["buffer"] // job["context"], lr=job["lr"], lr_end=0.0, seed=job["seed"],
        lr_warm_up_steps=job["warm_up"], lr_decay_steps=job["decay"], exclude_special_tokens=job["drop"],
        logger=LoggingConfig(log_to_wandb=False), output_path=None, checkpoint_path=None,
    )  # fmt: skip
    rows = Dataset.from_dict({"tokens": load_file(job["rows"])["rows"].tolist()})
    trained = MultiSAETrainingRunner(config, override_dataset=rows, override_model=lm).run()
    for name, sae in trained.items():
        sae.save_inference_model(f"{job['out']}/saes/{name}")


def compare(table: Any) -> str:
    """A row an architecture and figure: mean over seeds of both sides at our L0, and the range of the differences."""
    out = ["| | L0 | | sae-train | SAELens | difference, by seed |", "|---|---|---|---|---|---|"]
    mine, peers = (table[table["side"] == side] for side in ("sae-train", "SAELens"))
    for arch in ARCHITECTURES:
        own = mine[mine["arch"] == arch].set_index("seed")
        by_lr = {lr: _at(peers[(peers["arch"] == arch) & (peers["lr"] == lr)], own["l0"]) for lr in LEARNING_RATES}
        by_lr = {lr: found for lr, found in by_lr.items() if found is not None}
        lr = max(by_lr, key=lambda lr: by_lr[lr]["ev"].mean())
        for figure in FIGURES:
            a, b = own[figure], by_lr[lr][figure]
            gaps = " ".join(f"{gap:+.4f}" for gap in a - b)
            out.append(
                f"| {arch} (SAELens lr {lr:g}) | {own['l0'].mean():.1f} | {figure} | {a.mean():.4f} | {b.mean():.4f} "
                f"| {gaps} |"
            )
    return "\n".join(out)


def _at(rows: Any, l0: Any) -> Any:
    """Figures by seed at l0[seed], interpolated on log L0; None where some seed's SAEs do not span it."""
    import pandas as pd

    found = {}
    for seed, target in l0.items():
        ladder = rows[rows["seed"] == seed].sort_values("l0").to_dict("records")
        if len(ladder) == 1:
            found[seed] = {figure: ladder[0][figure] for figure in FIGURES}
            continue
        span = [(a, b) for a, b in pairwise(ladder) if 0 < a["l0"] <= target <= b["l0"]]
        if not span:
            return None
        a, b = span[0]
        share = math.log(target / a["l0"]) / math.log(b["l0"] / a["l0"])
        found[seed] = {figure: a[figure] + share * (b[figure] - a[figure]) for figure in FIGURES}
    return pd.DataFrame(found).T


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with sae-lens")
    parser.add_argument("--runs", type=Path, default=ROOT / "checkpoints" / "quality", help="where SAEs are kept")
    parser.add_argument("--width", default="1k")
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--saelens-job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
