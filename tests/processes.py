"""The processes of one run, as a launcher starts them, but forked from one that has imported the libraries already.

What a launcher does itself (passing signals on, ending the others where one is gone) is tested with torchrun.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
MODEL = "transformers.models.smollm3.modeling_smollm3"  # of the embedded model
FORKED.set_forkserver_preload(["accelerate", "torch.distributed.tensor", MODEL, "sae_train.runs.runner"])


def in_processes(n: int, work: Callable[..., None], *given: Any) -> None:
    """Call work(rank, *given) in n processes; an exception in one of them is raised here."""
    from torch.multiprocessing import start_processes

    start_processes(work, given, nprocs=n, start_method="forkserver")


class Launched:
    """`python -m sae_train ARGUMENTS` in several processes that know of each other, of one thread each."""

    def __init__(self, *arguments: str, processes: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="processes-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        given = [where | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self.processes = [FORKED.Process(target=_run, args=(arguments, each, self.folder)) for each in given]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def interrupt(self) -> None:
        """Do what Ctrl-C in a terminal does."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGINT)

    def end(self, timeout: float = 200) -> tuple[list[int], str, str]:
        """Return exit codes, and what the first process printed and complained."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes, *((self.folder / f"0.{name}").read_text() for name in ("out", "err"))


def _run(arguments: tuple[str, ...], environment: dict[str, str], folder: Path) -> None:
    import torch

    from sae_train.cli import main

    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{environment['RANK']}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = main(list(arguments))
    atexit._run_exitfuncs()  # which multiprocessing passes over
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
