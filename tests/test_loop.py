"""The loop: when callbacks run, that a failing SAE leaves its neighbours alone, and that the clock stands still."""

import contextlib
import itertools
import signal
import time

import pytest
import torch

from sae_train.config import SAESpec, TrainSettings
from sae_train.runs.callbacks import density_histogram
from sae_train.training import loop
from sae_train.training.learner import Learner
from sae_train.training.loop import Clock, Scheduled, StopRequest, every, fit, forked_rng, spread
from sae_train.training.ranks import Ranks


def test_every_has_first_and_last_and_no_double_near_the_end():
    assert sorted(every(10, 30)) == [0, 10, 20, 30]
    assert sorted(every(10, 34)) == [0, 10, 20, 34]
    assert sorted(every(10, 37)) == [0, 10, 20, 30, 37]
    assert sorted(every(100, 7)) == [0, 7]


def test_spread_gives_about_as_many_steps_as_asked_crowded_early():
    steps = sorted(spread(12, 489))
    assert len(steps) == 12
    assert steps[0] == 0
    assert steps[-1] == 489
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps == sorted(gaps) or max(gaps) < 90
    assert sorted(spread(1, 50)) == [50]
    assert sorted(spread(2, 50)) == [0, 50]


class Work:
    """The loop's work without files: what `fit` asks of a session."""

    save_steps, looked, whole, rewinding = (), False, True, contextlib.nullcontext

    def __init__(self, learners, batches, n_steps, clock=None, stop=None):
        self.learners, self._batches, self.n_steps, self.step = learners, batches, n_steps, 0
        self.owned = {learner.name for learner in learners}
        self.clock, self.stop, self.ranks = clock or Clock(), stop or StopRequest(), Ranks()
        self.rows = []

    def batches(self):
        return ({"": x} for x in self._batches)

    def calibrate(self, learner):
        pass

    def log(self, learner, step, values):
        self.rows.append((learner.name, step, values))

    def hand_in(self):
        pass

    def doing(self, what, done=0, of=1):
        pass


def run(learners, batches, n_steps, callbacks, **options):
    work = Work(learners, batches, n_steps, **options)
    fit(work, callbacks, work)
    return work.step, work.rows


def learner(seed: int, x: torch.Tensor, arch: str = "topk") -> Learner:
    made = Learner(
        SAESpec(arch=arch, width=32, l0=4, seed=seed), TrainSettings(tokens=6400, batch_tokens=64), x.shape[1], 20
    )
    made.initialise(x)
    return made


def data(n_steps: int = 20) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(64, 8, generator=g) for _ in range(n_steps)]


def test_a_nan_planted_in_one_sae_ends_that_one_only():
    batches = data()
    broken, whole, alone = (learner(seed, batches[0]) for seed in (1, 2, 2))
    broken.sae.b_enc.data[3] = float("nan")
    look = Scheduled(lambda learner, step: [("step", step)], every(5, 20))
    done, rows = run([broken, whole], batches, 20, [look])
    run([alone], batches, 20, [look])
    assert done == 20
    assert broken.failed.startswith("step 0")
    assert whole.failed is None
    assert torch.equal(whole.sae.W_enc, alone.sae.W_enc)
    assert {name for name, step, _ in rows if step == 20} == {whole.name}


def test_saes_of_a_grid_take_turns_of_a_few_steps_up_to_what_is_due(monkeypatch):
    batches, seen, looked = data(), [], []
    learners = [learner(seed, batches[0]) for seed in (1, 2)]
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, x: seen.append(self) or step(self, x))
    look = Scheduled(lambda learner, step: looked.append((learner.step_count, step)) or (), frozenset({0, 6, 20}))
    assert run(learners, batches, 20, [look])[0] == 20
    assert looked == [(0, 0)] * 2 + [(6, 6)] * 2 + [(20, 20)] * 2
    turns = [len(list(group)) for _, group in itertools.groupby(seen, key=id)]
    assert turns == [5, 5, 1, 1, 5, 5, 5, 5, 4, 4]


@pytest.mark.parametrize(("takes_bfloat16", "inside"), [(True, "high"), (False, "highest")])
def test_products_are_in_tf32_where_bfloat16_is_taken_and_only_during_steps(takes_bfloat16, inside, monkeypatch):
    seen, made = set(), learner(0, data()[0])
    made.bfloat16 = takes_bfloat16

    def note(what):
        seen.add((what, torch.get_float32_matmul_precision()))
        return {}

    monkeypatch.setattr(Learner, "step", lambda self, x: note("step"))
    run([made], (note("batch") or x for x in data()), 20, [Scheduled(lambda *_: note("look").items(), every(5, 20))])
    assert seen == {("step", inside), ("batch", "highest"), ("look", "highest")}


def test_a_callback_changes_no_random_state_and_stops_the_clock():
    clock = Clock()

    def look(learner, step):
        torch.rand(3)
        time.sleep(0.05)
        yield "x", 1

    before = torch.random.get_rng_state()
    run([learner(0, data()[0])], data(), 20, [Scheduled(look, every(10, 20))], clock=clock)
    assert torch.equal(before, torch.random.get_rng_state())
    assert clock.paused_for >= 0.15
    with forked_rng():
        torch.rand(1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_stop_request_ends_the_loop_after_its_step():
    stop = StopRequest()

    def look(learner, step):
        stop.requested = step == 10
        return ()

    done, _ = run([learner(0, data()[0])], data(), 20, [Scheduled(look, every(5, 20))], stop=stop)
    assert done == 10


@pytest.mark.parametrize("asked_at", [0, 10, 20])
def test_a_request_breaks_off_the_looks_of_a_lone_process(asked_at):
    looked = []

    def look(learner, step):
        looked.append((learner.name, step))
        if step == asked_at:
            signal.raise_signal(signal.SIGINT)
        return ()

    with StopRequest() as stop:
        work = Work([learner(0, data()[0]), learner(1, data()[0])], data(), 20, stop=stop)
        with pytest.raises(KeyboardInterrupt):
            fit(work, [Scheduled(look, every(10, 20))], work)
        signal.raise_signal(signal.SIGINT)  # what comes while the run is saved does not break that
    assert looked[-1] == (work.learners[0].name, asked_at)
    assert work.step == asked_at
    assert work.whole
    assert not work.looked
    assert work.clock.paused_for > 0


def test_a_request_from_before_a_look_ends_the_run_without_it():
    work = Work([learner(0, data()[0])], data(), 20)
    work.stop.requested = True
    with pytest.raises(KeyboardInterrupt):
        fit(work, [Scheduled(lambda learner, step: [("x", 1)], every(10, 20))], work)
    assert work.rows == []


@pytest.mark.parametrize("asked_at", [0, 3, 19])
def test_a_stop_asked_for_while_processes_wait_for_each_other_is_not_lost(asked_at):
    class Waiting(Ranks):
        waits = 0

        def any(self, *flags):
            answer = super().any(*flags)  # from before the signal: the others do not know of it yet
            if self.waits == asked_at:
                signal.raise_signal(signal.SIGINT)
            self.waits += 1
            return answer

    with StopRequest() as stop:
        work = Work([learner(0, data()[0])], data(), 20, stop=stop)
        work.ranks = Waiting()
        fit(work, [], work)
    assert work.step == asked_at + 1
    assert stop.agreed


def test_signals_at_once_are_one_request_and_a_later_one_breaks_at_once(monkeypatch):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        monkeypatch.setattr(loop, "SAME_REQUEST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_density_histogram_counts_every_latent_that_fires():
    density = torch.tensor([0.0, 1.0, 0.5, 1e-5, 1e-7, 0.01])
    counts = density_histogram(density)
    assert sum(counts) == 5
    assert counts[0] == 2
    assert counts[-1] == 2
