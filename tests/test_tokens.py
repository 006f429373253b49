"""Packing loses nothing, held-out text stays apart, every format gives the same tokens, positions resume."""

import gc
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import WORDS, tiny_tokenizer

from sae_train.data import documents
from sae_train.data.tokens import Packer, TokenStream, open_tokens
from sae_train.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BOS, EOS = 0, 1
ROOM = {"context": 8, "sequences": 4}


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(n)]


def write(path: Path, texts: list[str]) -> Path:
    """Write texts in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame({"text": texts, "n": range(len(texts))}).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    else:
        path.write_text("".join(text + "\n" for text in texts))
    return path


def open_tiny(path: Path, bos_id: int | None = BOS, **options) -> TokenStream:
    return open_tokens(path, tiny_tokenizer(), bos_id=bos_id, **{**ROOM, **options})


def one_epoch(stream: TokenStream) -> torch.Tensor:
    batches = []
    while stream.epoch == 0:
        batches.append(next(stream))
    return torch.cat(batches)


@pytest.mark.parametrize(("bos_id", "separator"), [(BOS, BOS), (None, EOS)])
def test_packed_rows_are_the_documents_one_after_another(bos_id, separator, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 4_000)
    texts = sentences(700)  # more than one read
    stream = open_tiny(write(tmp_path / "a.jsonl", texts), bos_id)
    rows = one_epoch(stream)
    if bos_id is not None:
        assert (rows[:, 0] == BOS).all()
        rows = rows[:, 1:]
    tokenizer = tiny_tokenizer()
    expected = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), separator]]
    ids = rows.flatten().tolist()
    assert ids[: len(expected)] == expected
    assert ids[len(expected) :] == expected[: len(ids) - len(expected)]  # the next epoch follows without a gap


def test_a_tokenizer_without_bos_and_eos_packs_without_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ["w1 w2"] * 30)
    stream = open_tokens(path, tiny_tokenizer(bos=False, eos=False), bos_id=None, context=4, sequences=2)
    assert next(stream).tolist() == [[4, 5, 4, 5]] * 2


@pytest.mark.parametrize("suffix", [".txt", ".json", ".parquet"])
def test_every_format_gives_the_same_tokens(suffix: str, tmp_path: Path) -> None:
    texts = sentences(100)
    expected = one_epoch(open_tiny(write(tmp_path / "a.jsonl", texts)))
    assert torch.equal(one_epoch(open_tiny(write(tmp_path / f"a{suffix}", texts))), expected)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_folder_is_its_files_in_order(suffix: str, tmp_path: Path) -> None:
    texts = sentences(100)
    expected = one_epoch(open_tiny(write(tmp_path / "whole" / f"a{suffix}", texts)))
    for name, part in (("0", texts[:30]), ("1/x", texts[30:90]), ("2", texts[90:])):
        write(tmp_path / "parts" / f"{name}{suffix}", part)
    write(tmp_path / "parts" / f"1/y{suffix}", [])  # an empty file among others is no harm
    (tmp_path / "parts" / "notes.md").write_text("not data")
    assert torch.equal(one_epoch(open_tiny(tmp_path / "parts")), expected)


def test_blank_documents_and_missing_values_vanish(tmp_path: Path) -> None:
    texts = sentences(40)
    with_blanks = [blank for text in texts for blank in (text, "", "  ", None)]
    expected = one_epoch(open_tiny(write(tmp_path / "a.jsonl", texts)))
    assert torch.equal(one_epoch(open_tiny(write(tmp_path / "b.jsonl", with_blanks))), expected)


@pytest.mark.parametrize("n_documents", [300, 700])
def test_held_out_documents_never_come_up_in_training(n_documents: int, tmp_path: Path) -> None:
    """Each document is one word repeated, so that tokens tell documents apart (60 words, then none)."""
    texts = [f"{WORDS[min(i, 59)]} " * 5 for i in range(n_documents)]
    stream = open_tiny(write(tmp_path / "a.jsonl", texts), held_out_tokens=100)
    assert stream.held_out.numel() >= 100 and stream.held_out.shape[1] == 8
    rows = [next(stream)]
    while stream.epoch < 3:
        rows.append(next(stream))
    apart, seen = set(stream.held_out.unique().tolist()), set(torch.cat(rows).unique().tolist())
    assert apart & seen == {BOS}
    assert apart | seen == {BOS, *range(3, 63)}


def test_held_out_documents_can_span_reads(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 1_000)
    path = write(tmp_path / "a.jsonl", ["w1 w2"] * 600 + ["w3 w4"] * 200)
    stream = open_tiny(path, held_out_tokens=257 * 8)  # 1799 of the first 600 documents' 1800 tokens
    assert set(stream.held_out.unique().tolist()) == {BOS, 4, 5}
    assert set(one_epoch(stream).unique().tolist()) == {BOS, 6, 7}


def test_a_position_resumes_bit_equally_whatever_is_read_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 8_000)
    path = write(tmp_path / "a.parquet", sentences(1300))
    stream = open_tiny(path, held_out_tokens=64)
    states, batches, reads = [], [], []
    for _ in range(800):  # epochs of three or four reads each
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(next(stream))
        reads.append(stream._read.document)
    assert stream.epoch >= 2 and len(json.dumps(states[-1])) < 1000
    edges = [i for i in range(1, 800) if reads[i] != reads[i - 1]]
    assert len(edges) >= 6
    for i in sorted({0, 1, 799, *edges[:6], *(edge - 1 for edge in edges[:4]), *(edge + 1 for edge in edges[:4])}):
        monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 8_000 if i % 2 else 1_500)
        resumed = open_tiny(path, held_out_tokens=64)
        resumed.load_state_dict(states[i])
        for j in range(i, min(i + 3, 800)):
            assert resumed.state_dict() == states[j]
            assert torch.equal(next(resumed), batches[j]), (i, j)
    resumed = open_tiny(path, held_out_tokens=64)
    resumed.load_state_dict(states[5])
    assert all(torch.equal(next(resumed), batch) for batch in batches[5:])  # across reads and epochs


def test_a_position_of_an_earlier_version_is_one_sentence(tmp_path: Path) -> None:
    stream = open_tiny(write(tmp_path / "a.jsonl", sentences(40)))
    old = {"epoch": 0, "document": 0, "source": {"examples_iterable": None, "epoch": 0}, "used": 7}
    with pytest.raises(UserError, match=r"^this position in .* was saved by an earlier version.*start the run again"):
        stream.load_state_dict(old)


@pytest.mark.parametrize("held_out", [0, 300])
def test_text_is_tokenised_by_size_and_a_long_document_alone(held_out: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 1_000)
    book = " ".join(WORDS[:50] * 40)
    texts = [*["w1 w2"] * 300, *[book] * 5, *["w3"] * 500]
    given: list[list[int]] = []
    encode = Packer.encode

    def note(self, texts):
        given.append([len(text) for text in texts])
        return encode(self, texts)

    monkeypatch.setattr(Packer, "encode", note)
    stream = open_tiny(write(tmp_path / "a.jsonl", texts), held_out_tokens=held_out)
    one_epoch(stream)
    assert max(len(sizes) for sizes in given) > 100  # short ones go together
    assert all(sum(sizes) - sizes[-1] < max(1_000, 6 * held_out) for sizes in given if sizes)
    assert sum(map(len, given)) < 1.5 * len(texts) + 700  # each about once


def gated(tokenizer, gate: threading.Event, seen: list[str]):
    """A tokenizer that waits at the gate for all but its first texts, and notes which thread asks it."""

    def call(texts, **how):
        seen.append(threading.current_thread().name)
        assert len(seen) == 1 or gate.wait(20)
        return tokenizer(texts, **how)

    return call


def test_the_next_text_is_tokenised_while_this_one_is_handed_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 1_000)
    path, gate, seen = write(tmp_path / "a.jsonl", sentences(400)), threading.Event(), []
    expected = one_epoch(open_tiny(path)).split(4)
    stream = open_tiny(path)
    stream = TokenStream(stream._documents, stream._packer, 4, stream.held_out, 0)
    stream._packer._tokenizer = gated(tiny_tokenizer(), gate, seen)
    first = [next(stream) for _ in range(len(stream_ids(stream)) // 28 - 1)]
    while len(seen) < 2 and not gate.wait(0.01):
        pass  # until the thread has begun
    assert len(first) > 5 and all(name.startswith("tokenise") for name in seen)
    gate.set()
    rows = [*first, *(next(stream) for _ in range(len(expected) - len(first)))]
    assert all(torch.equal(*pair) for pair in zip(rows, expected, strict=True))


def stream_ids(stream: TokenStream) -> np.ndarray:
    stream._load()
    return stream._read.ids


@pytest.mark.parametrize("kind", ["no JSON", "the tokenizer"])
def test_what_is_wrong_ahead_shows_when_it_is_needed_and_again(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 1_000)
    texts = sentences(400)
    path = write(tmp_path / "a" / "0.jsonl", texts)
    (path.parent / "1.jsonl").write_text('{"text": "w1", "n": 1}\n' + "{\n" * 20 * (kind == "no JSON"))
    stream = open_tiny(path.parent)
    if kind == "the tokenizer":
        tokenizer = stream._packer._tokenizer
        monkeypatch.setattr(stream._packer, "_tokenizer", lambda texts, **how: refuse(tokenizer, texts, **how))
    rows = []
    with pytest.raises(UserError) as first:
        while stream.epoch == 0:
            rows.append(next(stream))
    n_tokens = sum(len(text.split()) + 1 for text in texts)
    assert len(rows) > 0.8 * n_tokens / 28
    for _ in range(2):
        with pytest.raises(UserError) as again:
            next(stream)
        assert str(again.value) == str(first.value)


def refuse(tokenizer, texts, **how):
    if texts[-1] == "w1":
        raise UserError("this text is refused")
    return tokenizer(texts, **how)


def test_going_back_within_what_was_read_tokenises_nothing_again(tmp_path: Path, monkeypatch) -> None:
    stream = open_tiny(write(tmp_path / "a.jsonl", sentences(400)), held_out_tokens=64)
    start, rows = stream.state_dict(), [next(stream) for _ in range(9)]
    monkeypatch.setattr(Packer, "encode", None)
    stream.load_state_dict(start)
    middle = None
    for i in range(9):
        middle = stream.state_dict() if i == 4 else middle
        assert torch.equal(next(stream), rows[i])
    stream.load_state_dict(middle)
    assert torch.equal(next(stream), rows[4])


def test_a_stream_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """A thread uses it, and a call with truncation elsewhere would cut its texts."""
    tokenizer = tiny_tokenizer()
    stream = open_tokens(write(tmp_path / "a.txt", sentences(90)), tokenizer, bos_id=BOS, **ROOM)
    assert stream._packer._tokenizer is not tokenizer
    assert stream._packer._tokenizer.backend_tokenizer is not tokenizer.backend_tokenizer


def test_no_thread_outlives_its_stream_or_holds_up_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", sentences(400))
    stream = open_tiny(path)
    next(stream)
    threads = [thread for thread in threading.enumerate() if thread in stream._thread._threads]
    assert len(threads) == 1
    del stream
    gc.collect()
    threads[0].join(timeout=20)
    assert not threads[0].is_alive()
    script = (
        "import sys; sys.path.insert(0, 'tests'); from test_tokens import open_tiny; from pathlib import Path\n"
        f"stream = open_tiny(Path({str(path)!r})); next(stream); raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3 and done.stderr == ""


def test_embedded_text_brings_its_own_held_out_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", ["w1 w2"] * 50)
    write(tmp_path / "held_out.parquet", ["w3 w4"] * 50)
    monkeypatch.setattr(documents, "EMBEDDED_TEXT", tmp_path)
    stream = open_tiny("generated", held_out_tokens=40)
    assert set(stream.held_out.unique().tolist()) == {BOS, 6, 7}
    rows = one_epoch(stream)
    assert set(rows.unique().tolist()) == {BOS, 4, 5}
    assert (rows[:, 1:] == 4).sum() >= 50  # training skips none of its documents


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "\n \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": ""}\n', "has no text"),
        ("a.jsonl", '{"txt": "w1", "n": 1}\n', "no column 'text'; its columns are n, txt"),
        ("a.jsonl", '{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", '{"text": "w1"}\n{"text":\n', "cannot read the dataset"),
        ("a.parquet", "PAR1 not really", "cannot read the dataset"),
        ("a.csv", "text\nw1\n", "holds no data"),
        ("a.txt", "w1 w2\n", "is too small: it has 3 tokens, but one batch takes 28"),
    ],
)
def test_bad_data_is_one_sentence(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_tiny(tmp_path / name)


def test_an_empty_parquet_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is empty"):
        open_tiny(write(tmp_path / "a.parquet", []))
    with pytest.raises(UserError, match="holds no data"):
        open_tiny(tmp_path / "folder")
    write(tmp_path / "mixed" / "a.txt", ["w1"])
    write(tmp_path / "mixed" / "a.jsonl", ["w1"])
    with pytest.raises(UserError, match="mixes json, text"):
        open_tiny(tmp_path / "mixed")


def test_too_little_text_to_hold_out_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", ["w1 w2 w3"] * 20)
    with pytest.raises(UserError, match="has 80 tokens, but 1000 are to be held out"):
        open_tiny(path, held_out_tokens=1000)
    with pytest.raises(UserError, match="one batch takes 28 besides the 64 held out"):
        open_tiny(path, held_out_tokens=64)


def test_datasets_that_are_nowhere_are_refused() -> None:
    for name in ("./nothing.parquet", "nothing.jsonl", "/nowhere/at/all", "two words"):
        with pytest.raises(UserError, match="there is no dataset"):
            open_tiny(name)
    with pytest.raises(UserError, match=r"cannot stream 'someone/texts'.*hub cannot be reached"):
        open_tiny("someone/texts")
