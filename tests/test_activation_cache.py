"""Activations on disk: the same bits with and without, whatever the model computes in, and nothing stale is read."""

from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, save_tiny_model

from sae_train.data.activation_cache import ActivationCache, files_of, key_of
from sae_train.data.buffer import ActivationBuffer
from sae_train.data.language_model import LanguageModel, load_language_model
from sae_train.data.tokens import open_tokens


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
    caches = [ActivationCache(tmp_path / "cache", "key", lm.dtype) for _ in range(2)]
    writing, reading = (buffer(lm, text, cache) for cache in caches)
    assert all(torch.equal(next(writing), x) for x in batches[:45])
    assert (caches[0].n_written, caches[0].n_read) == (15, 0)
    block = next((tmp_path / "cache").rglob("*.safetensors"))
    assert block.stat().st_size < 48 * lm.d_in * lm.dtype.itemsize + 2000
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


def test_a_block_that_is_truncated_altered_or_of_another_key_is_none(tmp_path):
    cache = ActivationCache(tmp_path, "key", torch.bfloat16)
    x = torch.randn(6, 4).bfloat16().float()
    for number in range(3):
        cache.write(number, x, {"skip": 3})
    files = [cache._folder(number) / "state.safetensors" for number in range(3)]
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1])
    files[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert cache.read(0, "cpu") is None and cache.read(1, "cpu") is None and cache.n_replaced == 2
    block, end = cache.read(2, "cpu")
    assert torch.equal(block, x) and end == {"skip": 3}
    assert cache.read(3, "cpu") is None
    other = ActivationCache(tmp_path, "other", torch.bfloat16)
    assert other.read(2, "cpu") is None
    cache._folder(2).rename(other._folder(2).parent.parent / "moved")
    other._folder(2).parent.mkdir()
    (tmp_path / "moved").rename(other._folder(2))
    assert other.read(2, "cpu") is None and other.n_replaced == 1


def test_the_key_follows_settings_contents_and_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    keys = {
        key_of({"files": files_of(tmp_path), "context": n}, torch.full((2,), v)) for n in (1, 2) for v in (0.0, 1.0)
    }
    (tmp_path / "a.txt").write_text("xy")
    keys.add(key_of({"files": files_of(tmp_path), "context": 1}, torch.zeros(2)))
    assert len(keys) == 5
    assert files_of("owner/name-of-a-hub-dataset") == []
