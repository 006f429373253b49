"""A grid of 12 topk SAEs (three widths; L0 10, 25, 50, 100) in one pass, against 12 runs one by one and against
SAELens' MultiSAETrainingRunner. It adds rows to benchmarks/results/grid.csv and prints a table.

    python benchmarks/grid.py --peer-python ENV/bin/python                        all parts, embedded model
    python benchmarks/grid.py --model FOLDER --dataset FILE --hook NAME           another model
    python benchmarks/grid.py --widths 1k,2k,4k                                   other widths than 1k, 4k, 16k
    python benchmarks/grid.py --only singles-1k,floor                             some parts; rows of one day join up
    python benchmarks/grid.py --table                                             ratios of the newest rows

ENV is an environment with sae-lens. Every part is a process of its own, so that start-up (imports, model, text) can be
counted (`wall`) or not (`loop`: SAELens' runner.run(); ours with its looks at the first and the last step and one saved
state), or the looks neither (`training`). No side evaluates absorption or logs to W&B; ours also measures held-out
figures and loss recovered at both looks, SAELens nothing. `floor` is the sum of its parts: the language model's pass
over the tokens once, and each SAE's steps alone. `others` is the share of the machine that other processes had.

SAELens gets the token rows ready made and the model cut off after the hook (its own early stop knows only
TransformerLens models). `saelens` has sparse activations where they are faster, `saelens-defaults` is as it comes. Both
train on a quarter of the tokens; the seconds of runner.run() are multiplied by 4, start-up is not. No side has dead
latents to revive: for SAELens that begins after 1,000 steps, so ours wait as long (--dead-tokens).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from csv_rows import append, cpu

from sae_train.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "grid.csv"
COLUMNS = (
    "date", "machine", "others", "threads", "model", "hook", "tokens", "batch", "widths",
    "part", "wall", "loop", "training",
)  # fmt: skip
L0S = (10, 25, 50, 100)
SPARSE_FROM = 40  # latents per active one from which SAELens' sparse activations are faster than its dense ones
TIMES = ("wall", "loop", "training")
FLOOR_STEPS = 8
DEAD_STEPS = 1000  # SAELens' dead_feature_window
PEER_SHARE = 4  # SAELens trains on the first 1/4 of the tokens, timed once and multiplied: its steps are all alike


def main() -> None:
    args = _arguments()
    if args.saelens_job:
        print(json.dumps(saelens(json.loads(args.saelens_job.read_text()))))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for part in () if args.table else args.only or _parts(args):
        start, before = time.perf_counter(), _others()
        seconds = {name: round(value, 2) for name, value in zip(TIMES, run_part(part, args), strict=True)}
        others = round((_others() - before) / (time.perf_counter() - start) / os.cpu_count(), 3)
        print(f"{part}: {seconds}, other processes had {others:.1%} of the machine", flush=True)
        append(args.out, COLUMNS, [_common(args) | {"part": part, "others": others} | seconds])
    print(table(args))


def run_part(part: str, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds with start-up, without, and of training alone."""
    if part == "floor":
        return floor(args)
    if part.startswith("saelens"):
        return _saelens(args, as_shipped=part == "saelens-defaults")
    if part == "grid":
        return _ours(args, args.widths, ",".join(map(str, L0S)))
    width = part.removeprefix("singles-")
    seconds = [_ours(args, width, str(l0)) for l0 in L0S]
    return tuple(map(sum, zip(*seconds, strict=True)))


def _ours(args: argparse.Namespace, widths: str, l0s: str) -> tuple[float, float, float]:
    """One command of sae-train."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "sae_train", "--width", widths, "--l0", l0s, "--out", out, "--name", "run"]
        command += ["--no-absorption", "--absorption-evals", "1", "--tokens", str(args.tokens), "--device", "cpu"]
        command += ["--save-every", str(args.tokens), "--dead-tokens", str(DEAD_STEPS * args.batch_tokens)]
        for name in ("model", "hook", "dataset", "batch_tokens"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))] if getattr(args, name) else []
        wall = _time(command)
        info = json.loads((Path(out) / "run" / "run.json").read_text())
    assert info["status"] == "finished" and all(sae["failed"] is None for sae in info["saes"])
    return wall, info["seconds"] + info["eval_seconds"], info["seconds"]


def _time(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


def _open(args: argparse.Namespace) -> Any:
    """The session that the grid would have, in this process."""
    import torch

    from sae_train.runs import session

    torch.set_num_threads(args.threads)
    return session.open_session(_settings(args))


def _settings(args: argparse.Namespace) -> Any:
    from sae_train.config import resolve

    given = {name: getattr(args, name) for name in ("model", "hook", "dataset", "tokens", "batch_tokens")}
    given |= {"width": args.widths, "l0": ",".join(map(str, L0S)), "device": "cpu", "outlier_norm": "none"}
    return resolve({**given, "dead_tokens": DEAD_STEPS * args.batch_tokens})


def floor(args: argparse.Namespace) -> tuple[float, float, float]:
    """What the computing itself takes: the pass over the tokens once, and the SAEs' steps, alone and summed."""
    from sae_train.runs import session

    opened = _open(args)
    session.begin(opened)
    n_steps = opened.settings.n_steps
    buffer = opened.first.data
    buffer.buffer_tokens = FLOOR_STEPS * buffer.batch_tokens
    start = time.perf_counter()
    batches = [next(buffer) * opened.first.scale for _ in range(FLOOR_STEPS)]
    model = (time.perf_counter() - start) / FLOOR_STEPS * n_steps
    print(f"floor, language model: {model:.1f} s")
    total = model
    for learner in opened.learners:
        for x in batches[:2]:
            learner.step(x)
        start = time.perf_counter()
        for x in batches[2:]:
            learner.step(x)
        steps = (time.perf_counter() - start) / (FLOOR_STEPS - 2) * n_steps
        print(f"floor, {learner.name}: {steps:.1f} s")
        total += steps
    print(f"floor: {total:.1f} s, one by one {total + 11 * model:.1f} s, {(total + 11 * model) / total:.2f} times")
    return total, total, total


def _saelens(args: argparse.Namespace, as_shipped: bool) -> tuple[float, float, float]:
    """Write the token rows, then one process of the peer."""
    from safetensors.torch import save_file

    opened = _open(args)
    settings = opened.settings
    kept, rows = 0, []
    while kept < settings.train.tokens + 2**16:
        rows.append(next(opened.first.source.stream))
        kept += rows[-1].numel() // 2  # special and dropped tokens do not count
    with tempfile.TemporaryDirectory() as folder:
        import torch

        job = {
            "model": args.model, "hook": opened.first.source.hook_name, "d_in": opened.first.source.d_in,
            "context": opened.first.language.context,
            "tokens": settings.n_steps // PEER_SHARE * settings.train.batch_tokens,
            "batch": settings.train.batch_tokens, "rows": f"{folder}/rows.safetensors", "threads": args.threads,
            "buffer": settings.data.buffer_tokens, "lr": opened.learners[-1].lr, "out": folder,
            "drop": sorted({*opened.first.language.lm.special_ids, *opened.first.language.drop_ids}),
            "widths": sorted({spec.width for spec in settings.specs}), "as_shipped": as_shipped,
        }  # fmt: skip
        if args.model == "speller":
            job["model"] = str(ROOT / "checkpoints" / "speller")
        save_file({"rows": torch.cat(rows)}, job["rows"])
        write_json(Path(folder) / "job.json", job)
        command = [args.peer_python, __file__, "--saelens-job", f"{folder}/job.json"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"SAELens failed:\n{done.stderr[-3000:]}")
        wall, training = time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])["training"]
        return wall + (PEER_SHARE - 1) * training, PEER_SHARE * training, PEER_SHARE * training


def saelens(job: dict[str, Any]) -> dict[str, float]:
    """The peer's side: its runner on the same model, tokens and SAEs."""
    import torch

    torch.set_num_threads(job["threads"])
    from datasets import Dataset
    from sae_lens import LoggingConfig, TopKTrainingSAEConfig
    from sae_lens.load_model import load_model
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from safetensors.torch import load_file

    block = int(job["hook"].split(".")[1])
    lm = load_model(
        "AutoModelForCausalLM", job["model"], device="cpu", model_from_pretrained_kwargs={"dtype": "float32"}
    )
    core = lm.model.get_decoder() if hasattr(lm.model, "model") else lm.model.transformer
    name = "layers" if hasattr(core, "layers") else "h"
    prefix = next(path for path, module in lm.model.named_modules() if module is core)
    setattr(core, name, getattr(core, name)[: block + 1])
    lm.model.lm_head = torch.nn.Identity()
    saes = {}
    sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    for width, k in itertools.product(job["widths"], L0S):
        options = sparse if width >= SPARSE_FROM * k and not job["as_shipped"] else {}
        saes[f"{width}-{k}"] = TopKTrainingSAEConfig(d_in=job["d_in"], d_sae=width, k=k, **options)
    config = MultiSAETrainingRunnerConfig(
        saes=saes, hook_names=f"{prefix}.{name}.{block}", model_name=job["model"],
        model_class_name="AutoModelForCausalLM", context_size=job["context"], training_tokens=job["tokens"],
        train_batch_size_tokens=job["batch"], store_batch_size_prompts=4096 // job["context"], prepend_bos=False,
        n_batches_in_buffer=job["buffer"] // job["context"], lr=job["lr"], exclude_special_tokens=job["drop"],
        logger=LoggingConfig(log_to_wandb=False), output_path=f"{job['out']}/saes", checkpoint_path=None,
    )  # fmt: skip
    rows = Dataset.from_dict({"tokens": load_file(job["rows"])["rows"].tolist()})
    runner = MultiSAETrainingRunner(config, override_dataset=rows, override_model=lm)
    start = time.perf_counter()
    runner.run()
    return {"training": time.perf_counter() - start}


def table(args: argparse.Namespace) -> str:
    """Ratios to the grid of the newest row of each part."""
    want = {key: str(value) for key, value in _common(args).items() if key in COLUMNS[4:9] and value is not None}
    with args.out.open(newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file) if all(row[k] == v for k, v in want.items())}
    if "grid" not in rows:
        return "no row of the grid yet"
    singles = [part for part in _parts(args) if part.startswith("singles")]
    rows |= {"singles": _sum([rows[part] for part in singles])} if all(part in rows for part in singles) else {}
    lines = ["| | with start-up, s | × | without, s | × | training alone, s | × |", "|---|" + "---|" * 6]
    for part in ("grid", "singles", "saelens", "saelens-defaults", "floor"):
        if part in rows:
            cells = [f"{float(rows[part][what]):.1f} | {_ratio(rows, part, what)}" for what in TIMES]
            lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sum(rows: list[dict[str, str]]) -> dict[str, float]:
    return {what: sum(float(row[what]) for row in rows) for what in TIMES}


def _ratio(rows: dict[str, Any], part: str, what: str) -> str:
    return f"{float(rows[part][what]) / float(rows['grid'][what]):.2f}"


def _common(args: argparse.Namespace) -> dict[str, Any]:
    settings = _settings(args)
    return {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{cpu()} x {os.cpu_count()}",
        "threads": args.threads, "model": Path(args.model).name,
        "hook": settings.lm.hook, "tokens": settings.train.tokens, "batch": settings.train.batch_tokens,
        "widths": args.widths,
    }  # fmt: skip


def _others() -> float:
    """Processor seconds of all other processes since the machine started (Linux; elsewhere 0)."""
    if not Path("/proc/stat").is_file():
        return 0.0
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with sae-lens")
    parser.add_argument("--model", default="speller")
    parser.add_argument("--hook")
    parser.add_argument("--dataset")
    parser.add_argument("--tokens", type=int, default=204_800)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--widths", default="1k,4k,16k")
    parser.add_argument("--only", type=lambda text: text.split(","), help="grid, singles-1k, …, floor, saelens, …")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--saelens-job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(_parts(args)):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(_parts(args))}")
    return args


def _parts(args: argparse.Namespace) -> tuple[str, ...]:
    return ("grid", *(f"singles-{width}" for width in args.widths.split(",")), "floor", "saelens", "saelens-defaults")


if __name__ == "__main__":
    main()
