"""Shows that two checkouts train alike: the same commands run with each, and what they leave is compared bit by bit.

    python benchmarks/refactor_check.py BEFORE [AFTER] [--flags='--eval-contexts each']

BEFORE and AFTER (default: this checkout) are checkouts that this Python can run; `--flags` are for AFTER's runs alone,
such as those that keep what was once the only way. Compared are the weights of all six
architectures on the embedded model and on the toy, every logged figure but times, the absorption of every letter and
word, and the weights of a run that was interrupted and resumed. Exit code 1 where anything differs. About six minutes
on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_train.files import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ALL = "relu,topk,batchtopk,jumprelu,matryoshka,gated"
RUNS = {
    "speller": ["--arch", ALL, "--width", "1k", "--l0", "16", "--tokens", "300k", "--absorption-evals", "3"],
    "toy": ["--model", "toy", "--arch", ALL, "--width", "128", "--l0", "3", "--tokens", "150k"],
}
STOPPED = ["--arch", "topk,jumprelu", "--width", "512", "--l0", "8", "--tokens", "300k", "--save-every", "10"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="checkout that is checked")
    parser.add_argument("--flags", type=str.split, default=[], help="flags of AFTER's runs alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before = results(args.before.resolve(), Path(scratch) / "before")
        after = results(args.after.resolve(), Path(scratch) / "after", args.flags)
    different = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    for key in sorted(before.keys() | after.keys()):
        print(f"{'DIFFERS' if key in different else 'same':8}{key}")
    print(f"{len(before) - len(different)} of {len(before)} alike")
    return 1 if different else 0


def results(tree: Path, scratch: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """What the runs of one checkout leave, by name."""
    made: dict[str, Any] = {}
    for name, flags in RUNS.items():
        own = [] if name == "toy" else more
        sae_train(tree, scratch, [*flags, *own, "--name", name])
        made |= read_results(scratch / name)
    made |= read_results(interrupt_and_resume(tree, scratch, more))
    return made


def sae_train(tree: Path, scratch: Path, words: list[str]) -> None:
    """Run the command line of a checkout to its end."""
    started = start(tree, scratch, words)
    if started.wait():
        raise SystemExit(f"{tree}: sae-train {' '.join(words)} ended with {started.returncode}")


def start(tree: Path, scratch: Path, words: list[str]) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    out = ["--out", str(scratch)] if words[0].startswith("--") else []
    print(f"{tree.name}: sae-train {' '.join(words)}", flush=True)
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sae_train", *words, *out]
    with (scratch / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=env, cwd=scratch, stdout=log, stderr=log)


def interrupt_and_resume(tree: Path, scratch: Path, more: Sequence[str] = ()) -> Path:
    """A run that got Ctrl-C after its first saved state, and was resumed."""
    folder = scratch / "stopped"
    running = start(tree, scratch, [*STOPPED, *more, "--name", folder.name])
    while not list((folder / "state").glob("step-*[0-9]")) and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.wait()
    if json.loads((folder / "run.json").read_text())["status"] != "interrupted":
        raise SystemExit(f"{tree}: the run ended before it could be interrupted")
    sae_train(tree, scratch, ["resume", str(folder)])
    return folder


def read_results(folder: Path) -> dict[str, Any]:
    """Digests of weights, the logged figures and the tables of one run."""
    import pandas as pd

    made: dict[str, Any] = {}
    for path in sorted(folder.glob("saes/*/sae_weights.safetensors")):
        made[f"{folder.name}: weights of {path.parent.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = read_metrics(folder)
    for name in dict.fromkeys(row["sae"] for row in rows):
        own = [{k: v for k, v in row.items() if "second" not in k} for row in rows if row["sae"] == name]
        made[f"{folder.name}: {len(own)} logged rows of {name}"] = own
    for path in sorted(folder.glob("*.parquet")):
        table = pd.read_parquet(path).drop(columns="asset_hash", errors="ignore")  # of the names of settings as well
        made[f"{folder.name}: {path.name}"] = hashlib.sha256(table.to_csv().encode()).hexdigest()
    described = json.loads((folder / "run.json").read_text())
    made[f"{folder.name}: baselines"] = {sae["name"]: sae["baseline"] for sae in described["saes"]}
    return made


if __name__ == "__main__":
    sys.exit(main())
