"""Packing loses nothing, held-out text stays apart, every format gives the same tokens, positions resume."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_models import WORDS, tiny_tokenizer

from sae_train.data import documents
from sae_train.data.tokens import TokenStream, open_tokens
from sae_train.errors import UserError

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
def test_packed_rows_are_the_documents_one_after_another(bos_id, separator, tmp_path: Path) -> None:
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


def test_held_out_documents_can_span_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["w1 w2"] * 600 + ["w3 w4"] * 200)
    stream = open_tiny(path, held_out_tokens=257 * 8)  # 1799 of the first 600 documents' 1800 tokens
    assert set(stream.held_out.unique().tolist()) == {BOS, 4, 5}
    assert set(one_epoch(stream).unique().tolist()) == {BOS, 6, 7}


def test_a_position_resumes_bit_equally(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", sentences(1300))
    stream = open_tiny(path, held_out_tokens=64)
    states, batches = [], []
    for _ in range(800):  # three epochs of three reads each
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(next(stream))
    assert stream.epoch >= 2
    edges = [i for i in range(1, 800) if states[i]["document"] != states[i - 1]["document"]]
    assert len(edges) >= 6
    for i in {0, 1, 799, *edges, *(edge - 1 for edge in edges), *(min(799, edge + 1) for edge in edges)}:
        resumed = open_tiny(path, held_out_tokens=64)
        resumed.load_state_dict(states[i])
        for j in range(i, min(i + 3, 800)):
            assert resumed.state_dict() == states[j]
            assert torch.equal(next(resumed), batches[j]), (i, j)
    resumed = open_tiny(path, held_out_tokens=64)
    resumed.load_state_dict(states[5])
    assert all(torch.equal(next(resumed), batch) for batch in batches[5:])  # across reads and epochs
    assert len(json.dumps(states[-1])) < 1000


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
