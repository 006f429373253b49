"""What a process is busy with, how much of it is done, and how long the rest will take."""

from __future__ import annotations

import time

LONG = 2.0  # seconds from which on it is said for how long something that nobody counts has been going on


class Activity:
    """A Progress (evals/contexts.py): it is told what is done, and puts it into a sentence."""

    def __init__(self, doing: str = "starting"):
        self.doing, self.done, self.of = doing, 0, 1
        self._since = self._counted = time.perf_counter()
        self._before = 0

    def __call__(self, doing: str, done: int = 0, of: int = 1) -> None:
        """Take how much is done of what there is to do; `of` is 1 where nobody counts."""
        self._counted = time.perf_counter()
        if doing != self.doing:
            self._since, self._before = self._counted, done
        self.doing, self.done, self.of = doing, done, of

    @property
    def total(self) -> int | None:
        """How much there is to do, where it is counted."""
        return self.of if self.of > 1 else None

    def sentence(self) -> str:
        """Such as "reading words: 12,000 of 31,586, about 40 s left", or "starting, 6 s so far"."""
        now = time.perf_counter()
        if self.total is None:
            return self.doing if now - self._since < LONG else f"{self.doing}, {now - self._since:.0f} s so far"
        newly = self.done - self._before
        tail = ""
        if newly > 0:
            left = (self._counted - self._since) * (self.of - self.done) / newly
            tail = f", about {max(0.0, left - (now - self._counted)):.0f} s left"
        return f"{self.doing}: {self.done:,} of {self.of:,}{tail}"
