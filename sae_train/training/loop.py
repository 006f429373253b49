"""The training loop: on every batch every learner takes a step. It knows neither evals nor files.

Callbacks look at a learner between steps; the training clock stands still and random state is put back meanwhile.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sae_train.training.precision import matmul_precision

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.training.learner import Learner
    from sae_train.training.ranks import Ranks

Look = Callable[["Learner", int], Iterable[tuple[str, Any]]]
MAX_TURN = 5  # steps that an SAE of a grid takes in a row on a CPU: 3 % faster than one by one; Ctrl-C waits for it
SAME_REQUEST = 1.0  # seconds in which signals to stop count as one
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MIN_SPACING = 0.5  # of a period: a regular step nearer than this to the last one is left out


def every(period: int, n_steps: int) -> frozenset[int]:
    """Steps 0, period, 2·period, … and the last one, without a double just before the end."""
    regular = range(0, n_steps, period)
    return frozenset(step for step in regular if n_steps - step >= MIN_SPACING * period) | {0, n_steps}


def spread(times: int, n_steps: int) -> frozenset[int]:
    """About `times` steps from 0 to the last: half evenly spaced, half crowded towards the start; one is the last."""
    if times == 1:
        return frozenset({n_steps})
    n_even = max(1, times // 2)
    even = {round(n_steps * i / n_even) for i in range(n_even + 1)}
    n_early = max(0, times - len(even))
    first = n_steps / n_even
    early = {round(first * 0.5 ** (n_early - i)) for i in range(n_early)}
    return frozenset(even | {step for step in early if step > 0})


@dataclass(frozen=True)
class Scheduled:
    """A look (`look(learner, step)` yields (name, value) pairs) and the steps at which it is taken."""

    look: Look
    steps: frozenset[int]
    whole: bool = False
    """whether it looks at weights, which are then gathered where they are split over processes"""


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
        try:
            yield
        finally:
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


class Stopped(KeyboardInterrupt):
    """All processes were asked to stop, and have."""


class StopRequest:
    """Ctrl-C asks the loop to stop after its step, when everything is consistent; a second Ctrl-C breaks at once.

    So do SIGTERM and the end of a terminal, unless nohup has it ignored. Signals within SAME_REQUEST seconds of the
    first are the same request: a scheduler signals torchrun and its processes, and torchrun passes its own signal on.
    Outside of steps, where `at_once` is set, the first one breaks as well.

    `requested`: this process was asked, perhaps while it waits for the others. `agreed`: all processes know of it.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = self.at_once = False
        self._asked: float | None = None

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            taken = [sig for sig in STOPPING if signal.getsignal(sig) is not signal.SIG_IGN]
            self._previous = {sig: signal.signal(sig, self._ask) for sig in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in getattr(self, "_previous", {}).items():
            signal.signal(sig, handler)

    @contextlib.contextmanager
    def breaking(self, can_break: bool = True) -> Iterator[None]:
        """Break off what happens inside at the first request, also at one that came before, if it can be made again."""
        if can_break and self.requested:
            raise KeyboardInterrupt
        self.at_once = can_break
        try:
            yield
        finally:
            self.at_once = False

    def _ask(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.at_once or (self._asked is not None and now - self._asked > SAME_REQUEST):
            raise KeyboardInterrupt
        self._asked = self._asked or now
        self.requested = True


class Work(Protocol):
    """What the loop asks of a run in memory: its data, its learners, and how it is looked at, saved and stopped."""

    learners: list[Learner]
    ranks: Ranks
    owned: Collection[str]
    """names of the learners that this process looks at, alone or with those that hold other latents of them"""
    step: int
    """steps done; the loop counts it up"""
    looked: bool
    """whether the looks that are due at this step have been taken"""
    whole: bool
    """whether all learners are at this step, so that the work can be saved as it is"""
    n_steps: int
    clock: Clock
    stop: StopRequest
    save_steps: Collection[int]

    def batches(self) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        """Return scaled training batches without end: for each step one of every hook, as its SAEs' specs name it."""

    def rewinding(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that puts the data back to where it was if what happens inside fails."""

    def calibrate(self, learner: Learner) -> None:
        """Bring a finished learner's L0 to its target."""

    def save(self) -> None:
        """Write what a resumed run starts from."""


class Log(Protocol):
    """Takes what callbacks yield."""

    def log(self, learner: Learner, step: int, values: dict[str, Any]) -> None:
        """Take the figures of one learner at one step."""

    def hand_in(self) -> None:
        """Take note that a look is over; of several processes, all come here after each."""

    def doing(self, what: str, done: int = 0, of: int = 1) -> None:
        """Take note of what is being done, how much of it is done and how much there is."""


def fit(work: Work, callbacks: list[Scheduled], log: Log) -> None:
    """Train all learners on the same batches to the last step, or until a stop is requested.

    A learner that failed is left alone while the others go on. Of several processes all stop after the same step. On a
    CPU the learners of a grid take turns of up to MAX_TURN steps in one process. Where something fails, `work` says
    whether it can be saved as it is: it can, but for a failure in the midst of steps.
    """
    work.clock.start()
    batches, begun = work.batches(), work.step
    due = frozenset({work.n_steps}).union(work.save_steps, *(callback.steps for callback in callbacks))
    while True:
        if not work.looked:
            look_at(work, callbacks, log)
            work.looked = True
        if work.step > begun and work.step in work.save_steps:
            with work.clock.paused():
                work.save()
        work.stop.agreed, any_left = work.ranks.any(work.stop.requested, bool(running(work.learners)))
        if work.step == work.n_steps or work.stop.agreed or not any_left:
            return
        log.doing("training steps", work.step, work.n_steps)
        with work.rewinding():
            taken = [next(batches) for _ in range(_turn(work, due))]
        work.whole = False
        with tf32_products(work.learners):
            for learner in running(work.learners):
                for x_at in taken:
                    learner.last = learner.step(x_at[learner.spec.hook])
        work.step += len(taken)
        for learner in running(work.learners) if work.step == work.n_steps else ():
            log.doing(f"calibrating the L0 of {learner.name}")
            work.calibrate(learner)
        work.looked, work.whole = False, True


def _turn(work: Work, due: Collection[int]) -> int:
    """How many steps each learner takes before the next one does: on a CPU its weights stay in cache meanwhile.

    Several processes go step by step, since one may hold a single learner and another two.
    """
    grid = len(work.learners) > 1 and work.ranks.size == 1
    most = MAX_TURN if grid and work.learners[0].device.type == "cpu" else 1
    return next(n for n in range(1, most + 1) if n == most or work.step + n in due)


@contextlib.contextmanager
def tf32_products(learners: Iterable[Learner]) -> Iterator[None]:
    """Let float32 products be in TF32 while learners step that take bfloat16, and as they were before and after.

    PyTorch knows one precision for a whole process, and the language model and the evals, which have their turn between
    steps, are not to lose theirs.
    """
    takes = any(learner.bfloat16 for learner in learners)
    with matmul_precision("high") if takes else contextlib.nullcontext():
        yield


def running(learners: list[Learner]) -> list[Learner]:
    """Learners that have not failed."""
    return [learner for learner in learners if learner.failed is None]


def look_at(work: Work, callbacks: list[Scheduled], log: Log) -> None:
    """Run the callbacks that are due on every learner that is owned, and log one row for each.

    A request breaks this off in a lone process: others would wait for one that ends by itself.
    """
    step, due = work.step, [callback for callback in callbacks if work.step in callback.steps]
    if not due:
        return
    with work.stop.breaking(work.ranks.size == 1), work.clock.paused(), forked_rng():
        for learner in running(work.learners):
            learner.check()
            if learner.failed is None and learner.name in work.owned:
                with learner.gathered() if any(each.whole for each in due) else contextlib.nullcontext():
                    if learner.leads:
                        log.doing(f"looking at {learner.name}, step {step:,}")
                        values = {name: value for each in due for name, value in each.look(learner, step)}
                        log.log(learner, step, values)
        log.hand_in()


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Put torch's global random state back afterwards, on every device."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield
