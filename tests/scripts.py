"""Scripts of benchmarks/, run in this process: a new one imports libraries for three seconds."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@dataclass(frozen=True)
class Said:
    """What a script printed, complained of, and ended with."""

    stdout: str
    stderr: str
    returncode: int


def script(name: str, *arguments: Any) -> Said:
    """Run `python benchmarks/NAME.py ARGUMENTS`; an exception other than its exit is raised here."""
    path, code = BENCHMARKS / f"{name}.py", 0
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as streams:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.syspath_prepend(str(path.parent))
        out = streams.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = streams.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return Said(out.getvalue(), err.getvalue(), code)
