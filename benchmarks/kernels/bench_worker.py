"""One side of the benchmark in a process of its own: JSON requests on stdin, JSON answers on stdout, a line each.

{"do": "build", "side": …, "equalised": …, "threads": …, sizes}   → {"versions", "mse"}
{"do": "time", "seconds": s}   → {"ms": [whole steps]}
{"do": "parts"}                → {"forward", "backward", "optimiser"} in ms
{"do": "memory"}               → {"mib", "method"}
{"do": "dense"}                → {"shapes"} of (batch, d_sae) or more
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import checks
from benchmarks.kernels.bench_peers import PACKAGES, PEERS
from benchmarks.kernels.bench_problem import Problem, batches, decoder_rows, level
from benchmarks.kernels.bench_sides import SIDES

MIB = 2**20
WARM_UP_STEPS = {"cpu": 2, "cuda": 5}  # on a GPU enough for steps to be recorded


class Worker:
    """Holds the side that was built last."""

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request["threads"])
        self.p = Problem.of(request)
        make = {**SIDES, **PEERS}[request["side"]][0]
        rows = decoder_rows(self.p)
        self.xs = batches(self.p, rows)
        self.n_steps = 0
        self.side = make(self.p, rows, level(self.p, rows, self.xs[0]), request["equalised"])
        del rows
        mse = None
        if hasattr(self.side, "reconstruct"):
            with torch.no_grad():
                mse = (self.side.reconstruct(self.xs[0]) - self.xs[0]).square().sum(1).mean().item()
        self.before = self._resident(peak=False)
        for _ in range(WARM_UP_STEPS[self.p.device]):
            self._step()
        self._now()  # no side is to work while another is timed
        return {"mse": mse, "versions": self._versions(request["side"])}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        self._step()  # untimed: the other sides ran meanwhile, and caches are theirs
        taken: list[float] = []
        while not taken or sum(taken) < 1e3 * request["seconds"]:
            start = self._now()
            self._step()
            taken.append(self._now() - start)
        return {"ms": taken}

    def parts(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time what comes before, in and after the step's call of Tensor.backward."""
        marks: list[float] = []
        backward = torch.Tensor.backward

        def mark_and_go_on(*args: Any, **kwargs: Any) -> None:
            marks.append(self._now())
            backward(*args, **kwargs)
            marks.append(self._now())

        self._step(recorded=False)  # untimed, as in time
        torch.Tensor.backward = mark_and_go_on
        try:
            start = self._now()
            self._step(recorded=False)
            end = self._now()
        finally:
            torch.Tensor.backward = backward
        if not marks:
            return {}
        return {"forward": marks[0] - start, "backward": marks[1] - marks[0], "optimiser": end - marks[1]}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Peak of a step over what is held before the first one, less the optimiser's moments."""
        self._reset_peak()
        for _ in range(len(self.xs)):
            self._step()
        peak = self._resident(peak=True) - self.before - self._moments()
        return {"mib": peak / MIB, "method": "peak RSS" if self.p.device == "cpu" else "CUDA allocator"}

    def dense(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a step and return the shapes of tensors as large as (batch, d_sae)."""
        step = partial(self._step, recorded=False)
        return {"shapes": sorted(checks.dense_blocks(step, self.p.batch, self.p.d_in, self.p.d_sae))}

    def _step(self, recorded: bool = True) -> None:
        step = self.side.step if recorded else getattr(self.side, "unrecorded_step", self.side.step)
        step(self.xs[self.n_steps % len(self.xs)])
        self.n_steps += 1

    def _now(self) -> float:
        if self.p.device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def _moments(self) -> int:
        states = [s for o in self.side.optimisers() for s in o.state.values()]
        tensors = [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _reset_peak(self) -> None:
        if self.p.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        else:
            torch.cuda.reset_peak_memory_stats()

    def _resident(self, peak: bool) -> int:
        if self.p.device != "cpu":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        name = "VmHWM:" if peak else "VmRSS:"
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    def _versions(self, side: str) -> str:
        named = f"torch {torch.__version__}"
        return f"{PACKAGES[side]} {version(PACKAGES[side])} {named}" if side in PACKAGES else named


def answer(request: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Do what is asked; a package that is not there, or sizes that do not fit, become part of the answer."""
    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "build": worker.build, "time": worker.time, "parts": worker.parts, "memory": worker.memory,
        "dense": worker.dense,
    }  # fmt: skip
    try:
        return actions[request["do"]](request)
    except (ImportError, PackageNotFoundError) as error:
        return {"missing": f"{type(error).__name__}: {error}"}
    except (RuntimeError, MemoryError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes to stderr
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), worker)), file=answers, flush=True)


if __name__ == "__main__":
    main()
