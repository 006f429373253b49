"""Tokens a second from text to a trained SAE, side by side with SAELens, and where the time goes; with --evaluate also
the seconds from text to an evaluated SAE, side by side with SAELens and sae-bench.

    python benchmarks/pipeline.py --peer-python ENV/bin/python --model speller
    python benchmarks/pipeline.py --peer-python ENV/bin/python --model smollm2 --hook blocks.8.hook_resid_post \\
        --dataset FILE --dtype bfloat16 --evaluate --eval-words 3000

Same model, documents, context, width, k, batch, number of tokens and number format of the language model, each trainer
otherwise with its defaults (SAELens reads the model through TransformerLens, stopped at the hook, or where that does
not know the model through its wrapper of Hugging Face models). Timed from the first document to the last step, the
start from a sample included, without loading the model or writing the result. Each side runs in a process of its own,
in rounds (A B A B …). With --threads 1 CPU seconds are counted, so that the machine need not be idle.

With --evaluate each side then evaluates its own SAE once by first-letter absorption, with nothing cached. The same are
the words, the ten examples a prompt, a probe of 26 letters, k-sparse probes up to k = 10, fraction and full of every
true positive. Not the same are the draw of test words and of examples (ours shares 64 sets of them, sae-bench has one
a word) and that ours reads the true positives' prompts once in the set-up, sae-bench once for each SAE. Ours also asks
the model for the letters, a part of its own; its baselines, which sae-bench has not, are left out. sae-bench's options
are its fastest: latents kept, large batches, and with bfloat16 the SAE in it too, as it does; it evaluates even where
fewer than 20 letters count, as ours does.
"""

from __future__ import annotations

import argparse
import itertools
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
DOCUMENTS, CHARACTERS = 40_000, 20_000_000
HARVEST = ("language model", "text and buffer")
EVAL = ("eval set-up", "evaluation")


class Parts:
    """Seconds by part: what runs inside a named function counts for it, and not for the one around it.

    In a part's name {} stands for the part around it.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count for `name` until the end of the context."""
        self._turn()
        self._open.append(name.format(*self._open[-1:]))
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
    return time.process_time if job["threads"] == 1 and job["device"] == "cpu" else time.perf_counter


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Train with sae-train's session and learner, as its loop does, and evaluate if asked."""
    import torch

    from sae_train.config import resolve
    from sae_train.data.hooks import resolve_hook
    from sae_train.kernels import ops
    from sae_train.runs.session import begin, open_session

    torch.set_num_threads(job["threads"])
    given = {"model": job["model"], "arch": "topk", "width": job["d_sae"], "l0": job["k"], "batch_tokens": job["batch"],
             "tokens": job["tokens"], "device": job["device"], "absorption": False, "dataset": job["dataset"],
             "hook": job["hook"], "dtype": job["dtype"]}  # fmt: skip
    session = open_session(resolve(given))
    learner, lm = session.learners[0], session.first.language.lm
    now = clock(job)
    parts = Parts(now)
    parts.watch(session.first.source.lm, "activations", "language model")
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
            x = next(batches)[""]
        with parts.part("losses and metrics"):
            learner.step(x)
    learner.check()  # on a GPU: until the last step is done
    done = {
        "seconds": now() - start, "parts": dict(parts.seconds), "tokens": session.settings.n_steps * job["batch"],
        "d_in": lm.d_in, "module": resolve_hook(lm._model, lm.hook_name, lm.name).module, "hook": lm.hook_name,
        "context": session.settings.context(lm.context), "bos": lm.bos_id is not None,
        "versions": f"torch {torch.__version__}",
    }  # fmt: skip
    return done | (evaluate(job, session.first.export(learner), lm, Parts(now)) if job["evaluate"] else {})


def evaluate(job: dict[str, Any], sae: Any, lm: Any, parts: Parts) -> dict[str, Any]:
    """Set the absorption eval up and evaluate one SAE."""
    from sae_train.evals import absorption, assets, k_sparse

    for owner, name, part in (
        (assets, "read_words", "{}: language model"), (assets, "ground_truth", "{}: probe"),
        (assets, "answer_accuracy", "{}: asking for the letter"),
        (absorption, "rank_latents", "{}: k-sparse probes"), (k_sparse, "fit", "{}: k-sparse probes"),
    ):  # fmt: skip
        parts.watch(owner, name, part)
    with parts.part(EVAL[0]):
        built = assets.build(lm, n_words=job["eval_words"])
    with parts.part(EVAL[1]):
        found = absorption.evaluate(sae, built)
    figures = {"words": len(built.words), "true positives": len(built.tp_rows),
               "letters that count": int(built.letters_that_count.sum()),
               "fraction": found.mean_fraction, "full": found.mean_full}  # fmt: skip
    return {"eval": parts.seconds, "figures": figures, "words": built.words, "reason": found.reason}


def save_model(name: str, out: Path) -> None:
    """Write a language model as a Hugging Face folder of float32 weights, as the other side reads it."""
    from sae_train.data.language_model import load_language_model

    lm = load_language_model(name, "blocks.0.hook_resid_post", dtype="float32")
    if hasattr(lm._model.config, "quantization_config"):
        del lm._model.config.quantization_config
    lm._model.save_pretrained(out)
    lm.tokenizer.save_pretrained(out)


def write_documents(dataset: str, out: Path) -> None:
    """Write the documents of a dataset, which the other side reads, as JSON lines: more of them than are trained on."""
    from sae_train.data.documents import find_documents

    documents, _ = find_documents(dataset)
    texts = (text for read in documents.reads() for _, text in read)
    left = CHARACTERS
    with out.open("w", encoding="utf-8") as file:
        for text in itertools.islice(texts, DOCUMENTS):
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text)
            if left <= 0:
                return


def main() -> None:
    args = _arguments()
    job = {"model": args.model, "dataset": args.dataset, "d_sae": args.d_sae, "k": args.k, "batch": args.batch,
           "tokens": args.tokens, "threads": args.threads, "hook": args.hook, "dtype": args.dtype,
           "evaluate": args.evaluate, "eval_words": args.eval_words, "device": args.device}  # fmt: skip
    if args.side:
        print(json.dumps(ours(json.loads(args.side))))
        return
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "documents.jsonl"
        if args.peer_python:
            write_documents(args.dataset, texts)
            save_model(args.model, Path(folder) / "model")
        for number in range(args.rounds):
            done = _run([sys.executable, __file__, "--side", json.dumps(job)], args.threads, huge=True)
            runs["sae-train"].append(done)
            if args.peer_python:
                facts = {key: done.get(key) for key in ("module", "hook", "context", "d_in", "bos", "words")}
                work = Path(folder) / f"round-{number}"
                places = {"documents": str(texts), "folder": str(Path(folder) / "model"), "work": str(work)}
                peer = work.with_suffix(".json")
                peer.write_text(json.dumps({**job, **facts, **places}))
                runs[_other(job)].append(_run([args.peer_python, str(PEER), str(peer)], args.threads, huge=False))
    rows = _rows(job, runs)
    print(_table(rows))
    if reason := runs["sae-train"][0].get("reason"):
        print(f"sae-train says that its score is not valid: {reason}")
    append(args.out, COLUMNS, rows)


def _other(job: dict[str, Any]) -> str:
    return "SAELens and sae-bench" if job["evaluate"] else "SAELens"


def _run(command: list[str], threads: int, huge: bool) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
           "THP_MEM_ALLOC_ENABLE": str(int(huge)), "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _rows(job: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return tokens a second of each side, the ratio, each part's share in percent, and what evaluating adds."""
    common = {"date": time.strftime("%Y-%m-%d"), "machine": machine(job["device"]),
              "load": round(os.getloadavg()[0], 2),
              **{key: job[key] for key in ("threads", "d_sae", "k", "batch", "tokens")},
              "model": f"{Path(job['model']).name}{'' if job['dtype'] == 'float32' else ', ' + job['dtype']}",
              "d_in": runs["sae-train"][0]["d_in"]}  # fmt: skip
    out = []
    for side, turns in runs.items():
        own = {**common, "side": side, "n": len(turns), "versions": turns[0]["versions"]}
        columns = [_figures(turn, job["evaluate"]) for turn in turns]
        if side != "sae-train":
            for column, first in zip(columns, runs["sae-train"], strict=True):
                column |= _ratios(_figures(first, job["evaluate"]), column)
        out += [{**own, "part": part, **quantiles([column[part] for column in columns])} for part in columns[0]]
    return out


def _figures(turn: dict[str, Any], evaluate: bool) -> dict[str, float]:
    """Return what one run of one side is described by."""
    parts, seconds = turn["parts"], turn["seconds"]
    out = {"tokens/s": turn["tokens"] / seconds}
    out |= {f"{part}, %": 100 * x / seconds for part, x in parts.items()}
    if not evaluate:
        return out
    harvest = sum(parts[part] for part in HARVEST)
    whole = {"harvest": harvest, "training": seconds - harvest}
    whole |= {phase: sum(x for part, x in turn["eval"].items() if part.startswith(phase)) for phase in EVAL}
    within = {part: x for part, x in turn["eval"].items() if part not in EVAL}
    out |= {f"{part}, s": x for part, x in {**whole, **within, "text to evaluated SAE": sum(whole.values())}.items()}
    return out | turn["figures"]


def _ratios(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    out = {"times slower than sae-train": ours["tokens/s"] / theirs["tokens/s"]}
    if (whole := "text to evaluated SAE, s") in ours:
        out["evaluated, times slower than sae-train"] = theirs[whole] / ours[whole]
    return out


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"\n{rows[0]['model']}, d_in {rows[0]['d_in']}, {rows[0]['machine']}, {rows[0]['threads']} threads", ""]
    lines += ["| side | part | p50 (p20–p80) |", "|---|---|---|"]
    lines += [f"| {r['side']} | {r['part']} | {r['p50']:.4g} ({r['p20']:.4g}–{r['p80']:.4g}) |" for r in rows]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="python of an environment with sae-lens, and sae-bench for --evaluate")
    parser.add_argument("--model", default="speller")
    parser.add_argument("--dataset", default="generated", help="generated, a local file or a folder")
    for name, default in (("d-sae", 16_384), ("k", 50), ("batch", 2048), ("tokens", 204_800), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: without peers; parts are what "
                        "the host does, which waits for the GPU only at the end")  # fmt: skip
    parser.add_argument("--hook", help="default: residual stream after the middle block")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the language model")
    parser.add_argument("--evaluate", action="store_true", help="by the absorption eval, after training")
    parser.add_argument("--eval-words", type=int, help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
