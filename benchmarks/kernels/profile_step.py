"""Where the time of our step goes on a GPU, kernel by kernel, beside what the model of a step allows each part.

    python -m benchmarks.kernels.profile_step --arch topk --d-in 2304 --d-sae 65536 --batch 8192 --k 50
    TRITON_INTERPRET=1 python -m benchmarks.kernels.profile_step --device cpu --d-in 16 --d-sae 128 --batch 4 --k 3

Steps are launched kernel by kernel under torch.profiler; kernels are counted for the parts of benchmarks/kernels/model
by their names, all others by their own. "of it" is the model's share of the measured time. On a CPU, where there are no
kernels, PyTorch's operations take their place.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.csv_rows import append, machine
from benchmarks.kernels.bench_problem import Problem, batches, decoder_rows, level
from benchmarks.kernels.bench_sides import Ours
from benchmarks.kernels.model import Sizes, floor, parts
from sae_train.kernels import ops

COLUMNS = ("machine", "arch", "d_in", "d_sae", "batch", "k", "what", "ms", "model_ms", "bytes", "share_of_floor")
MANY = 25
# Words in the names of PyTorch's kernels, those that say most first: some names have several.
COMMON = ("norm", "sort", "gemv", "copy", "reduce", "elementwise")


def main() -> None:
    args = _arguments()
    p = Problem(args.arch, args.d_in, args.d_sae, args.batch, args.k, args.device)
    if args.device == "cpu":
        ops.DEFAULTS["cpu"] = "triton"  # under the interpreter
    torch.set_float32_matmul_precision("high")
    rows = rows_of(p, measure(p, args.steps))
    print(table(rows, p), flush=True)
    if args.out:
        append(args.out, COLUMNS, rows)


def measure(p: Problem, n_steps: int) -> dict[str, float]:
    """Return ms a step of every kernel (on a CPU: operation), by name."""
    rows = decoder_rows(p)
    xs = batches(p, rows)
    ours = Ours(p, rows, level(p, rows, xs[0]), equalised=False)
    for x in xs[: 3 if p.device != "cpu" else 1]:
        ours.unrecorded_step(x)
    activities = [ProfilerActivity.CPU if p.device == "cpu" else ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        for i in range(n_steps):
            ours.unrecorded_step(xs[i % len(xs)])
        if p.device != "cpu":
            torch.cuda.synchronize()
    taken = "self_cpu_time_total" if p.device == "cpu" else "self_device_time_total"
    return {event.key: getattr(event, taken) / 1e3 / n_steps for event in seen.key_averages()}


def group_of(kernel: str, s: Sizes) -> str:
    """Return which of the model's kernels one is, by its name; its own name, cut, if it is none."""
    rank = lambda name: COMMON.index(name) if name in COMMON else -1  # noqa: E731
    found = [q.kernel for q in parts(s) if q.kernel in kernel.lower()]
    return min(found, key=rank, default=kernel[:60])


def rows_of(p: Problem, measured: dict[str, float]) -> list[dict[str, object]]:
    """Return a row for the step, and for each group of the model's parts and each other kernel, the longest first."""
    s = Sizes(p.arch, p.d_in, p.d_sae, p.batch, p.k)
    ms: dict[str, float] = defaultdict(float)
    for kernel, taken in measured.items():
        ms[group_of(kernel, s)] += taken
    common = {
        "machine": machine(p.device),
        "arch": p.arch,
        "d_in": p.d_in,
        "d_sae": p.d_sae,
        "batch": p.batch,
        "k": p.k,
    }
    out = [{**common, "what": "step", "ms": sum(ms.values()), "model_ms": sum(q.ms for q in parts(s))}]
    for kernel, taken in sorted(ms.items(), key=lambda item: -item[1])[:MANY]:
        own = [q for q in parts(s) if q.kernel == kernel]
        what = f"{kernel}: {', '.join(q.name for q in own)}" if own else kernel
        moved = sum(q.bytes + q.gathered for q in own)
        out.append({**common, "what": what, "ms": taken, "model_ms": sum(q.ms for q in own), "bytes": round(moved)})
    for row in out:
        row["share_of_floor"] = round(row["ms"] / floor(s), 4)
        row["ms"], row["model_ms"] = round(row["ms"], 4), round(row["model_ms"], 4)
    return out


def table(rows: list[dict[str, object]], p: Problem) -> str:
    """Return Markdown: time, model, and time in floors."""
    lines = [f"\nprofile of {p.arch}, d_in {p.d_in}, d_sae {p.d_sae}, batch {p.batch}, L0 {p.k}, {rows[0]['machine']}"]
    lines += ["", "| kernels | ms | by the model | of it | in floors of a step |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{100 * row['model_ms'] / row['ms']:.0f} %" if row["model_ms"] and row["ms"] else "–"
        model = f"{row['model_ms']:.3f}" if row["model_ms"] else "–"
        lines.append(f"| {row['what']} | {row['ms']:.3f} | {model} | {share} | {row['share_of_floor']:.3f} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 768), ("d-sae", 65536), ("batch", 8192), ("k", 50), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--arch", choices=("topk", "relu", "jumprelu"), default="topk")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="cpu only with TRITON_INTERPRET=1")
    parser.add_argument("--out", type=Path, help="CSV file that the rows are appended to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
