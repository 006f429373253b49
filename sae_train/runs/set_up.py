"""What a person sees while the absorption eval is set up: a live line on a terminal, a plain line every few seconds
elsewhere, and a sentence if Ctrl-C ends it."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

FIRST_LINE, PLAIN_EVERY = 1.0, 4.0  # seconds


class SetUpDisplay:
    """Shows how much is done of what `evals.assets.build` reports; use as a context manager around it."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._now, self._since = ("looking for kept words", 0, 1), time.perf_counter()
        self._ended = threading.Event()
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), console=self.console, transient=True)
        self._task = self._bar.add_task(self.sentence(), total=None)
        # A thread speaks, so that the screen is not silent while a model reads one batch for long.
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> SetUpDisplay:
        if self.console.is_terminal:
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        if self.console.is_terminal:
            self._bar.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._say(f"interrupted while {self._now[0]} for the absorption eval: nothing of it is kept; start again")

    def __call__(self, doing: str, done: int, of: int) -> None:
        """Take how much is done of what there is to do."""
        if doing != self._now[0]:
            self._since = time.perf_counter()
        self._now = (doing, done, of)

    def sentence(self) -> str:
        """How far it is, such as "reading words: 12,000 of 31,586, about 40 s left"."""
        doing, done, of = self._now
        if of <= 1:
            return doing
        left = f", about {(time.perf_counter() - self._since) * (of - done) / done:.0f} s left" if done else ""
        return f"{doing}: {done:,} of {of:,}{left}"

    def _refresh(self) -> None:
        wait = 0.25 if self.console.is_terminal else FIRST_LINE
        while not self._ended.wait(wait):
            if self.console.is_terminal:
                _, done, of = self._now
                self._bar.update(self._task, description=self.sentence(), completed=done, total=of if of > 1 else None)
            else:
                self._say(self.sentence())
                wait = PLAIN_EVERY

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, soft_wrap=True)
        self.console.file.flush()
