"""What a person sees from the first second of a run to its last words.

On a terminal: the newest figures of each SAE, a bar and what is being done, live. Elsewhere: plain lines, now and then
with the figures, and one on what is being done whenever nothing was said for a few seconds.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sae_train.runs.activity import Activity

COLUMNS = {
    "loss": ("losses/loss", "{:.2f}"),
    "L0": ("metrics/l0", "{:.1f}"),
    "EV": ("metrics/explained_variance", "{:.3f}"),
    "loss rec.": ("metrics/ce_loss_score", "{:.3f}"),
    "dead": ("sparsity/dead_fraction", "{:.1%}"),
    "absorption": ("absorption/mean_fraction", "{:.3f}"),
    "full": ("absorption/mean_full", "{:.3f}"),
    "MCC": ("toy/mcc", "{:.3f}"),
    "true absorption": ("toy/absorption", "{:.3f}"),
}
PLAIN_LINES = 20  # about this many lines with figures when the output is not a terminal
FIRST_LINE, LONGEST_SILENCE = 1.0, 4.0  # seconds until a plain line says what is being done
SILENT_SHARE = 1 / 200  # of a run's age so far, so that the log of a long run stays short
TICK = 0.25


class Display:
    """Shows the newest value of each figure and what is being done; use as a context manager around a run.

    Called as a Progress (evals/contexts.py), it hears what is being done.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        """`quiet` shows nothing: another process does."""
        self.console = console or Console(highlight=False, quiet=quiet, force_terminal=False if quiet else None)
        self.activity = Activity()
        self.targets: dict[str, float] = {}
        self.latest: dict[str, dict[str, Any]] = {}
        self.interrupted = "nothing of it is kept: start again"
        """what is to be said where Ctrl-C breaks in, "" for nothing"""
        self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
        self._ended = threading.Event()
        # A thread speaks, so that the screen is not silent while one thing takes long.
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Display:
        self._started = self._last_said = time.perf_counter()
        self._said_anything = False
        if self.console.is_terminal:
            self._live.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._ended.set()
        if self.console.is_terminal:
            self._live.stop()
        else:
            self._thread.join()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.interrupted:
            self.say(f"interrupted while {self.activity.doing}; {self.interrupted}")

    def __call__(self, doing: str, done: int = 0, of: int = 1) -> None:
        """Take what is being done, how much of it is done and how much there is."""
        self.activity(doing, done, of)

    def begin(self, targets: dict[str, float], n_steps: int, batch_tokens: int) -> None:
        """Show the figures of other SAEs: their names, with the L0 asked for."""
        self.targets, self.n_steps, self.batch_tokens = targets, n_steps, batch_tokens
        self.latest = {name: {} for name in targets}
        self._next_plain = 0.0
        self._bar = Progress(
            TextColumn("{task.fields[tokens]}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=n_steps, tokens="", speed="")

    def end(self) -> None:
        """Leave the last figures on the screen: these SAEs are trained."""
        if self.console.is_terminal and self.targets:
            self.console.print(self._table())
        self.targets = {}

    def say(self, sentence: str) -> None:
        """Print one line, above what is live."""
        self._last_said, self._said_anything = time.perf_counter(), True
        self.console.print(sentence, markup=False, soft_wrap=True)
        self.console.file.flush()

    def row(self, row: dict[str, Any]) -> None:
        """Take one row of metrics.jsonl."""
        known = self.latest[row["sae"]]
        known.update({name: row[name] for name, _ in COLUMNS.values() if row.get(name) is not None})
        speed = row.get("details/tokens_per_second")
        self._bar.update(
            self._task,
            completed=row["step"],
            tokens=f"{row['tokens']:,} tokens",
            **({"speed": f"{speed:,.0f} tokens/s"} if speed else {}),
        )
        if self.console.is_terminal:
            return
        if row["sae"] == list(self.targets)[-1] and row["step"] >= self._next_plain:
            self._next_plain = row["step"] + self.n_steps / PLAIN_LINES
            self._print_plain(row, speed)

    def _cells(self, name: str) -> dict[str, str]:
        known = self.latest[name]
        cells = {title: form.format(known[key]) for title, (key, form) in COLUMNS.items() if key in known}
        return cells | {"L0": f"{cells.get('L0', '–')} / {self.targets[name]:g}"}

    def _render(self) -> Group:
        """What is live on a terminal."""
        activity = Text(self.activity.sentence())
        return Group(self._table(), self._bar, activity) if self.targets else Group(activity)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        known = {key for latest in self.latest.values() for key in latest}
        shown = [title for title, (key, _) in COLUMNS.items() if key in known]
        for title in ("SAE", *shown):
            table.add_column(title, justify="left" if title == "SAE" else "right")
        for name in self.targets:
            cells = self._cells(name)
            table.add_row(name, *[cells.get(title, "–") for title in shown])
        return table

    def _print_plain(self, row: dict[str, Any], speed: float | None) -> None:
        left = (self.n_steps - row["step"]) * self.batch_tokens / speed if speed else None
        tail = f", {speed:,.0f} tokens/s, {left:.0f} s of training left" if left is not None else ""
        self.say(f"step {row['step']}/{self.n_steps}, {row['tokens']:,} tokens{tail}")
        for name in self.targets:
            figures = ", ".join(f"{title} {cell}" for title, cell in self._cells(name).items())
            self.say(f"  {name}: {figures}")

    def _speak(self) -> None:
        while not self._ended.wait(min(TICK, FIRST_LINE)):
            now = time.perf_counter()
            most = max(LONGEST_SILENCE, SILENT_SHARE * (now - self._started)) if self._said_anything else FIRST_LINE
            if now - self._last_said >= most:
                self.say(self.activity.sentence())


def is_first() -> bool:
    """Whether this is the process that speaks, of several; before they know each other."""
    return int(os.environ.get("RANK", "0")) == 0


def aside() -> Display:
    """A display on standard error of what is looked up before a run or a plan, which stays alone on standard output."""
    display = Display(Console(stderr=True, highlight=False, quiet=not is_first()))
    display.interrupted = "nothing was begun"
    return display
