"""The buffer hands out every kept activation once, shuffled, and continues bit-equally from any position."""

import json
from pathlib import Path

import pytest
import torch
from test_tokens import sentences, write
from tiny_models import save_tiny_model

from sae_train.data.buffer import ActivationBuffer, check_activations, estimate_scale, held_out_activations
from sae_train.data.harvest import dropped, kept_activations
from sae_train.data.language_model import LanguageModel, load_language_model
from sae_train.data.tokens import TokenStream, open_tokens
from sae_train.errors import UserError

DROPPED = 10


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(save_tiny_model(tmp_path_factory.mktemp("model")), "blocks.0.hook_resid_post")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("text") / "a.jsonl", sentences(600))


def stream(lm: LanguageModel, text: Path) -> TokenStream:
    return open_tokens(text, lm.tokenizer, context=16, sequences=4, bos_id=lm.bos_id, held_out_tokens=100)


def buffer(lm: LanguageModel, text: Path, seed: int = 0) -> ActivationBuffer:
    return ActivationBuffer(lm, stream(lm, text), buffer_tokens=100, batch_tokens=32, drop_ids=[DROPPED], seed=seed)


def reference(lm: LanguageModel, text: Path, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n kept activations in reading order, and their tokens."""
    rows = stream(lm, text)
    xs, ids = [], []
    while sum(map(len, ids)) < n:
        tokens = next(rows)
        keep = (tokens > 2) & (tokens != DROPPED)
        xs.append(lm.activations(tokens)[keep])
        ids.append(tokens[keep])
    return torch.cat(xs)[:n], torch.cat(ids)[:n]


def in_order(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(x.tolist()))


def test_blocks_are_the_kept_activations_in_order_each_permuted(lm: LanguageModel, text: Path) -> None:
    batches = buffer(lm, text)
    assert batches.buffer_tokens == 128  # whole batches
    expected, ids = reference(lm, text, 3 * 128)
    assert DROPPED not in ids and not set(ids.tolist()) & lm.special_ids
    for block in expected.split(128):
        given = torch.cat([next(batches) for _ in range(4)])
        assert given.shape == (128, lm.d_in) and given.dtype is torch.float32
        assert not torch.equal(given, block)
        assert torch.equal(in_order(given), in_order(block))


def test_the_permutation_depends_on_seed_and_block_only(lm: LanguageModel, text: Path) -> None:
    a, b, c = buffer(lm, text), buffer(lm, text), buffer(lm, text, seed=1)
    torch.manual_seed(123)
    first = next(a)
    state = torch.random.get_rng_state()
    assert torch.equal(first, next(b)) and not torch.equal(first, next(c))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    orders = []
    for _ in range(3):
        orders.append(a._block._order.tolist())
        for _ in range(4):
            next(a)
    assert orders[0] != orders[2]


def test_a_position_resumes_bit_equally(lm: LanguageModel, text: Path) -> None:
    batches = buffer(lm, text)
    states, given = [], []
    for _ in range(280):
        states.append(json.loads(json.dumps(batches.state_dict())))
        given.append(next(batches))
    assert batches.epoch >= 2
    epoch_edges = [i for i in range(1, 280) if states[i]["tokens"]["epoch"] != states[i - 1]["tokens"]["epoch"]]
    assert len(epoch_edges) >= 2
    middle_of_block, block_edge = 6, 8
    assert (states[6]["offset"], states[8]["offset"]) == (64, 0)
    for i in (0, 1, middle_of_block, 7, block_edge, 9, *(e + s for e in epoch_edges for s in (-5, -1, 0, 1))):
        resumed = buffer(lm, text)
        resumed.load_state_dict(states[i])
        for j in range(i, min(i + 10, 280)):
            assert torch.equal(next(resumed), given[j]), (i, j)
    assert len(json.dumps(states[-1])) < 1000


def test_the_scale_brings_the_mean_squared_norm_to_d_in(lm: LanguageModel, text: Path) -> None:
    x = 3.7 * torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)) + 2
    scaled = estimate_scale(x) * x
    assert abs(scaled.square().sum(-1).mean().item() - 16) < 1e-4


def test_held_out_activations_are_in_order_without_dropped_tokens(lm: LanguageModel, text: Path) -> None:
    rows = stream(lm, text).held_out
    keep = (rows > 2) & (rows != DROPPED)
    expected = lm.activations(rows)[keep]
    x = held_out_activations(lm, rows, [DROPPED], sequences=3)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(held_out_activations(lm, rows, [DROPPED], n_tokens=7, sequences=3), x[:7])
    with pytest.raises(UserError, match=r"0 of .* tokens are left"):
        held_out_activations(lm, rows, range(100))


def test_the_first_position_of_each_row_is_left_out_where_that_is_asked_for(lm: LanguageModel, text: Path) -> None:
    rows = stream(lm, text).held_out
    drop = dropped(lm, [DROPPED])
    rest = kept_activations(lm, rows, drop, skip_first=True)
    first = rows[:, 0]
    assert len(kept_activations(lm, rows, drop)) - len(rest) == int((~torch.isin(first, drop)).sum())
    assert torch.equal(held_out_activations(lm, rows, [DROPPED], sequences=len(rows), skip_first=True), rest)
    no_bos = open_tokens(text, lm.tokenizer, context=16, sequences=4, bos_id=None)
    rows = next(no_bos)
    n_kept = int((~torch.isin(rows[:, 1:], dropped(lm))).sum())  # separators between documents are special tokens
    assert rows.shape == (4, 16) and len(kept_activations(lm, rows, dropped(lm), skip_first=True)) == n_kept < 4 * 15


def test_a_stream_of_dropped_tokens_ends_in_a_sentence(lm: LanguageModel, text: Path) -> None:
    with pytest.raises(UserError, match=r"all tokens of .* are special or dropped"):
        next(ActivationBuffer(lm, stream(lm, text), buffer_tokens=64, batch_tokens=32, drop_ids=range(100)))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x: x * 0 + 1, "the same vector for every token"),
        (lambda x: x.index_fill(0, torch.tensor([5]), float("nan")), "are not finite"),
        (lambda x: x.index_fill(0, torch.tensor([5]), float("inf")), "are not finite"),
    ],
)
def test_activations_that_teach_nothing_are_refused(lm: LanguageModel, spoil, sentence: str) -> None:
    with pytest.raises(UserError, match=f"hook_resid_post .*{sentence}|hook_resid_post {sentence}"):
        check_activations(spoil(torch.randn(8, lm.d_in)), lm)


def test_special_tokens_carry_nothing_into_batches(lm: LanguageModel, text: Path) -> None:
    """A model whose special and dropped tokens give NaN still fills finite blocks."""

    class Marked:
        name, hook_name, d_in, device, special_ids = lm.name, lm.hook_name, 2, lm.device, lm.special_ids

        def activations(self, tokens: torch.Tensor) -> torch.Tensor:
            bad = (tokens <= 2) | (tokens == DROPPED)
            return torch.where(bad, torch.nan, tokens.float())[..., None].expand(-1, -1, 2)

    batches = ActivationBuffer(Marked(), stream(lm, text), buffer_tokens=256, batch_tokens=64, drop_ids=[DROPPED])
    assert all(torch.isfinite(next(batches)).all() for _ in range(8))


def test_activations_seen_ahead_are_the_next_ones_and_not_computed_again(
    lm: LanguageModel, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, (ahead, _) = buffer(lm, text), reference(lm, text, 50)
    expected = [next(plain) for _ in range(6)]
    batches, computed = buffer(lm, text), []
    whole = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens: computed.append(len(tokens)) or whole(tokens))
    seen = batches.peek(50)
    assert torch.equal(seen, ahead[: len(seen)])
    n_ahead = len(computed)
    got = [next(batches) for _ in range(6)]
    assert all(map(torch.equal, got, expected))
    n_in_all, computed[:] = len(computed), []
    again = buffer(lm, text)
    for _ in range(6):
        next(again)
    assert n_ahead and len(computed) == n_in_all
