"""Activations on disk: the same bits with and without, whatever the model computes in, and nothing stale is read."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, save_tiny_model

from sae_train.config import resolve
from sae_train.data.activation_cache import SHARDS, ActivationCache, files_of, key_of
from sae_train.data.buffer import ActivationBuffer
from sae_train.data.language_model import LanguageModel, load_language_model
from sae_train.data.origin import check_unchanged
from sae_train.data.pretrained import EMBEDDED
from sae_train.data.sources import kind_of
from sae_train.data.tokens import open_tokens
from sae_train.errors import UserError
from sae_train.sae.tensor_files import write_tensors
from sae_train.training.ranks import Ranks


def buffer(lm: LanguageModel, text: Path, cache: ActivationCache | None = None) -> ActivationBuffer:
    stream = open_tokens(text, lm.tokenizer, context=8, sequences=4, bos_id=lm.bos_id)
    return ActivationBuffer(lm, stream, buffer_tokens=48, batch_tokens=16, cache=cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batches_are_bit_equal_without_a_cache_while_it_is_written_and_when_it_is_read(dtype, tmp_path, monkeypatch):
    lm = load_language_model(save_tiny_model(tmp_path / "model"), "blocks.0.hook_resid_post", dtype=dtype)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[i:]) for i in range(10)))
    plain = buffer(lm, text)
    batches, positions = [], []
    for _ in range(60):
        positions.append(plain.state_dict())
        batches.append(next(plain))
    assert plain.epoch > 0
    caches = [ActivationCache(tmp_path / "cache", "key", lm.dtype, Ranks()) for _ in range(2)]
    writing, reading = (buffer(lm, text, cache) for cache in caches)
    assert all(torch.equal(next(writing), x) for x in batches[:45])
    assert (caches[0].n_written, caches[0].n_read) == (15, 0)
    shards = sorted((tmp_path / "cache/key/block-000002").glob("*.safetensors"))
    assert len(shards) == SHARDS
    assert sum(shard.stat().st_size for shard in shards) < 48 * lm.d_in * lm.dtype.itemsize + SHARDS * 200
    with monkeypatch.context() as patched:
        patched.setattr(lm, "activations", None)
        for i in (*range(45), 20, 21):
            if i == 20:
                reading.load_state_dict(positions[i])
            assert torch.equal(next(reading), batches[i])
        reading.load_state_dict(positions[44])
        next(reading)
    assert all(torch.equal(next(reading), x) for x in batches[45:]), "after blocks that were read, others are computed"
    assert (caches[1].n_written, reading.epoch) == (5, plain.epoch)


def kept(folder: Path, key: str = "key") -> tuple[ActivationCache, list[str]]:
    """A cache, and what it says."""
    cache, said = ActivationCache(folder, key, torch.bfloat16, Ranks()), []
    cache.say = said.append
    return cache, said


def write(cache: ActivationCache, number: int, x: torch.Tensor, order: torch.Tensor) -> None:
    draft = cache.draft(order, x.shape[1])
    draft.put(0, x[:7])
    draft.put(7, x[7:])
    cache.write(number, draft, {"skip": 3}, "cpu")


def flip(byte: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[byte] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "a flipped byte at its end": flip(-1),
    "a flipped byte in the midst": flip(20),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("file", ["shard-00.safetensors", "shard-15.safetensors", "block.json"])
def test_a_damaged_shard_is_found_and_said_in_a_sentence(what, file, tmp_path):
    cache, said = kept(tmp_path)
    x, order = torch.randn(40, 4).bfloat16().float(), torch.randperm(40)
    write(cache, 0, x, order)
    write(cache, 1, x, order)
    DAMAGES[what](tmp_path / "key" / "block-000001" / file)
    block = cache.read(0, "cpu")
    assert torch.equal(block.batch(0, 40), x[order]) and torch.equal(block.batch(11, 29), x[order][11:29])
    assert block.end == {"skip": 3}
    assert cache.read(1, "cpu") is None
    if (what, file) == ("missing", "block.json"):  # as where a process was killed before it had written it all
        assert not said and not cache.n_replaced
        return
    assert len(said) == 1 and file in said[0] and "block 1 is made anew" in said[0] and cache.n_replaced == 1
    if what != "a folder":
        write(cache, 1, x, order)
        assert torch.equal(cache.read(1, "cpu").batch(0, 40), x[order]) and len(said) == 1


def test_a_block_that_is_not_there_or_of_another_key_is_none(tmp_path):
    cache, said = kept(tmp_path)
    write(cache, 2, torch.randn(40, 4), torch.randperm(40))
    other, _ = kept(tmp_path, "other")
    assert cache.read(2, "cpu") and cache.read(3, "cpu") is None and other.read(2, "cpu") is None and not said


def test_each_shard_mixes_the_texts_of_its_whole_block(tmp_path):
    cache, _ = kept(tmp_path)
    n = 64 * SHARDS
    document = torch.arange(n).div(64, rounding_mode="floor").float()  # as many documents as shards, one after another
    write(cache, 0, document[:, None], torch.randperm(n, generator=torch.Generator().manual_seed(0)))
    block = cache.read(0, "cpu")
    for i in range(SHARDS):
        assert len(block.batch(64 * i, 64 * (i + 1)).unique()) >= 10


@pytest.mark.parametrize("processes", [2, 3, 16, 20])
def test_each_row_of_a_block_is_written_by_one_process(processes, tmp_path):
    x, order = torch.randn(40, 4).bfloat16().float(), torch.randperm(40)
    rows = []
    for rank in range(processes):
        draft = ActivationCache(tmp_path, "key", torch.bfloat16, Ranks(rank, processes)).draft(order, 4)
        for at in range(0, 40, 7):
            draft.put(at, x[at : at + 7])
        rows.append(draft.rows)
    assert torch.equal(torch.cat(rows).float(), x[order])


def test_blocks_of_an_earlier_version_are_refused_in_one_sentence(tmp_path):
    write_tensors({"x": torch.zeros(2, 2)}, tmp_path / "0123456789abcdef" / "block-000000" / "state.safetensors")
    with pytest.raises(UserError, match=r"earlier version of sae-train.*remove the folder, or name another"):
        kept(tmp_path)


def test_the_key_follows_settings_contents_and_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    keys = {
        key_of({"files": files_of(tmp_path), "context": n}, torch.full((2,), v)) for n in (1, 2) for v in (0.0, 1.0)
    }
    (tmp_path / "a.txt").write_text("xy")
    keys.add(key_of({"files": files_of(tmp_path), "context": 1}, torch.zeros(2)))
    (tmp_path / "a.txt").write_text("xz")
    keys.add(key_of({"files": files_of(tmp_path), "context": 1}, torch.zeros(2)))
    assert len(keys) == 6
    os.utime(tmp_path / "a.txt", (1, 1))
    assert key_of({"files": files_of(tmp_path), "context": 1}, torch.zeros(2)) in keys
    assert files_of("owner/name-of-a-hub-dataset") == []


def test_a_model_folder_whose_configuration_or_tokenizer_changed_has_other_activations_and_no_resume(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "dataset": "generated", "held_out_tokens": 512}
    settings = resolve(given | {"width": 64, "l0": 4})

    def opened():
        return kind_of(settings).open(settings, torch.device("cpu"), Ranks(), tmp_path / "kept")[""]

    first, again = opened(), opened()
    assert first.cache.folder == again.cache.folder
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    other = opened()
    assert other.cache.folder != first.cache.folder
    then = {"settings": {"model": "mine"}, "dataset": "text", "made_from": first.source.made_from}
    check_unchanged(then, again.source.made_from)
    with pytest.raises(UserError, match=r"the model mine \(config.json\) changed since the run began"):
        check_unchanged(then, other.source.made_from)
    before = copy.deepcopy(then)  # as earlier versions kept it
    del before["made_from"]["weights"]["beside"]
    check_unchanged(before, other.source.made_from)
