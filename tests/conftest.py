"""No network, signals as they are by default, checked shapes, poisoned allocations, and the optional folder of real
models and text."""

import builtins
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sae-train-tests-")

import jaxtyping
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted

    interpreted.quicken()

ROOT = Path(__file__).resolve().parents[1]
# Seams whose shapes are checked in tests at every call, but for a learner's steps after its first ones. The library
# imports their annotations' names for type checkers alone, so that users need no jaxtyping; here they are found among
# the builtins while the modules are imported.
CHECKED = (
    "sae_train.kernels.ops",
    "sae_train.sae.model",
    "sae_train.training.losses",
    "sae_train.evals.figures",
    "sae_train.evals.intervals",
    "sae_train.evals.scoring",
)
with pytest.MonkeyPatch.context() as patch, jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    for name in ("Bool", "Float", "Int"):
        patch.setattr(builtins, name, getattr(jaxtyping, name), raising=False)
    for module in CHECKED:
        import_module(module)
LONGEST_FIRST = (  # so that no process is left alone with one of these at the end
    "docs", "ranks", "run", "triton_kernels", "several_hooks", "random_baseline", "endings", "suite", "eval_of_files",
    "waits", "faults", "study", "bench", "init_from", "report", "publish", "neuronpedia",
)  # fmt: skip
N_CHECKED_STEPS = 20  # of a learner: the checks are a seventh of the time of small runs


def pytest_configure() -> None:
    """Take the signals back that tests send: started in the background or with nohup, a process has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the files that take longest first, each as a whole."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True, scope="session")
def shapes_of_the_first_steps() -> Iterator[None]:
    """Check shapes in the first steps of each learner alone."""
    from sae_train.training.learner import Learner

    step, config = Learner.step, jaxtyping.config

    def step_unchecked_later(learner, x):
        before = config.jaxtyping_disable
        config.update("jaxtyping_disable", before or learner.step_count >= N_CHECKED_STEPS)
        try:
            return step(learner, x)
        finally:
            config.update("jaxtyping_disable", before)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Learner, "step", step_unchecked_later)
        yield


@pytest.fixture(autouse=True, scope="session")
def short_looks() -> Iterator[None]:
    """Let runs measure loss recovered on few tokens, draw one random SAE in place of three, and save twice in place of
    ten times: a third of small runs."""
    from sae_train.evals import baselines, fidelity
    from sae_train.runs import runner

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fidelity, "FIDELITY_TOKENS", 512)
        patched.setattr(baselines, "random_score", partial(baselines.random_score, draws=1))
        patched.setattr(runner, "N_SAVED", 2)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as each of several processes has: sums then round alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager]:
    """Return a context in which a run is interrupted after so many steps."""
    from sae_train.training import loop

    @contextmanager
    def interrupted(step: int) -> Iterator[None]:
        turn = loop._turn

        def stop_later(work, due):
            if work.step > step:
                raise KeyboardInterrupt
            return turn(work, due)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(loop, "_turn", stop_later)
            yield

    return interrupted


@pytest.fixture
def shared_data() -> Path:
    """Folder with real pretrained models and text that are not part of the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the optional folder ../shared/data is absent")
    return folder


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill float allocations of torch.empty with NaN, so that code which forgets to write is caught."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def no_progress_after_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the lines that say what takes long out of what tests read: on a slow machine everything takes long.

    Tests of these lines set the times themselves, and commands in processes of their own have them.
    """
    from sae_train.runs import display

    monkeypatch.setattr(display, "FIRST_LINE", 600.0)
    monkeypatch.setattr(display, "LONGEST_SILENCE", 600.0)
