"""The eval's set-up on disk: read again only by who made it, never taken from a reader, bounded in size."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from eval_fakes import FakeLM, fake_words, word_tokenizer

from sae_train.cli import main
from sae_train.config import resolve
from sae_train.errors import UserError
from sae_train.evals import asset_cache, assets
from sae_train.evals.asset_cache import cache_folder
from sae_train.evals.assets import Assets
from sae_train.runs.callbacks import build_assets
from sae_train.runs.plan import make_plan


@pytest.fixture(scope="module")
def lm() -> FakeLM:
    return FakeLM(word_tokenizer([*fake_words(), "word2", " Élan", "<tag>"]))


@pytest.fixture(scope="module")
def built(lm: FakeLM) -> Assets:
    return assets.build(lm)


@pytest.fixture
def kept(lm: FakeLM, built: Assets, tmp_path: Path) -> Path:
    """A folder with one entry."""
    assets.build(lm, cache_dir=tmp_path)
    return tmp_path


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def build_only_from(folder: Path, lm: FakeLM, monkeypatch: pytest.MonkeyPatch, **how) -> Assets:
    with monkeypatch.context() as patched:
        patched.setattr(assets, "_collect", lambda *_: pytest.fail("the cache was not used"))
        return assets.build(lm, cache_dir=folder, **how)


def test_what_was_kept_is_what_was_built(lm, built, kept, monkeypatch):
    again = build_only_from(kept, lm, monkeypatch)
    assert again.hash == built.hash == assets.content_hash(again)
    for field in fields(Assets):
        one, other = getattr(built, field.name), getattr(again, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
        elif field.name != "seconds":
            assert one == other, field.name


def shorter(lm):
    lm.context = 64


def half(lm):
    lm.dtype = torch.bfloat16


def one_more_special_id(lm):
    lm.special_ids = {*lm.special_ids, 40}


def other_rules(lm):
    from tokenizers import normalizers

    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


def other_weights(lm):
    lm.table = lm.table * 1.1


def other_weights_behind_the_hook(lm):
    lm.unembed = lm.unembed * 1.1


@pytest.mark.parametrize(
    "change", [shorter, half, one_more_special_id, other_rules, other_weights, other_weights_behind_the_hook]
)
def test_models_that_differ_have_entries_of_their_own(change, lm, built, kept, monkeypatch):
    other = copy.copy(lm)
    change(other)
    made = assets.build(other, cache_dir=kept)
    assert len(entries(kept)) == 2
    assert build_only_from(kept, other, monkeypatch).hash == made.hash
    assert build_only_from(kept, lm, monkeypatch).hash == built.hash


@pytest.mark.parametrize("how", [{"contexts": 8}, {"contexts": "each"}, {"seed": 1}, {"n_words": 130}])
def test_draws_that_differ_have_entries_of_their_own(how, lm, built, kept, monkeypatch):
    made = assets.build(lm, cache_dir=kept, **how)
    assert len(entries(kept)) == 2 and made.hash != built.hash
    assert build_only_from(kept, lm, monkeypatch, **how).hash == made.hash


def test_the_last_bits_of_a_thread_count_and_the_last_padding_change_nothing(lm, built, kept, monkeypatch):
    other = copy.copy(lm)
    other.table = lm.table * (1 + 1e-6)
    other.tokenizer = copy.deepcopy(lm.tokenizer)
    other.tokenizer.backend_tokenizer.enable_padding(length=5)
    other.tokenizer.backend_tokenizer.enable_truncation(5)
    assert build_only_from(kept, other, monkeypatch).hash == built.hash


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_kind(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"fingerprint": torch.zeros(2)}, path, {"plain": json.dumps([1])})


def another_kind_of_this_model(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"fingerprint": load_file(path)["fingerprint"].clone()}, path, {"plain": json.dumps({"words": 3})})


@pytest.mark.parametrize("spoil", [cut, flip, empty, of_another_kind, another_kind_of_this_model])
def test_a_spoilt_entry_is_built_again(spoil, lm, built, kept, monkeypatch):
    (path,) = entries(kept)
    spoil(path)
    assert assets.build(lm, cache_dir=kept).hash == built.hash
    assert build_only_from(kept, lm, monkeypatch).hash == built.hash and entries(kept) == [path]


def test_what_is_read_outlives_its_removal_and_its_replacement(lm, built, kept, monkeypatch):
    again = build_only_from(kept, lm, monkeypatch)
    (path,) = entries(kept)
    path.replace(kept / "gone")
    (kept / "gone").unlink()
    assert assets.content_hash(again) == built.hash
    assets.build(lm, cache_dir=kept)
    again = build_only_from(kept, lm, monkeypatch)
    asset_cache.write(kept, asset_key(lm), torch.ones(16, 80), built)
    assert assets.content_hash(again) == built.hash


def asset_key(lm: FakeLM) -> dict:
    from sae_train.evals.hierarchy import FIRST_LETTER
    from sae_train.evals.presets import get_preset

    return assets._key(lm, FIRST_LETTER, 0, get_preset("saebench"), None, 64)


def test_writers_of_one_key_and_readers_do_not_meet(lm, built, tmp_path, monkeypatch):
    """Eight threads write one entry over and over, with room for no other, while it is read."""
    monkeypatch.setattr(asset_cache, "MOST_BYTES", 1)
    fingerprint, key, ended, wrong = asset_cache.fingerprint_of(lm), asset_key(lm), threading.Event(), []

    def write() -> None:
        try:
            while not ended.is_set():
                asset_cache.write(tmp_path, key, fingerprint, built)
        except Exception as error:
            wrong.append(error)

    asset_cache.write(tmp_path, key, fingerprint, built)
    writers = [threading.Thread(target=write) for _ in range(8)]
    for writer in writers:
        writer.start()
    for _ in range(40):
        (found,) = asset_cache.read(tmp_path, key, lambda _: True)
        assert assets.content_hash(Assets(**found)) == built.hash
    ended.set()
    for writer in writers:
        writer.join()
    assert not wrong and [path.name for path in tmp_path.iterdir()] == [entries(tmp_path)[0].name]


def test_what_was_not_used_for_longest_goes_first_and_what_is_not_ours_stays(lm, built, tmp_path, monkeypatch):
    left_by_a_kill = tmp_path / f".{'0' * 16}-{'1' * 16}.safetensors.abc.tmp"
    for name in ("sae.safetensors", "notes.txt", left_by_a_kill.name):
        (tmp_path / name).write_bytes(b"x" * 10_000_000)
    os.utime(left_by_a_kill, (0, 0))
    for seed in range(3):
        assets.build(lm, cache_dir=tmp_path, seed=seed)
        os.utime(newest(tmp_path), (seed + 1, seed + 1))
    size = newest(tmp_path).stat().st_size
    assert left_by_a_kill.exists()
    before = time.time()
    build_only_from(tmp_path, lm, monkeypatch, seed=0)  # used now, though it was written first
    assert newest(tmp_path).stat().st_mtime >= before - 1
    monkeypatch.setattr(asset_cache, "MOST_BYTES", int(3.5 * size))
    assets.build(lm, cache_dir=tmp_path, seed=3)
    for seed in (0, 2, 3):
        build_only_from(tmp_path, lm, monkeypatch, seed=seed)
    assert len(entries(tmp_path)) == 3 + 1 and not left_by_a_kill.exists()
    assert {"sae.safetensors", "notes.txt"} <= {path.name for path in tmp_path.iterdir()}


def newest(folder: Path) -> Path:
    return max(folder.glob("*-*.safetensors"), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("where", ["a file", "a full disk"])
def test_a_cache_that_cannot_be_written_loses_nothing_and_says_so(where, lm, built, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    if where == "a file":
        folder.write_text("")
    else:

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    made = assets.build(lm, cache_dir=folder)
    assert made.hash == built.hash and "could not be kept in" in made.notes[-1] and "--eval-cache" in made.notes[-1]
    assert [path.name for path in tmp_path.rglob("*")] == ["cache"]


def test_the_setting_names_the_folder_or_keeps_nothing(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "xdg" / "sae-train" and cache_folder("none") is None
    assert cache_folder("~/mine") == tmp_path / "home" / "mine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "sae-train"
    build_assets(lm, resolve({"eval_cache": "none"}).eval)
    assert not list(tmp_path.iterdir())
    build_assets(lm, resolve({"eval_cache": tmp_path / "asked"}).eval)
    assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [tmp_path / "asked"]


def test_a_file_in_the_folders_place_is_one_sentence_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder, or none"):
        make_plan(resolve({"eval_cache": str(tmp_path / "file")}))
    assert main(["--dry-run", "--eval-cache", str(tmp_path / "file")]) == 2
    assert main(["--dry-run", "--eval-cache", "~nobody-of-this-name/x"]) == 2
    assert main(["--dry-run", "--eval-cache", ""]) == 2
    said = capsys.readouterr().err
    assert said.count("sae-train: eval_cache") == 3 and "Traceback" not in said
