"""Check our absorption eval against the real sae-bench 0.6.0 on the same words, split, probe and SAE: main latents,
full flags and means, in a table.

    python tests/crosscheck/saebench_absorption.py --peer-python ENV/bin/python [--model speller] SAE_FOLDER ...
    python tests/crosscheck/saebench_absorption.py --peer-python ENV/bin/python --letters-model

ENV is an environment of its own with sae-bench; without the package the check is skipped. --letters-model makes a small
GPT-2 with readable first letters, trains three SAEs on it and checks those. Per SAE:
  noise floor   sae-bench against itself, same schedule, other seeds of its L1 probe
  same start    sae-bench, its L1 probe started at zero and fed our row order, against preset saebench-adam
  converged     sae-bench, its L1 probe trained on until it stands still, against preset saebench
In the last two its logistic regressions stop at a gradient of 1e-10, with --as-shipped at scikit-learn's own 1e-4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "saebench_crosscheck.json"
# Adam moves a weight by at most the sum of its rates, and sae-bench's own end before a bias of −7 is reached.
CONVERGING = {"lr": 0.3, "end_lr": 3e-5}
MIN_SAME_FULL, MAX_MEAN_DIFFERENCE, MAX_LATENT_DIFFERENCE = 0.995, 0.005, 1e-5


def main() -> int:
    """Return 1 if a row misses the bar, else 0."""
    args = _arguments()
    if not has_peer(args.peer_python):
        print(f"skipped: {args.peer_python} has no sae-bench (this check needs an environment with it).")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.letters_model:
            import letters_model

            args.model, args.saes = letters_model.make(folder, ROOT.parent / "shared" / "data")
        rows, answer = _check(args, folder)
    print(table(rows))
    _save(args.out, rows, answer, "letters model" if args.letters_model else args.model)
    return int(any(row["passed"] is False for row in rows) or not _schema_as_expected(answer["schema_errors"]))


def _check(args: argparse.Namespace, folder: Path) -> tuple[list[dict], dict]:
    assets = load_assets(args)
    export(folder, assets, args.model)
    saes = {str(Path(path).resolve()): _our_side(path, assets, folder) for path in args.saes}
    job = {
        "saes": list(saes),
        "runs": schedules(assets, args.epochs, args.as_shipped),
        "validate": _validated(saes, folder),
    }
    answer = run_peer(args.peer_python, folder, job, threads=1)
    rows = [row for path in saes for row in _compare(Path(path).name, saes[path], answer["saes"][path], folder)]
    return rows, answer


def load_assets(args: argparse.Namespace) -> Any:
    from sae_train.data.language_model import load_language_model
    from sae_train.evals import assets

    lm = load_language_model(args.model, args.hook)
    return assets.build(lm, cache_dir=args.cache, n_words=args.eval_words, contexts="each")


def export(folder: Path, assets: Any, model: str) -> None:
    """Write what the other side needs."""
    from safetensors.torch import save_file

    train, test = (~assets.is_test).nonzero().squeeze(1), assets.is_test.nonzero().squeeze(1)
    tensors = {
        "x_train": assets.x[train], "y_train": assets.labels[train], "x_test": assets.x[test],
        "y_test": assets.labels[test], "tp_x": assets.tp_x, "probe_weight": assets.probe_weight.T,
        "probe_bias": assets.probe_bias, "tp_tokens": assets.tp_tokens.clamp(min=0),
    }  # fmt: skip
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "inputs.safetensors")
    words = {
        "train_words": [assets.words[r] for r in train], "test_words": [assets.words[r] for r in test],
        "tp_words": [assets.words[r] for r in assets.tp_rows], "model_name": Path(model).name,
        "layer": int(assets.settings["hook_name"].split(".")[1]),
    }  # fmt: skip
    (folder / "words.json").write_text(json.dumps(words))


def _our_side(path: str, assets: Any, folder: Path) -> dict[str, Any]:
    """Our two results of one SAE; our latents and our JSON go into the folder."""
    import torch

    from sae_train.evals.absorption import evaluate
    from sae_train.evals.latents import encode
    from sae_train.sae.files import load_sae

    sae, train = load_sae(path), ~assets.is_test
    export_latents(folder, path, sae, assets)
    with torch.no_grad():
        train_latents = encode(sae, assets.x[train])
    results = {preset: evaluate(sae, assets, preset) for preset in ("saebench", "saebench-adam")}
    for preset, result in results.items():
        (folder / f"ours-{preset}-{Path(path).name}.json").write_text(json.dumps(result.to_saebench_json()))
    return {**results, "train": (train_latents, assets.labels[train])}


def export_latents(folder: Path, path: str, sae: Any, assets: Any) -> None:
    """Our latents of the true positives: the other side compares its own with them."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        save_file({"latents": sae.encode(assets.tp_x)}, folder / f"latents-{Path(path).name}.safetensors")


def schedules(assets: Any, epochs: int, as_shipped: bool = False) -> list[dict[str, Any]]:
    """What sae-bench is asked to do for each SAE; its converged run takes so many full-batch steps."""
    from sae_train.evals.presets import get_preset
    from sae_train.evals.probes import ranking_schedule

    p, n = get_preset("saebench-adam"), int((~assets.is_test).sum())
    s = ranking_schedule(n, epochs=p.l1_epochs, max_batch=p.l1_max_batch, min_steps=p.l1_min_steps, lr=p.l1_lr,
                         end_lr=p.l1_end_lr, weight_decay=p.l1_weight_decay)  # fmt: skip
    same = {"batch": s.batch, "epochs": s.epochs}
    floor = [{"name": f"seed {seed}", "seed": seed, **same} for seed in (1, 2, 3)]
    exact = {"seed": 0, "tolerance": 0 if as_shipped else 1e-10}
    start = {"name": "same start", "start": "zero", "order": "ours", **same, **exact}
    long = {"name": "converged", "order": "full", "batch": n, "epochs": epochs, **CONVERGING, **exact}
    return [*floor, start, {**long, "keep_weights": True}]


def _validated(saes: dict[str, Any], folder: Path) -> list[str]:
    """Our result files, and one of a result that is not valid."""
    from dataclasses import replace

    some = next(iter(saes.values()))["saebench"]
    broken = folder / "ours-invalid.json"
    invalid = replace(some, valid=False, reason="made invalid to be checked")
    broken.write_text(json.dumps(invalid.to_saebench_json()))
    return [str(path) for path in sorted(folder.glob("ours-*.json"))]


def _schema_as_expected(errors: dict[str, str]) -> bool:
    """Whether sae-bench reads every valid result, and refuses the one that is not for its six means alone."""
    invalid = next(error for path, error in errors.items() if path.endswith("ours-invalid.json"))
    return sum(map(bool, errors.values())) == 1 and invalid.startswith("6 validation errors")


def has_peer(python: str) -> bool:
    find = "import importlib.util as u, sys; sys.exit(u.find_spec('sae_bench') is None)"
    return subprocess.run([python, "-c", find], capture_output=True).returncode == 0


def run_peer(python: str, folder: Path, job: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run a job in sae-bench's environment and read its answer."""
    output, job_file = folder / "answer.json", folder / "job.json"
    job_file.write_text(json.dumps({**job, "folder": str(folder), "output": str(output), "threads": threads}))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([python, str(HERE / "saebench_peer.py"), str(job_file)], env=env, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the sae-bench side failed:\n{done.stderr[-3000:]}")
    return json.loads(output.read_text())


def _compare(name: str, ours: dict[str, Any], theirs: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    runs = theirs["runs"]
    latents = {"latents_difference": theirs["latents_difference"]}
    seeds = [as_scores(runs[f"seed {s}"]) for s in (1, 2, 3)]
    floor = [difference(a, b) for a, b in itertools.combinations(seeds, 2)]
    adam = difference(our_scores(ours["saebench-adam"]), as_scores(runs["same start"]))
    exact = difference(our_scores(ours["saebench"]), as_scores(runs["converged"]))
    exact["objective_excess"] = _objective_excess(ours["train"], folder / f"weights-{name}.safetensors")
    return [
        {"sae": name, "what": "noise floor", **_widest(floor), "passed": None},
        {"sae": name, "what": "same start", **adam, **latents, "passed": _passes(adam, theirs)},
        {"sae": name, "what": "converged", **exact, **latents, "passed": _passes(exact, theirs)},
    ]


def our_scores(result: Any) -> dict[str, Any]:
    words = zip(result.words["word"], result.words["fraction"], result.words["full"], strict=True)
    counting = result.by_letter[result.by_letter["counts"]]
    return {
        "main": {r.letter.lower(): set(r.main_latents) for r in counting.itertuples()},
        "words": {word: (float(fraction), bool(full)) for word, fraction, full in words},
        "mean_fraction": result.mean_fraction, "mean_full": result.mean_full,
    }  # fmt: skip


def as_scores(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "main": {letter: set(run["main"][letter]) for letter in run["letters"]}}


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How two sides differ; every word and letter of either side is counted."""
    words, letters = a["words"].keys() | b["words"].keys(), a["main"].keys() | b["main"].keys()
    shared = a["words"].keys() & b["words"].keys()
    return {
        "n_letters": len(letters), "same_main": sum(a["main"].get(c) == b["main"].get(c) for c in letters),
        "n_words": len(words), "same_full": sum(a["words"][w][1] == b["words"][w][1] for w in shared) / len(words),
        "word_fraction": max(abs(a["words"][w][0] - b["words"][w][0]) for w in shared),
        "mean_fraction": abs(a["mean_fraction"] - b["mean_fraction"]),
        "mean_full": abs(a["mean_full"] - b["mean_full"]),
        "fractions": [a["mean_fraction"], b["mean_fraction"]], "fulls": [a["mean_full"], b["mean_full"]],
        "letters_that_differ": sorted(c for c in letters if a["main"].get(c) != b["main"].get(c)),
    }  # fmt: skip


def _widest(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The pair of seeds that agrees least, figure by figure."""
    least, most = ("same_main", "same_full"), ("word_fraction", "mean_fraction", "mean_full")
    worst = {k: min(p[k] for p in pairs) for k in least} | {k: max(p[k] for p in pairs) for k in most}
    return {**pairs[0], **worst, "same_main_of_pairs": sorted(p["same_main"] for p in pairs)}


def _passes(d: dict[str, Any], theirs: dict[str, Any]) -> bool:
    means = max(d["mean_fraction"], d["mean_full"]) <= MAX_MEAN_DIFFERENCE
    alike = theirs["latents_difference"] <= MAX_LATENT_DIFFERENCE
    return d["same_main"] == d["n_letters"] and d["same_full"] >= MIN_SAME_FULL and means and alike


def _objective_excess(train: tuple[Any, Any], weights: Path) -> float:
    """By how much sae-bench's converged L1 objective lies above ours, as a share of ours; largest over letters.

    Latents that fire on no training word are left out: what remains of their random start ranks nothing.
    """
    from safetensors.torch import load_file

    from sae_train.evals import lasso
    from sae_train.evals.presets import get_preset

    latents, labels = train
    p, theirs = get_preset("saebench"), load_file(weights)
    l2 = 26 * p.l1_weight_decay
    solution = lasso.fit(latents, labels, 26, p.l1_coefficient, l2, tolerance=1e-6)
    x, penalties, fires = latents.dense().double(), (p.l1_coefficient, l2), latents.fires()[:, None]
    best = objective(x, labels, solution.weight, solution.bias, *penalties)
    reached = objective(x, labels, theirs["weight"].T.double() * fires, theirs["bias"].double(), *penalties)
    return float(((reached - best) / best).max().detach())


def objective(x: Any, labels: Any, weight: Any, bias: Any, l1: float, l2: float) -> Any:
    """Per letter: mean weighted BCE + l1·Σ|w| + ½·l2·‖w‖²."""
    import torch

    y = torch.nn.functional.one_hot(labels, weight.shape[1]).double()
    pos_weight = (len(y) - y.sum(0)) / y.sum(0)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        x @ weight + bias, y, pos_weight=pos_weight, reduction="none"
    )
    return loss.mean(0) + l1 * weight.abs().sum(0) + l2 / 2 * weight.square().sum(0)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| SAE | sae-bench run | main latents the same | full flags the same | Δ mean fraction | Δ mean full | |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        verdict = {None: "", True: "ok", False: "**MISSED**"}[r["passed"]]
        lines.append(
            f"| {r['sae']} | {r['what']} | {r['same_main']}/{r['n_letters']} | {100 * r['same_full']:.2f} % of "
            f"{r['n_words']} | {r['mean_fraction']:.4f} | {r['mean_full']:.4f} | {verdict} |"
        )
    return "\n".join(lines)


def _save(out: Path, rows: list[dict], answer: dict[str, Any], model: str) -> None:
    """Rows by model and SAE, so that one check leaves the others' in place."""
    from importlib.metadata import version

    ours = {p: version(p) for p in ("sae-train", "torch", "numpy", "pandas")}
    known = json.loads(out.read_text()) if out.is_file() else {}
    errors = {Path(path).name: error for path, error in answer["schema_errors"].items()}
    names = {row["sae"] for row in rows}
    rows = [row for row in known.get(model, {}).get("rows", []) if row["sae"] not in names] + rows
    known[model] = {"ours": ours, "sae-bench side": answer["versions"], "python": platform.python_version(),
                    "schema_errors": errors, "rows": rows}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="*", help="SAE folders in SAELens layout")
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with sae-bench")
    parser.add_argument("--model", default="speller")
    parser.add_argument("--hook")
    parser.add_argument("--letters-model", action="store_true", help="make a small GPT-2 and three SAEs, check those")
    parser.add_argument("--eval-words", type=int)
    parser.add_argument("--as-shipped", action="store_true", help="leave sae-bench's logistic regressions as they are")
    parser.add_argument("--epochs", type=int, default=3000, help="full-batch steps of the converged run")
    parser.add_argument("--cache", help="folder of cached eval assets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
