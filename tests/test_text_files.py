"""Local text: what of a folder is data, what of it is held out, and a sentence that names the file at fault."""

import gzip
import json
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_hostile_files import SWEEP, mutated, sentence_or_result
from test_tokens import BOS, one_epoch, open_tiny, sentences, write
from tiny_models import WORDS, save_tiny_model

from sae_train import train
from sae_train.cli import main
from sae_train.data import documents
from sae_train.data.text_files import ROWS_LOOKED_AT, split_of
from sae_train.errors import UserError

DATA_SETS = 200  # of the sweep


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def words_of(rows: torch.Tensor) -> set[str]:
    return {WORDS[i - 3] for i in rows.unique().tolist() if i >= 3}


SPLITS = [
    ("train-00000-of-00002.parquet", "train"),
    ("test-00000-of-00001.parquet", "test"),
    ("wiki.valid.txt", "validation"),
    ("c4-validation.00000-of-00512.json.gz", "validation"),
    ("data/dev.jsonl", "validation"),
    ("Test/train_wreck.txt", "test"),  # the outermost part decides
    ("evaluation.json", "test"),
    ("part-0.jsonl", None),
    ("the_test_of_time.txt", None),
    ("latest.txt", None),
    ("trainer.txt", None),
]


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_a_files_name_says_its_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "apart"),
    [
        (["train-0.jsonl", "test-0.jsonl"], "test-0.jsonl"),
        (["data/train.txt", "data/validation.txt"], "data/validation.txt"),
        (["part-0.parquet", "wiki.dev.parquet"], "wiki.dev.parquet"),
    ],
)
def test_validation_and_test_files_are_held_out_and_not_trained_on(names, apart, tmp_path: Path) -> None:
    for i, name in enumerate(names):
        write(tmp_path / name, [f"{WORDS[2 * i]} {WORDS[2 * i + 1]}"] * 50)
    stream = open_tiny(tmp_path, held_out_tokens=40)
    assert words_of(stream.held_out) == {"w2", "w3"} and words_of(one_epoch(stream)) == {"w0", "w1"}
    found, _ = documents.find_documents(str(tmp_path))
    assert found.notes == (f"held out, and not trained on, is the text of {apart}, as the names say",)


def test_validation_comes_before_test_and_no_split_but_them_is_just_text(tmp_path: Path) -> None:
    for name, word in (("test.txt", "w1"), ("train.txt", "w2"), ("valid.txt", "w3")):
        write(tmp_path / name, [f"{word} {word}"] * 50)
    stream = open_tiny(tmp_path, held_out_tokens=80)
    assert words_of(stream.held_out) == {"w3"} and words_of(one_epoch(stream)) == {"w2"}
    with pytest.raises(UserError, match="has 300 tokens, but 2000 are to be held out: give more text or hold out"):
        open_tiny(tmp_path, held_out_tokens=2000)
    (tmp_path / "train.txt").unlink()
    assert words_of(one_epoch(open_tiny(tmp_path))) == {"w1", "w3"}


def test_a_plan_says_which_files_are_apart(tmp_path: Path, capsys) -> None:
    for name in ("train", "test"):
        write(tmp_path / "text" / f"{name}.jsonl", sentences(400))
    (tmp_path / "text" / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    model = str(save_tiny_model(tmp_path / "model"))
    asked = ["--model", model, "--dataset", str(tmp_path / "text"), "--width", "32", "--l0", "2", "--tokens", "9k"]
    assert main([*asked, "--batch-tokens", "64", "--held-out-tokens", "512", "--no-absorption", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "not trained on, is the text of test.jsonl" in said
    assert "not read, as they have no column 'text': dataset_infos.json" in said


@pytest.mark.parametrize("n_books", [1, 2, 5])
def test_held_out_takes_no_more_of_long_documents_than_it_needs(n_books: int, tmp_path: Path) -> None:
    texts = [" ".join(WORDS[i] for i in range(60) for _ in range(20)) for _ in range(n_books)]
    stream = open_tiny(write(tmp_path / "a.jsonl", texts), held_out_tokens=64)
    whole = torch.cat([stream.held_out[:, 1:].flatten(), one_epoch(stream)[:, 1:].flatten()])
    expected = [i + 3 for text in texts for i in [*(WORDS.index(word) for word in text.split()), BOS - 3]]
    assert stream.held_out.shape == (8, 8) and whole[: len(expected)].tolist() == expected


def test_positions_in_a_cut_document_resume(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 1_000)
    path = write(tmp_path / "a.txt", [*sentences(3), " ".join(sentences(120)), *sentences(60)])
    stream = open_tiny(path, held_out_tokens=100)
    states, batches = zip(*((stream.state_dict(), next(stream)) for _ in range(120)), strict=True)
    assert stream.epoch >= 2 and stream._n_cut > 0
    for i in range(0, 117, 9):
        resumed = open_tiny(path, held_out_tokens=100)
        resumed.load_state_dict(json.loads(json.dumps(states[i])))
        assert all(torch.equal(next(resumed), batch) for batch in batches[i : i + 3])


def test_short_documents_are_held_out_whole(tmp_path: Path) -> None:
    stream = open_tiny(write(tmp_path / "a.txt", [f"{word} " * 9 for word in WORDS]), held_out_tokens=100)
    assert not words_of(stream.held_out) & words_of(one_epoch(stream))


@pytest.mark.parametrize("n", [1, 4, 15])
def test_too_few_held_out_tokens_are_one_sentence(n: int, tmp_path: Path) -> None:
    asked = {"model": "toy", "width": 32, "l0": 3, "out": tmp_path}
    with pytest.raises(UserError, match=f"held_out_tokens {n}: .*greater than or equal to 16"):
        train(held_out_tokens=n, **asked)
    rows = torch.randn(5 * n, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=f"{n} activations of .* are held out, but figures need at least 16"):
        train(activations=rows, batch_tokens=4, width=32, l0=3, out=tmp_path)


def test_held_out_text_of_dropped_tokens_is_one_sentence(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", ["w1 " * 200, "w2 " * 6, *sentences(900)])
    asked = {
        "model": str(save_tiny_model(tmp_path / "model")),
        "dataset": str(text),
        "drop": "w1",
        "width": 32,
        "l0": 2,
    }
    with pytest.raises(UserError, match=r"\d+ of \d+ tokens are left .* but 16 are needed: hold out more"):
        train(**asked, held_out_tokens=160, batch_tokens=64, tokens=6400, absorption=False, out=tmp_path)


def test_only_the_text_column_is_read(tmp_path: Path) -> None:
    texts = sentences(300)
    expected = one_epoch(open_tiny(write(tmp_path / "plain.jsonl", texts)))
    odd = [1, "two", None, [3], {"a": {"b": 4}}, 5.5, 2**80]
    rows = [
        {"text": text, "n": odd[i % 7]} if i % 11 else {"n": {}, "text": text, "x": 1} for i, text in enumerate(texts)
    ]
    (tmp_path / "odd.jsonl").write_text(lines(*rows[:5], *rows[5:]))
    (tmp_path / "odd.json").write_text(json.dumps(rows, indent=2))
    for name in ("odd.jsonl", "odd.json"):
        assert torch.equal(one_epoch(open_tiny(tmp_path / name)), expected), name


def with_infos(folder: Path, texts: list[str]) -> None:
    write(folder / "a.jsonl", texts)
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"features": {"text": {"dtype": "string"}}}}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a"}], "_split": None}, indent=2))


def with_other_columns(folder: Path, texts: list[str]) -> None:
    write(folder / "0.parquet", texts[:100])
    pd.DataFrame({"text": texts[100:200], "n": "x", "url": "u"}).to_parquet(folder / "1.parquet")
    table = pa.table({"id": range(100), "text": pa.array(texts[200:]).dictionary_encode()})
    parquet.write_table(table, folder / "2.parquet", row_group_size=30)


def with_rows_of_other_columns(folder: Path, texts: list[str]) -> None:
    (folder / "0.jsonl").write_text(lines(*({"text": text} for text in texts[:100])))
    (folder / "1.json").write_text(json.dumps([{"text": text, "meta": {"a": [1]}} for text in texts[100:]]))
    (folder / "authors.jsonl").write_text(lines({"name": "me", "born": 1}, {"name": "you"}))


def under_other_names(folder: Path, texts: list[str]) -> None:
    write(folder / "a.parquet", texts).rename(folder / "a.json")


def packed(folder: Path, texts: list[str]) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(*({"text": text} for text in texts[:150])).encode()))
    (folder / "b.jsonl").write_bytes(gzip.compress(lines(*({"text": text} for text in texts[150:])).encode()))


def with_a_byte_order_mark(folder: Path, texts: list[str]) -> None:
    (folder / "a.txt").write_text("\ufeff" + "\r\n".join(texts) + "\r\n", encoding="utf-8", newline="")


def as_strings(folder: Path, texts: list[str]) -> None:
    (folder / "a.json").write_text(json.dumps(texts))


FOLDERS = (
    with_infos, with_other_columns, with_rows_of_other_columns, under_other_names, packed, with_a_byte_order_mark,
    as_strings,
)  # fmt: skip


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_what_is_data_is_told_by_content(make, tmp_path: Path) -> None:
    texts = sentences(300)
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder", texts)
    expected = one_epoch(open_tiny(write(tmp_path / "plain.jsonl", texts)))
    assert torch.equal(one_epoch(open_tiny(tmp_path / "folder")), expected)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".parquet"])
def test_every_format_resumes_at_any_row(suffix: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "CHARACTERS_PER_READ", 400)
    texts = sentences(150)
    for name, part in (("0", texts[:70]), ("1", texts[70:])):
        write(tmp_path / f"{name}{suffix}", part)
    if suffix == ".parquet":
        parquet.write_table(pa.table({"text": texts[70:]}), tmp_path / "1.parquet", row_group_size=20)
    found, _ = documents.find_documents(str(tmp_path))
    places = [(place, text) for read in found.reads() for place, text in read]
    assert [text for _, text in places] == texts
    for i in range(0, 150, 7):
        assert next(found.reads(places[i][0]))[0] == places[i]


def test_a_position_of_another_reader_is_one_sentence(tmp_path: Path) -> None:
    found, _ = documents.find_documents(str(write(tmp_path / "a.jsonl", sentences(9))))
    with pytest.raises(UserError, match="saved by an earlier version"):
        next(found.reads({"reader": {"examples_iterable": None, "epoch": 0}, "skip": 0}))


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1 \\ud83d\\ude00 w2 \\ud83d"}\n' * 40)
    assert words_of(one_epoch(open_tiny(tmp_path / "a.jsonl"))) == {"w1", "w2"}


GOOD = lines(*({"text": text} for text in sentences(2000)))
DAMAGED = [
    ("b.jsonl", (GOOD + '{"text": 3}\n').encode(), r"b\.jsonl: row 2001: the column 'text' holds int, not text"),
    ("b.jsonl", (GOOD + '{"text":\n').encode(), r"b\.jsonl: line 2001 is no JSON"),
    ("b.jsonl", (GOOD + "[" * 50_000 + "\n").encode(), r"b\.jsonl: "),
    ("b.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', r"b\.jsonl: no UTF-8 text"),
    ("b.jsonl.gz", gzip.compress(GOOD.encode())[:-500], r"b\.jsonl\.gz: Compressed file ended"),
    ("b.json", ("[" + GOOD).encode(), r"b\.json: "),
    ("b.jsonl", GOOD.encode("utf-16"), r"b\.jsonl: no UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_sentence_names_the_file_and_the_row_at_fault(name, content, words, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", sentences(200))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read the dataset .*: {words}"):
        one_epoch(open_tiny(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "of bytes", "of numbers"])
def test_a_sentence_names_the_parquet_file_at_fault(damage: str, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", sentences(200))
    column = {"of bytes": [b"w1"] * 90, "of numbers": [1.5] * 90, "truncated": sentences(90)}[damage]
    parquet.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    if damage == "truncated":
        (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:300])
    with pytest.raises(UserError, match=r"cannot read the dataset .*: b\.parquet: "):
        one_epoch(open_tiny(tmp_path))


def test_a_column_that_no_file_has_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"body": "w1"}) * (ROWS_LOOKED_AT + 1))
    (tmp_path / "b.json").write_text(json.dumps([[1], 2]))
    with pytest.raises(UserError, match="no column 'text'; its columns are body"):
        open_tiny(tmp_path)
    assert words_of(one_epoch(open_tiny(tmp_path, text_column="body"))) == {"w1"}


def as_parquet(rows: list) -> bytes:
    """The rows' columns, those of several types as strings."""
    named = [row if isinstance(row, dict) else {"text": row} for row in rows]
    columns = {key: [row.get(key) for row in named] for row in named for key in row}
    written: dict[str, list] = {}
    for key, values in columns.items():
        try:
            parquet.write_table(pa.table({key: values}), pa.BufferOutputStream())
            written[key] = values
        except (pa.ArrowException, OverflowError):
            written[key] = [None if value is None else str(value) for value in values]
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table(written), buffer, row_group_size=7)
    return buffer.getvalue().to_pybytes()


WRITERS = {
    ".jsonl": lambda rows: lines(*rows).encode(),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: "\n".join(map(str, ["text", *rows])).encode("utf-8", "replace"),
    ".parquet": as_parquet,
    ".txt": lambda rows: "\n".join(str(row) for row in rows).encode("utf-8", "replace"),
}
DAMAGES = {
    "none": lambda data, at: data,
    "truncated": lambda data, at: data[:at],
    "emptied": lambda data, at: b"",
    "blank": lambda data, at: b" \n\n",
    "a mark in front": lambda data, at: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, at: data.decode("utf-8", "replace").encode("utf-16"),
    "bad UTF-8": lambda data, at: data[:at] + b"\xff\xfe\x80" + data[at:],
    "NULs": lambda data, at: data[:at] + b"\0" * 9 + data[at:],
    "overwritten": lambda data, at: data[:at] + b"\x7f" * 8 + data[at + 8 :],
    "doubled": lambda data, at: data + data,
    "nested": lambda data, at: data + b"[" * 40_000,
    "packed": lambda data, at: gzip.compress(data, mtime=0),
    "packed and truncated": lambda data, at: gzip.compress(data, mtime=0)[: at // 2],
}
BESIDE = {"dataset_infos.json": b'{"default": {"text": 1}}', "notes.md": b"# x", ".x.jsonl": b"{", "LICENSE.txt": b"w1"}
ROWS = [{"text": text, "n": i, "meta": {"a": [i]}} for i, text in enumerate(sentences(40))]


@st.composite
def data_sets(draw) -> dict[str, bytes]:
    """One to three files of one kind, of mutated rows, damaged as bytes or under a wrong name, with others beside."""
    kind, files = draw(st.sampled_from(list(WRITERS))), {}
    for i in range(draw(st.integers(1, 3))):
        rows = draw(mutated({"rows": ROWS}) if draw(st.booleans()) else st.just({"rows": ROWS})).get("rows")
        data = WRITERS[kind](rows if isinstance(rows, list) else [rows])
        damage = DAMAGES[draw(st.sampled_from(["none"] * 8 + list(DAMAGES)))]
        name = f"{i}{draw(st.sampled_from([kind] * 6 + list(WRITERS)))}{draw(st.sampled_from(['', '', '', '.gz']))}"
        files[name] = damage(data, draw(st.integers(0, len(data))))
    for name in draw(st.sets(st.sampled_from(list(BESIDE)), max_size=1)):
        files[name] = BESIDE[name]
    return files


def read_through(path: Path) -> None:
    stream = open_tiny(path, held_out_tokens=16)
    for _ in range(12):
        assert next(stream).shape == (4, 8)


def test_data_sets_give_a_result_or_one_sentence(tmp_path: Path) -> None:
    results = []

    @settings(SWEEP, max_examples=DATA_SETS)
    @given(data_sets())
    def sweep(files):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        path = folder / next(iter(files)) if len(files) == 1 else folder
        results.append(sentence_or_result(partial(read_through, path)))

    sweep()
    assert len(results) >= DATA_SETS and 0.2 < sum(results) / len(results) < 0.9
