"""Tokens a second from text to a trained SAE, side by side with SAELens, and where the time goes.

    python benchmarks/pipeline.py --peer-python ENV/bin/python --model speller
    python benchmarks/pipeline.py --peer-python ENV/bin/python --model FOLDER --dataset FILE.txt

Same model, documents, width, k, batch and number of tokens, float32, each trainer otherwise with its defaults (SAELens
reads the model through its wrapper of Hugging Face models). Timed from the first document to the last step, the
start from a sample included, without loading the model or writing the result. Each side runs in a process of its own,
in rounds (A B A B …). With --threads 1 CPU seconds are counted, so that the machine need not be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csv_rows import append, machine, quantiles

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pipeline.csv"
PEER = Path(__file__).with_name("pipeline_peer.py")
COLUMNS = ("date", "machine", "threads", "load", "versions", "model", "d_in", "d_sae", "k", "batch", "tokens", "side",
           "part", "n", "p20", "p50", "p80")  # fmt: skip
DOCUMENTS = 40_000


class Parts:
    """Seconds by part: what runs inside a named function counts for it, and not for the one around it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count for `name` until the end of the context."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Let every call of owner.name count for a part."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    def _turn(self) -> None:
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def clock(job: dict[str, Any]) -> Callable[[], float]:
    """With one thread the time that the process had a processor, which others on the machine do not disturb."""
    return time.process_time if job["threads"] == 1 else time.perf_counter


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Train with sae-train's session and learner, as its loop does."""
    import torch

    from sae_train.config import resolve
    from sae_train.data.hooks import resolve_hook
    from sae_train.kernels import ops
    from sae_train.runs.session import begin, open_session

    torch.set_num_threads(job["threads"])
    given = {"model": job["model"], "arch": "topk", "width": job["d_sae"], "l0": job["k"], "batch_tokens": job["batch"],
             "tokens": job["tokens"], "device": "cpu", "absorption": False, "dataset": job["dataset"]}  # fmt: skip
    session = open_session(resolve(given))
    learner, lm = session.learners[0], session.language.lm
    now = clock(job)
    parts = Parts(now)
    parts.watch(session.source.lm, "activations", "language model")
    for name, part in (("active_topk", "encode"), ("decode_error", "decode")):
        parts.watch(ops, name, part)
    parts.watch(torch.Tensor, "backward", "backward")
    for name in ("_gradients", "_apply"):
        parts.watch(learner, name, "optimiser")
    batches = session.batches()
    start = now()
    with parts.part("start"):
        begin(session)
    for _ in range(session.settings.n_steps):
        with parts.part("text and buffer"):
            x = next(batches)
        with parts.part("losses and metrics"):
            learner.step(x)
    seconds = now() - start
    module = resolve_hook(lm._model, lm.hook_name, lm.name).module
    from sae_train.data.pretrained import locate

    return {
        "seconds": seconds, "parts": parts.seconds, "tokens": session.settings.n_steps * job["batch"],
        "d_in": lm.d_in, "module": module, "context": session.settings.context(lm.context),
        "folder": str(locate(job["model"])[0]), "bos": lm.bos_id is not None, "versions": f"torch {torch.__version__}",
    }  # fmt: skip


def write_documents(dataset: str, out: Path) -> None:
    """Write the documents of a dataset, which the other side reads, as JSON lines."""
    from sae_train.data.documents import find_documents

    documents, _ = find_documents(dataset)
    with out.open("w", encoding="utf-8") as file:
        n = 0
        for _, texts in documents.reads():
            for text in texts:
                file.write(json.dumps({"text": text}) + "\n")
            n += len(texts)
            if n >= DOCUMENTS:
                return


def main() -> None:
    args = _arguments()
    job = {"model": args.model, "dataset": args.dataset, "d_sae": args.d_sae, "k": args.k, "batch": args.batch,
           "tokens": args.tokens, "threads": args.threads}  # fmt: skip
    if args.side:
        print(json.dumps(ours(json.loads(args.side))))
        return
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "documents.jsonl"
        write_documents(args.dataset, texts)
        for _ in range(args.rounds):
            done = _run([sys.executable, __file__, "--side", json.dumps(job)], args.threads, huge=True)
            runs["sae-train"].append(done)
            if args.peer_python:
                facts = {key: done[key] for key in ("module", "context", "folder", "d_in", "bos")}
                peer = json.dumps({**job, **facts, "documents": str(texts)})
                runs["SAELens"].append(_run([args.peer_python, str(PEER), peer], args.threads, huge=False))
    rows = _rows(job, runs)
    print(_table(rows))
    append(args.out, COLUMNS, rows)


def _run(command: list[str], threads: int, huge: bool) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
           "THP_MEM_ALLOC_ENABLE": str(int(huge)), "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _rows(job: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return tokens a second of each side, the ratio, and each part's share in percent."""
    common = {"date": time.strftime("%Y-%m-%d"), "machine": machine("cpu"), "load": round(os.getloadavg()[0], 2),
              **{key: job[key] for key in ("threads", "d_sae", "k", "batch", "tokens")},
              "model": Path(job["model"]).name}  # fmt: skip
    out = []
    speeds = {side: [r["tokens"] / r["seconds"] for r in turns] for side, turns in runs.items()}
    for side, turns in runs.items():
        own = {
            **common,
            "side": side,
            "n": len(turns),
            "versions": turns[0]["versions"],
            "d_in": runs["sae-train"][0]["d_in"],
        }
        out.append({**own, "part": "tokens/s", **quantiles(speeds[side])})
        if side != "sae-train":
            ratios = [a / b for a, b in zip(speeds["sae-train"], speeds[side], strict=True)]
            out.append({**own, "part": "times slower than sae-train", **quantiles(ratios)})
        for part in turns[0]["parts"]:
            shares = [100 * r["parts"][part] / r["seconds"] for r in turns]
            out.append({**own, "part": f"{part}, %", **quantiles(shares)})
    return out


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"\n{rows[0]['model']}, d_in {rows[0]['d_in']}, {rows[0]['machine']}, {rows[0]['threads']} threads", ""]
    lines += ["| side | part | p50 (p20–p80) |", "|---|---|---|"]
    lines += [f"| {r['side']} | {r['part']} | {r['p50']:.4g} ({r['p20']:.4g}–{r['p80']:.4g}) |" for r in rows]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of an environment with sae-lens")
    parser.add_argument("--model", default="speller")
    parser.add_argument("--dataset", default="generated", help="generated, a local file or a folder")
    for name, default in (("d-sae", 16_384), ("k", 50), ("batch", 2048), ("tokens", 204_800), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
