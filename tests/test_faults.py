"""The faults of docs/faults.md that no other test provokes; the page names tests that are there."""

import re
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_endings import TOY, assert_same_end, fail_after, flags_of, read

from sae_train import train
from sae_train.cli import main
from sae_train.data.activation_cache import SHARDS
from sae_train.data.forward import Passes
from sae_train.data.hooked_model import LanguageModel
from sae_train.data.language_model import load_at_hooks
from sae_train.data.text_files import Reader
from sae_train.runs.session import newest_state
from sae_train.sae.tensor_files import write_tensors
from sae_train.training.learner import Learner

ROOT = Path(__file__).resolve().parents[1]
TEXT = {
    "width": "64", "l0": 8, "arch": "topk,jumprelu", "tokens": 20_000, "batch_tokens": 128, "buffer_tokens": 640,
    "held_out_tokens": 1024, "absorption": False, "absorption_evals": 1, "save_every": 30, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return train(**TOY, out=tmp_path_factory.mktemp("toy"), name="unbroken").path


@pytest.fixture(scope="module")
def unbroken_on_text(tmp_path_factory) -> Path:
    return train(**TEXT, out=tmp_path_factory.mktemp("text"), name="unbroken").path


@contextmanager
def full_disk(most: int):
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def begin(given: dict, out: Path, capsys) -> str:
    """Start a run that ends early; return what it complained, in one sentence."""
    assert main([*flags_of(given), "--out", str(out), "--name", "broken"]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and len(said.err.strip().splitlines()) == 1
    assert f"go on with: sae-train resume {out / 'broken'}" in said.out
    return said.err


def test_a_disk_that_is_full_when_a_state_is_saved_is_a_sentence_and_no_room_is_lost(unbroken, tmp_path, capsys):
    largest = max(path.stat().st_size for path in unbroken.rglob("state/*/*/*.safetensors"))
    with full_disk(largest - 1000):  # a state is smaller by 8 bytes for each latent that is not dead
        assert "the disk does not take what is to be written" in begin(TOY, tmp_path, capsys)
    run = tmp_path / "broken"
    assert read(run)["status"] == "interrupted" and newest_state(run) is None
    assert not list(run.rglob("*.tmp"))
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, unbroken)


def test_a_disk_that_takes_nothing_at_all_loses_no_state(unbroken, tmp_path, monkeypatch, capsys):
    step = Learner.step
    with monkeypatch.context() as patched, full_disk(10**9):

        def fill(learner, x):
            if learner.step_count == 40:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return step(learner, x)

        patched.setattr(Learner, "step", fill)
        assert "the disk does not take what is to be written" in begin(TOY, tmp_path, capsys)
    run = tmp_path / "broken"
    assert newest_state(run).name == "step-000000030"
    assert main(["resume", str(run)]) == 0
    assert_same_end(run, unbroken)


def test_a_disk_that_is_full_when_activations_are_kept_is_a_sentence(tmp_path, capsys):
    given = TEXT | {"activation_cache": tmp_path / "kept"}
    with full_disk(640 // SHARDS * 256 * 4):  # float32 rows of a shard, which has a header as well
        assert main([*flags_of(given), "--out", str(tmp_path), "--name", "broken"]) == 2
    assert "the disk does not take what is to be written" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_runs_out_is_a_sentence_and_the_run_goes_on_to_the_same_bits(
    error, unbroken, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", fail_after(4 * 42, error, Learner.step))
        assert "the memory ran out" in begin(TOY, tmp_path, capsys)
    assert newest_state(tmp_path / "broken").name == "step-000000030"
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert_same_end(tmp_path / "broken", unbroken)


def test_memory_that_runs_out_in_the_language_model_halves_its_passes(monkeypatch, caplog):
    lms = load_at_hooks("speller", ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"])
    tokens = torch.arange(7 * 128).view(7, 128) % 1000
    whole, forward, rows = lms[0].activations_at(lms, tokens), LanguageModel._forward, []

    def forward_of_few(lm, tokens, *rest):
        rows.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(lm, tokens, *rest)

    monkeypatch.setattr(LanguageModel, "_forward", forward_of_few)
    torch.testing.assert_close(lms[0].activations_at(lms, tokens), whole, rtol=1e-4, atol=1e-4)
    assert rows == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[1].endswith("of 3 rows through the language model: 1 at a time from here on")
    torch.testing.assert_close(lms[0].activations(tokens), whole[0], rtol=1e-4, atol=1e-4)
    assert set(rows[9:]) == {1} and len(caplog.records) == 2, "the size that fits is kept"


def test_a_row_for_which_there_is_no_memory_is_not_halved():
    def fail(tokens):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Passes()(fail, torch.zeros(5, 8, dtype=torch.long))


@pytest.mark.parametrize("error", [ConnectionError("the hub went away"), ValueError("row 7 is no JSON")])
def test_a_dataset_that_throws_midway_is_a_sentence_and_the_run_goes_on_to_the_same_bits(
    error, unbroken_on_text, tmp_path, monkeypatch, capsys
):
    batches = Reader.iter

    def throw(self, *given, **options):
        for n, batch in enumerate(batches(self, *given, **options)):
            if n == 10:  # behind what a run looks at before its first step
                raise error
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr("sae_train.data.documents.CHARACTERS_PER_READ", 4000)
        patched.setattr(Reader, "iter", throw)
        said = begin(TEXT, tmp_path, capsys)
    assert f"cannot read the dataset generated: {error}" in said
    assert main(["resume", str(tmp_path / "broken")]) == 0
    assert_same_end(tmp_path / "broken", unbroken_on_text)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "fault", ["[pair.cc:534] Connection closed by peer [127.0.0.1]:9", "[gloo/pair.cc:1] Read error"]
)
def test_a_process_that_is_gone_is_a_sentence_of_the_others(fault, rank, tmp_path, monkeypatch, capsys):
    def lose(*_, **__):
        raise RuntimeError(fault)

    monkeypatch.setattr("sae_train.runs.run.resume", lose)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(RuntimeError):
        main(["resume", str(tmp_path)])  # a lone process has lost nobody: the error is ours
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["resume", str(tmp_path)]) == 2
    assert "sae-train: another process of the run is gone" in capsys.readouterr().err


@pytest.mark.parametrize("number", [27, 28])
def test_what_safetensors_meets_on_a_disk_is_an_error_of_the_disk(number, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*_):
        raise SafetensorError(f"Error while serializing: I/O error: it is full (os error {number})")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match=r"a\.safetensors") as error:
        write_tensors({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert error.value.errno == number and not list(tmp_path.iterdir())


def test_every_row_of_the_page_names_tests_that_are_there():
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        scripts = re.findall(r"`(benchmarks/\w+\.py)", row)
        assert named or scripts, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), test
        assert all((ROOT / script).is_file() for script in scripts)
