"""The k largest of each row: torch.topk against ours, side by side, at the widths of small SAEs.

    python benchmarks/top_k.py [--threads 2]

The two take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

SHAPES = ((1024, 10), (1024, 25), (1024, 50), (1024, 100), (2048, 50), (2048, 100), (4096, 100), (16_384, 50))
ROWS, ROUNDS = 2048, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    threads = parser.parse_args().threads
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch

    import torch

    from sae_train.kernels.patterns import group_size, top_k

    torch.set_num_threads(threads)
    ways = {"torch.topk": lambda x, k: x.topk(k, sorted=False), "ours": top_k}
    print(f"{ROWS} rows, {threads} threads, ms\n\n| d_sae | k | group | torch.topk | ours |\n|---|---|---|---|---|")
    for d_sae, k in SHAPES:
        x = torch.randn(ROWS, d_sae)
        values = [way(x, k)[0].sort(1).values for way in ways.values()]
        assert torch.equal(*values)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.perf_counter()
                way(x, k)
                times[name].append(1e3 * (time.perf_counter() - start))
        cells = " | ".join(f"{statistics.median(way):.1f}" for way in times.values())
        print(f"| {d_sae} | {k} | {group_size(d_sae, k)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
