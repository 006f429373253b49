"""What the absorption eval costs, side by side with sae-bench 0.6.0, as a callback of a run, and at real size. It
prints a markdown table and adds rows to benchmarks/results/absorption_speed.csv.

    python benchmarks/absorption_speed.py --peer-python ENV/bin/python SAE_FOLDER ...   both sides in turns
    python benchmarks/absorption_speed.py --callback RUN_FOLDER                         share of a run's time
    python benchmarks/absorption_speed.py --arithmetic SAE_FOLDER                       scaled from measured parts

ENV is an environment with sae-bench. Both sides get the same words, activations, probe, SAE and number of threads.
sae-bench runs as fast as it can: train latents computed once (off by default), large batches, no progress bars. Its
language model is a stand-in that costs nothing, as its TransformerLens does not know every model; the passes over the
true positives' prompts that it repeats for each SAE are timed apart, by its HookedTransformer at the same sizes. Ratios
are given with and without them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csv_rows import append, cpu

from sae_train.files import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "absorption_speed.csv"
COLUMNS = ("date", "machine", "load", "versions", "threads", "model", "sae", "what", "n", "p20", "p50", "p80")
PEER_STAGES = {
    "total": "sae-bench, per SAE",
    "train_sparse_multi_probe": "sae-bench, L1 probe",
    "train_k_sparse_probes": "sae-bench, L1 probe and 260 k-sparse probes",
    "run_k_sparse_probing_experiment": "sae-bench, k-sparse stage",
    "run_feature_absortion_experiment": "sae-bench, absorption stage",
}
WARM_UP, MODEL_PASSES = "warm up", "sae-bench, language model passes per SAE"
# A real run for the arithmetic: Gemma-2-2B, residual stream after block 12 of 26, 16k latents, 500M tokens.
REAL = {
    "parameters_to_hook": 1.0e9,
    "tokens": 5e8,
    "d_in": 2304,
    "d_sae": 16384,
    "l0": 80,
    "words": 60_000,
    "looks": 12,
}


def main() -> None:
    args = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.callback:
        rows = callback_share(Path(args.callback))
        print(_table(rows, ("what", "value")))
        return
    import torch

    torch.set_num_threads(args.threads)
    if args.arithmetic:
        print(_table(arithmetic(args), ("what", "value")))
        return
    rows = [row for path in args.saes for row in side_by_side(path, args)]
    print(_table(rows, ("sae", "what", "n", "p20", "p50", "p80")))
    append(args.out, COLUMNS, rows)


def side_by_side(path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both sides in turns: per round some evaluations of ours, then each of sae-bench's settings once."""
    import saebench_absorption as crosscheck

    from sae_train.sae.files import load_sae

    if not crosscheck.has_peer(args.peer_python):
        raise SystemExit(f"{args.peer_python} has no sae-bench: give the python of an environment that has it.")
    assets = _assets(args)
    sae = load_sae(path)
    seconds: dict[str, list[float]] = {}
    versions: dict[str, str] = {}
    peer_parts = {"time_probe": True, "model_sizes": _model_sizes(args.model)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        crosscheck.export(folder, assets, args.model)
        crosscheck.export_latents(folder, path, sae, assets)
        _time_ours(sae, assets, {})  # sae-bench warms up as well
        for round_ in range(args.rounds):
            for _ in range(args.ours_per_round):
                _time_ours(sae, assets, seconds)
            job = {"saes": [str(Path(path).resolve())], "runs": _peer_runs(assets, round_), **peer_parts}
            answer = crosscheck.run_peer(args.peer_python, folder, job, args.threads)
            versions = answer["versions"]
            _collect(answer, seconds)
    _add(seconds, "ours, probe (once per model)", assets.seconds["probe"])
    common = _common(args, Path(path).name, versions)
    return [{**common, "what": what, "n": len(v), **_quantiles(v)} for what, v in seconds.items()] + _ratios(
        seconds, common
    )


def _assets(args: argparse.Namespace) -> Any:
    from sae_train.data.language_model import load_language_model
    from sae_train.evals import assets

    lm = load_language_model(args.model, args.hook)
    return assets.build(lm, cache_dir=args.cache, n_words=args.eval_words, contexts="each")


def _time_ours(sae: Any, assets: Any, seconds: dict[str, list[float]]) -> None:
    from sae_train.evals.absorption import evaluate

    _add(seconds, "ours, per SAE", _time(lambda: evaluate(sae, assets, "saebench")))


def _peer_runs(assets: Any, seed: int) -> list[dict[str, Any]]:
    """Its own schedule, the 1,500 steps without which its ranking stays near its random start, and, once, all of its
    defaults: those compute the train latents 310 times."""
    n = int((~assets.is_test).sum())
    fast = {"seed": seed, "llm_batch": len(assets.tp_rows), "eval_batch": 4096}
    its, steps = {"batch": 4096, "epochs": 50}, {"batch": -(-n // 30), "epochs": 50}
    defaults = [{"name": "its defaults", "seed": seed, "precalc": False, **its}] if seed == 0 else []
    warm_up = {"name": WARM_UP, "batch": 4096, "epochs": 1, **fast}
    return [warm_up, {"name": "its 50 epochs", **its, **fast}, {"name": "1,500 steps", **steps, **fast}, *defaults]


def _collect(answer: dict[str, Any], seconds: dict[str, list[float]]) -> None:
    _add(seconds, "sae-bench, probe (once per model)", answer["probe_seconds"])
    _add(seconds, MODEL_PASSES, answer["model_seconds"])
    for sae in answer["saes"].values():
        for name, run in sae["runs"].items():
            for stage, what in PEER_STAGES.items() if name != WARM_UP else ():
                _add(seconds, f"{what}, {name}", run["seconds"][stage])


def _model_sizes(model: str) -> dict[str, int]:
    """Sizes of the model in TransformerLens' words."""
    from transformers import AutoConfig

    from sae_train.data.pretrained import locate

    source, options = locate(model)
    c = AutoConfig.from_pretrained(source, **options)
    heads, d_mlp = c.num_attention_heads, getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    return {
        "n_layers": c.num_hidden_layers, "d_model": c.hidden_size, "n_heads": heads, "d_head": c.hidden_size // heads,
        "d_mlp": d_mlp, "n_ctx": c.max_position_embeddings, "d_vocab": c.vocab_size,
    }  # fmt: skip


def _ratios(seconds: dict[str, list[float]], common: dict[str, Any]) -> list[dict[str, Any]]:
    ours, passes = seconds["ours, per SAE"], seconds[MODEL_PASSES]
    out = []
    for what, values in seconds.items():
        if what.startswith("sae-bench, per SAE"):
            name = what.removeprefix("sae-bench, per SAE, ")
            for label, extra in (("without model passes", 0.0), ("with model passes", statistics.median(passes))):
                ratios = [(v + extra) / statistics.median(ours) for v in values]
                out.append({**common, "what": f"ratio, {name}, {label}", "n": len(values), **_quantiles(ratios)})
    return out


def callback_share(run: Path) -> list[dict[str, Any]]:
    """How much of a finished run the absorption looks took."""
    rows = read_metrics(run)
    looks = [row["absorption/seconds"] for row in rows if "absorption/seconds" in row]
    info = json.loads((run / "run.json").read_text())
    total = info["seconds"] + info["eval_seconds"]
    n_saes = len({row["sae"] for row in rows})
    return [
        {"what": "training, s", "value": f"{info['seconds']:.0f}"},
        {"what": "all evaluation (fidelity, absorption), s", "value": f"{info['eval_seconds']:.0f}"},
        {"what": "absorption looks", "value": f"{len(looks)} ({len(looks) / n_saes:.0f} per SAE, {n_saes} SAEs)"},
        {"what": "seconds per look, median", "value": f"{statistics.median(looks):.2f}"},
        {"what": "absorption, s", "value": f"{sum(looks):.1f}"},
        {"what": "share of the run's time", "value": f"{100 * sum(looks) / total:.1f} %"},
    ]


def arithmetic(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Scale the measured parts of one evaluation to a run of real size, with every factor shown.

    run = (2·P·T + 12·d_in·d_sae·T) / rate: the model's forward to the hook and the SAE's forward and backward.
    look = encode·(words·d_in·d_sae) ratio + (rank + probes + score + tables)·(words·L0) ratio.
    """
    from sae_train.evals.absorption import evaluate
    from sae_train.sae.files import load_sae

    assets = _assets(args)
    sae = load_sae(args.saes[0])
    evaluate(sae, assets, "saebench")
    measured = [evaluate(sae, assets, "saebench") for _ in range(5)]
    parts = {name: statistics.median(r.timings[name] for r in measured) for name in measured[0].timings}
    real, d_sae, d_in = REAL, *sae.W_dec.shape
    rate, words = _flops_per_second(), real["words"] / len(assets.words)
    encode = parts.pop("encode") * words * real["d_in"] * real["d_sae"] / (d_in * d_sae)
    rest = sum(parts.values()) * words * real["l0"] / measured[0].l0
    train = (2 * real["parameters_to_hook"] + 12 * real["d_in"] * real["d_sae"]) * real["tokens"] / rate
    looks = real["looks"] * (encode + rest)
    return [
        {"what": "assumed", "value": ", ".join(f"{k} {v:g}" for k, v in real.items())},
        {"what": "measured here: matrix products, GFLOP/s", "value": f"{rate / 1e9:.0f}"},
        {"what": "measured here: words, L0, d_in × d_sae",
         "value": f"{len(assets.words)}, {measured[0].l0:.1f}, {d_in} × {d_sae}"},
        *({"what": f"measured here: {k}, s", "value": f"{statistics.median(r.timings[k] for r in measured):.3f}"}
          for k in measured[0].timings),
        {"what": "one look: encode + rest, s", "value": f"{encode:.1f} + {rest:.1f}"},
        {"what": "training at the same rate, s", "value": f"{train:.0f}"},
        {"what": f"{real['looks']} looks, share of the run", "value": f"{100 * looks / (looks + train):.3f} %"},
    ]  # fmt: skip


def _flops_per_second(n: int = 1024) -> float:
    import torch

    a = torch.randn(n, n)
    times = [_time(lambda: a @ a) for _ in range(20)]
    return 2 * n**3 / statistics.median(times)


def _time(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _add(seconds: dict[str, list[float]], what: str, value: float) -> None:
    seconds.setdefault(what, []).append(value)


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), round(values[0], 4))
    fifths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": round(fifths[1], 4), "p50": round(fifths[4], 4), "p80": round(fifths[7], 4)}


def _common(args: argparse.Namespace, sae: str, versions: dict[str, str]) -> dict[str, Any]:
    from importlib.metadata import version

    ours = {p: version(p) for p in ("sae-train", "torch")}
    named = " ".join(f"{k} {v}" for k, v in {**ours, **{k: v for k, v in versions.items() if k != "torch"}}.items())
    return {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{cpu()} x {os.cpu_count()}",
        "load": round(os.getloadavg()[0], 2), "versions": named, "threads": args.threads,
        "model": Path(args.model).name, "sae": sae,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="*", help="SAE folders in SAELens layout")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--model", default="speller")
    parser.add_argument("--hook")
    parser.add_argument("--eval-words", type=int)
    parser.add_argument("--cache", help="folder of cached eval assets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours-per-round", type=int, default=3)
    parser.add_argument("--callback", metavar="RUN_FOLDER")
    parser.add_argument("--arithmetic", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "crosscheck"))
    main()
