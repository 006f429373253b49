"""What a person sees while a run goes on: one live line per SAE on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

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
PLAIN_LINES = 20  # about this many progress lines when the output is not a terminal


class Display:
    """Shows the newest value of each figure; use as a context manager around the loop."""

    def __init__(
        self,
        targets: dict[str, float],
        n_steps: int,
        batch_tokens: int,
        console: Console | None = None,
        quiet: bool = False,
    ):
        """`quiet` shows nothing: another process does."""
        self.console = console or Console(highlight=False, quiet=quiet, force_terminal=False if quiet else None)
        self.targets, self.n_steps, self.batch_tokens = targets, n_steps, batch_tokens
        self.latest: dict[str, dict[str, Any]] = {name: {} for name in targets}
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
        self._live = Live(self._bar, console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._started = time.perf_counter()

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live:
            self._live.__exit__(*details)

    def say(self, sentence: str) -> None:
        """Print one line above the progress display."""
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
        if self._live:
            self._live.update(self._table())
        elif row["sae"] == list(self.targets)[-1] and row["step"] >= self._next_plain:
            self._next_plain = row["step"] + self.n_steps / PLAIN_LINES
            self._print_plain(row, speed)

    def _cells(self, name: str) -> dict[str, str]:
        known = self.latest[name]
        cells = {title: form.format(known[key]) for title, (key, form) in COLUMNS.items() if key in known}
        return cells | {"L0": f"{cells.get('L0', '–')} / {self.targets[name]:g}"}

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        known = {key for latest in self.latest.values() for key in latest}
        shown = [title for title, (key, _) in COLUMNS.items() if key in known]
        for title in ("SAE", *shown):
            table.add_column(title, justify="left" if title == "SAE" else "right")
        for name in self.targets:
            cells = self._cells(name)
            table.add_row(name, *[cells.get(title, "–") for title in shown])
        outer = Table.grid()
        outer.add_row(table)
        outer.add_row(self._bar)
        return outer

    def _print_plain(self, row: dict[str, Any], speed: float | None) -> None:
        left = (self.n_steps - row["step"]) * self.batch_tokens / speed if speed else None
        tail = f", {speed:,.0f} tokens/s, {left:.0f} s of training left" if left is not None else ""
        self.say(f"step {row['step']}/{self.n_steps}, {row['tokens']:,} tokens{tail}")
        for name in self.targets:
            figures = ", ".join(f"{title} {cell}" for title, cell in self._cells(name).items())
            self.say(f"  {name}: {figures}")
