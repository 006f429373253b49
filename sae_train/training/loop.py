"""The loop: activation batches in, trained learners and logged rows out. It knows neither evals nor files.

Callbacks look at a learner between steps; the training clock stands still and random state is put back meanwhile.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sae_train.training.ranks import Ranks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.training.learner import Learner

Look = Callable[["Learner", int], Iterable[tuple[str, Any]]]
MAX_TURN = 5  # steps that an SAE of a grid takes in a row on a CPU: 3 % faster than one by one; Ctrl-C waits for it
SAME_REQUEST = 1.0  # seconds in which signals to stop count as one
MIN_SPACING = 0.5  # of a period: a regular step nearer than this to the last one is left out


def every(period: int, n_steps: int) -> frozenset[int]:
    """Steps 0, period, 2·period, … and the last one, without a double just before the end."""
    regular = range(0, n_steps, period)
    return frozenset(step for step in regular if n_steps - step >= MIN_SPACING * period) | {0, n_steps}


def spread(times: int, n_steps: int) -> frozenset[int]:
    """About `times` steps from 0 to the last: half of them evenly spaced, half crowded towards the start."""
    n_even = max(1, times // 2)
    even = {round(n_steps * i / n_even) for i in range(n_even + 1)}
    n_early = max(0, times - len(even))
    first = n_steps / n_even
    early = {round(first * 0.5 ** (n_early - i)) for i in range(n_early)}
    return frozenset(even | {step for step in early if step > 0})


@dataclass(frozen=True)
class Callback:
    """What to look at (`look(learner, step)` yields (name, value) pairs) and at which steps."""

    look: Look
    steps: frozenset[int]


@dataclass
class Clock:
    """Seconds of training, without what callbacks took; their own seconds are counted beside."""

    training: float = 0.0
    paused_for: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count what happens inside as pause."""
        start = self.tick()
        yield
        now = time.perf_counter()
        self.paused_for += now - start
        self._since = now

    def start(self) -> None:
        """Begin to count now: what came before was preparation."""
        self._since = time.perf_counter()

    def tick(self) -> float:
        """Add the time since the last look to the training seconds."""
        now = time.perf_counter()
        self.training += now - self._since
        self._since = now
        return now


class StopRequest:
    """Ctrl-C asks the loop to stop after its step, when everything is consistent; a second Ctrl-C breaks at once.

    Signals within SAME_REQUEST seconds of the first are the same request: a scheduler signals torchrun and its
    processes, and torchrun passes its own signal on. `requested` is also set when another process was asked.
    """

    def __init__(self) -> None:
        self.requested = False
        self._asked: float | None = None

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            self._previous = {sig: signal.signal(sig, self._ask) for sig in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in getattr(self, "_previous", {}).items():
            signal.signal(sig, handler)

    def _ask(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._asked is not None and now - self._asked > SAME_REQUEST:
            raise KeyboardInterrupt
        self._asked = self._asked or now
        self.requested = True


def fit(
    batches: Iterator[Float[Tensor, "batch d_in"]],
    learners: list[Learner],
    callbacks: list[Callback],
    *,
    start: int,
    n_steps: int,
    log: Callable[[Learner, int, dict[str, Any]], None],
    before_last_look: Callable[[Learner], None],
    save: Callable[[int], None],
    save_steps: frozenset[int],
    clock: Clock,
    stop: StopRequest,
    ranks: Ranks | None = None,
    owned: Collection[str] | None = None,
    hand_in: Callable[[], None] = lambda: None,
) -> int:
    """Train all learners on the same scaled batches from step `start` to `n_steps`; return the steps done.

    A learner that failed is left alone while the others go on. `before_last_look` calibrates a finished learner.
    Of several processes (`ranks`) each looks at the learners it owns, all come to `hand_in` after each look, and all
    stop after the same step. On a CPU the learners of a grid take turns of up to MAX_TURN steps in one process.
    """
    ranks = ranks or Ranks()
    clock.start()
    step, due = start, frozenset({n_steps}).union(save_steps, *(callback.steps for callback in callbacks))
    while True:
        if step > start or start == 0:  # a saved state was calibrated and looked at before it was saved
            for learner in running(learners) if step == n_steps else ():
                before_last_look(learner)
            look_at(learners, callbacks, step, log, clock, owned, hand_in)
        if step > start and step in save_steps:
            with clock.paused():
                save(step)
        stop.requested, any_left = ranks.any(stop.requested, bool(running(learners)))
        if step == n_steps or stop.requested or not any_left:
            return step
        taken = [next(batches) for _ in range(_turn(step, due, learners, ranks))]
        for learner in running(learners):
            for x in taken:
                learner.last = learner.step(x)
        step += len(taken)


def _turn(step: int, due: Collection[int], learners: list[Learner], ranks: Ranks) -> int:
    """How many steps each learner takes before the next one does: on a CPU its weights stay in cache meanwhile.

    Several processes go step by step, since one may hold a single learner and another two.
    """
    grid = len(learners) > 1 and ranks.size == 1
    most = MAX_TURN if grid and learners[0].device.type == "cpu" else 1
    return next(n for n in range(1, most + 1) if n == most or step + n in due)


def running(learners: list[Learner]) -> list[Learner]:
    """Learners that have not failed."""
    return [learner for learner in learners if learner.failed is None]


def look_at(
    learners: list[Learner],
    callbacks: list[Callback],
    step: int,
    log: Callable[[Learner, int, dict[str, Any]], None],
    clock: Clock,
    owned: Collection[str] | None = None,
    hand_in: Callable[[], None] = lambda: None,
) -> None:
    """Run the callbacks that are due at `step` on every learner (that is owned), and log one row for each."""
    due = [callback for callback in callbacks if step in callback.steps]
    if not due:
        return
    with clock.paused(), forked_rng():
        for learner in running(learners):
            learner.check()
            if learner.failed is None and (owned is None or learner.name in owned):
                log(
                    learner,
                    step,
                    {name: value for callback in due for name, value in callback.look(learner, step)},
                )
        hand_in()


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Put torch's global random state back afterwards, on every device."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
