"""Whatever ends a run: what is saved and said, and that the resumed run ends as the unbroken one."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sae_train import train
from sae_train.cli import main
from sae_train.data.toy_source import ToyStream
from sae_train.errors import UserError
from sae_train.runs import run as run_module
from sae_train.runs import runner
from sae_train.runs.finisher import Finisher
from sae_train.runs.log import RunLog
from sae_train.runs.run import Run, resume
from sae_train.runs.session import newest_state
from sae_train.training.learner import Learner
from sae_train.training.loop import StopRequest

TOY = {
    "model": "toy", "width": "32,48", "l0": 3, "arch": "topk,jumprelu", "tokens": 6400, "batch_tokens": 64,
    "held_out_tokens": 512, "absorption": False, "absorption_evals": 3, "log_every": 10, "save_every": 30,
    "device": "cpu",
}  # fmt: skip
N_STEPS = 100
TIMED = ("seconds", "details/tokens_per_second")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A small grid on the toy that nothing disturbed."""
    return train(**TOY, out=tmp_path_factory.mktemp("toy"), name="unbroken").path


def assert_same_end(run: Path, whole: Path) -> None:
    """The same weights bit for bit, the same rows, every file there."""
    folders = sorted(path.name for path in (whole / "saes").iterdir())
    assert sorted(path.name for path in (run / "saes").iterdir()) == folders
    for name in folders:
        one, two = (load_file(each / "saes" / name / "sae_weights.safetensors") for each in (run, whole))
        assert all(torch.equal(one[tensor], two[tensor]) for tensor in one), name
        assert (run / "saes" / name / "README.md").is_file()
    assert rows_of(run) == rows_of(whole)
    assert (run / "report.html").is_file()
    assert read(run)["status"] == "finished" and read(run)["ended_by"] is None


def rows_of(run: Path) -> list[dict]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def read(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def fail_after(n: int, error: BaseException, then=lambda *_: None):
    """A function that raises at its n-th call and passes all others on to `then`."""
    calls = []

    def count(*arguments):
        calls.append(1)
        if len(calls) == n:
            raise error
        return then(*arguments)

    return count


FAILURES = {  # what fails, at which call, with what: and at which step the run is then saved
    "the data, with a sentence": (ToyStream, "__next__", 48, UserError("row 1,234 holds no text"), 45),
    "the data, with a lost connection": (ToyStream, "__next__", 9, ConnectionError("the hub went away"), 5),
    "the log, in the midst of a look": (RunLog, "log", 14, OSError(28, "No space left on device"), 30),
    "the last look": (RunLog, "log", 42, MemoryError("out of memory"), 100),
    "the report": (runner, "write_report", 1, OSError(28, "No space left on device"), 100),
    "a card": (runner, "write_card", 2, KeyboardInterrupt(), 100),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_between_steps_loses_none_of_them(what, unbroken, tmp_path, monkeypatch, capsys):
    place, name, call, error, step = FAILURES[what]
    run = tmp_path / "broken"
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(place, name, fail_after(call, error, getattr(place, name)))
        train(**TOY, out=tmp_path, name="broken")
    assert f"sae-train resume {run}" in capsys.readouterr().out
    info = read(run)
    assert info["status"] == "interrupted" and info["tokens"] == 64 * step
    assert str(error) in info["ended_by"] or info["ended_by"] == "interrupted"
    assert newest_state(run).name.startswith(f"step-{step:09d}")
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, unbroken)


@pytest.mark.parametrize("at", [1, 3])
def test_the_first_ctrl_c_breaks_in_while_saes_are_written(at, unbroken, tmp_path, monkeypatch, capsys):
    write, written = Finisher.write, []

    def take_long(*arguments):
        written.append(1)
        if len(written) == at:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the run went on")
        return write(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Finisher, "write", take_long)
        train(**TOY, out=tmp_path, name="broken")
    assert read(tmp_path / "broken")["status"] == "interrupted"
    assert f"interrupted at step {N_STEPS}; go on with: sae-train resume" in capsys.readouterr().out
    resume(tmp_path / "broken")
    assert_same_end(tmp_path / "broken", unbroken)


@pytest.mark.parametrize(("call", "step"), [(2, 0), (14, 30), (42, 100)])
def test_the_first_ctrl_c_breaks_off_the_looks_of_a_grid(call, step, unbroken, tmp_path, monkeypatch, capsys):
    log, logged = RunLog.log, []

    def interrupt(self, row):
        log(self, row)
        logged.append(row["step"])
        if len(logged) == call:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunLog, "log", interrupt)
        train(**TOY, out=tmp_path, name="broken")
    assert len(logged) == call and logged[-1] == step
    assert f"interrupted at step {step}; go on with: sae-train resume" in capsys.readouterr().out
    resume(tmp_path / "broken")
    assert_same_end(tmp_path / "broken", unbroken)


def test_a_failure_in_the_midst_of_steps_leaves_the_state_before(unbroken, tmp_path, monkeypatch, capsys):
    run = tmp_path / "broken"
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(Learner, "step", fail_after(4 * 42, RuntimeError("CUDA out of memory"), Learner.step))
        train(**TOY, out=tmp_path, name="broken")
    assert newest_state(run).name == "step-000000030" and read(run)["status"] == "interrupted"
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, unbroken)


def test_a_step_that_cannot_be_saved_leaves_the_state_before_and_says_so(unbroken, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = tmp_path / "broken"
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(RunLog, "log", fail_after(4 * 5 + 1, OSError(28, "No space left on device"), RunLog.log))
        save_state = runner.session.save_state
        patched.setattr(
            runner.session, "save_state", lambda *given: full() if "050.tmp" in str(given[0]) else save_state(*given)
        )
        train(**TOY, out=tmp_path, name="broken")
    assert "could not be saved" in capsys.readouterr().out
    assert newest_state(run).name == "step-000000030"
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, unbroken)


@pytest.mark.parametrize("killed_at", ["set-up", "training"])
def test_a_run_that_was_killed_before_its_first_state_begins_anew(killed_at, unbroken, tmp_path, monkeypatch):
    """A kill runs nothing of what cleans up or saves."""
    run = tmp_path / "broken"
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("sae_train.runs.run.removed_on_failure", lambda *_: pytest.MonkeyPatch.context())
        patched.setattr(runner.Runner, "_break_off", lambda *_: None)
        place, name, call = (runner.session, "begin", 1) if killed_at == "set-up" else (Learner, "step", 40)
        patched.setattr(place, name, fail_after(call, SystemExit(), getattr(place, name)))
        train(**TOY, out=tmp_path, name="broken")
    assert read(run)["status"] == "running" and newest_state(run) is None
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, unbroken)


@pytest.mark.parametrize("error", [UserError("no such text"), KeyboardInterrupt(), OSError(5, "the disk is gone")])
def test_what_fails_before_anything_was_trained_leaves_no_folder(error, tmp_path, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(runner.session, "begin", fail)
    with pytest.raises(type(error)):
        train(**TOY, out=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(type(error)):
        train(**TOY, out=tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGINT, signal.SIGHUP)])
def test_a_scheduler_s_signal_and_a_closed_terminal_ask_to_stop_as_ctrl_c_does(signals):
    with StopRequest() as stop:
        for each in signals:
            signal.raise_signal(each)
    assert stop.requested


def test_a_signal_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def flags_of(settings: dict) -> list[str]:
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in settings.items() if key != "absorption"]
    return ["--no-absorption", *(part for pair in pairs for part in pair)]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space"), (errno.EDQUOT, "quota")])
def test_a_full_disk_is_a_sentence(number, words, tmp_path, monkeypatch, capsys):
    full = OSError(number, os.strerror(number), str(tmp_path / "run.json"))
    monkeypatch.setattr(RunLog, "log", fail_after(9, full, RunLog.log))
    assert main([*flags_of(TOY), "--out", str(tmp_path), "--name", "full"]) == 2
    said = capsys.readouterr()
    assert words in said.err and "run.json" in said.err and "Traceback" not in said.err
    assert "sae-train resume" in said.out and read(tmp_path / "full")["status"] == "interrupted"


@pytest.mark.parametrize("lr", ["1e30", "1e35"])
def test_a_run_of_which_every_sae_failed_is_no_success(lr, tmp_path, capsys):
    flags = flags_of(TOY | {"arch": "relu", "width": 32, "lr": lr, "out": tmp_path, "name": "bad"})
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert "no SAE of the run" in said and "is not finite" in said and "Traceback" not in said
    assert read(tmp_path / "bad")["status"] == "failed"
    assert main(["resume", str(tmp_path / "bad")]) == 2


@pytest.mark.parametrize("names", [["topk-32-l0_3"], ["jumprelu-32-l0_3", "jumprelu-48-l0_3"]])
@pytest.mark.parametrize("resumed", [False, True])
def test_some_saes_that_fail_are_named_and_counted_while_the_others_are_finished(
    resumed, names, tmp_path, monkeypatch, capsys
):
    step, n = Learner.step, {}

    def poisoned(self, x):
        n[self.name] = n.get(self.name, 0) + 1
        return step(self, x * float("nan") if self.name in names and n[self.name] == 60 else x)

    monkeypatch.setattr(Learner, "step", poisoned)
    run = tmp_path / "grid"
    if resumed:
        with monkeypatch.context() as patch:
            patch.setattr(ToyStream, "__next__", fail_after(40, UserError("no more rows"), ToyStream.__next__))
            assert main([*flags_of(TOY), "--out", str(tmp_path), "--name", "grid"]) == 2
        assert main(["resume", str(run)]) == 3
    else:
        assert main([*flags_of(TOY), "--out", str(tmp_path), "--name", "grid"]) == 3
    *_, said = capsys.readouterr().err.splitlines()
    assert f"{len(names)} of 4 SAEs failed" in said and f"The others are finished: {run}" in said
    others = {sae["name"] for sae in read(run)["saes"]} - set(names)
    assert all(f"{name} (step " in said for name in names) and not any(name in said for name in others)
    assert set(Run(run).failed) == set(names) and set(Run(run).saes) == others
    assert read(run)["status"] == "finished" and (run / "report.html").is_file()
    assert all((run / "saes" / name / "README.md").is_file() for name in others)


def test_lines_of_metrics_that_cannot_be_read_are_kept_but_for_a_torn_last_one(tmp_path):
    path, row = tmp_path / "metrics.jsonl", b'{"sae": "a", "step": %d}\n'
    path.write_bytes(
        row % 1 + b"not json\n" + row % 2 + b'{"no": "step"}\n' + b"\xff\xfe\n" + row % 3 + row % 9 + b'{"sa'
    )
    RunLog(tmp_path).rewind({"a": 3})
    assert path.read_bytes() == row % 1 + b"not json\n" + row % 2 + b'{"no": "step"}\n' + b"\xff\xfe\n" + row % 3
    RunLog(tmp_path).rewind({"a": 1})
    assert path.read_bytes() == row % 1 + b"not json\n" + b'{"no": "step"}\n' + b"\xff\xfe\n"


@pytest.mark.parametrize("name", ["absorption.parquet", "trajectory.parquet"])
def test_a_damaged_table_is_a_sentence_and_stays(name, tmp_path):
    pd.DataFrame({"sae": ["a"], "step": [1]}).to_parquet(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=name):
        RunLog(tmp_path).rewind({"a": 3})
    assert (tmp_path / name).read_bytes() == before


def test_resume_in_python_ends_alike(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(ToyStream, "__next__", fail_after(70, ConnectionError("gone"), ToyStream.__next__))
        train(**TOY, out=tmp_path, name="broken")
    assert_same_end(resume(tmp_path / "broken").path, unbroken)


def test_a_step_that_is_saved_again_is_there_at_every_moment(unbroken, tmp_path, monkeypatch):
    run, seen, remove = tmp_path / "broken", [], shutil.rmtree

    def remove_and_look(path, **options):
        remove(path, **options)
        seen.append(newest_state(run))

    with monkeypatch.context() as patched:
        patched.setattr(ToyStream, "__next__", fail_after(48, ConnectionError("gone"), ToyStream.__next__))
        with pytest.raises(ConnectionError):
            train(**TOY, out=tmp_path, name="broken")
        patched.setattr(shutil, "rmtree", remove_and_look)
        for _ in range(3):
            patched.setattr(ToyStream, "__next__", fail_after(1, ConnectionError("gone again")))
            with pytest.raises(ConnectionError):
                resume(run)
    assert len(seen) >= 3 and all(seen) and newest_state(run).name.startswith("step-000000045")
    assert_same_end(resume(run).path, unbroken)


def test_a_run_that_another_process_works_on_is_not_even_read_for_going_on(tmp_path, monkeypatch):
    from sae_train.runs import folder, run, session

    made = tmp_path / "run"
    made.mkdir()
    monkeypatch.setattr(run, "read_run", lambda *_: {"status": "running"})
    monkeypatch.setattr(session, "open_session", lambda *_: pytest.fail("it was opened"))
    with folder.alone_in(made), pytest.raises(UserError, match="another process is at work on the run"):
        run.resume(made)


def test_looks_on_other_words_than_before_the_interruption_are_noted():
    from types import SimpleNamespace

    from sae_train.runs.run import _other_words

    info = {"eval_assets": {"hash": "a"}}
    assert (
        _other_words(info, {"": SimpleNamespace(hash="a")}) == _other_words({}, {"": SimpleNamespace(hash="b")}) == []
    )
    (note,) = _other_words(info, {"": SimpleNamespace(hash="b")})
    assert "other words or activations than before the interruption" in note


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EEXIST])
def test_a_path_that_cannot_be_used_is_a_sentence_that_does_not_blame_the_disk(number, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "there"))

    monkeypatch.setattr(run_module, "start", refused)
    assert main(["--width", "64", "--l0", "4"]) == 2
    said = capsys.readouterr().err
    assert f"({tmp_path / 'there'}): {os.strerror(number)}" in said and "disk" not in said
    monkeypatch.setattr(run_module, "start", lambda *_, **__: os.strerror(1) / 2)
    with pytest.raises(TypeError):
        main(["--width", "64", "--l0", "4"])
