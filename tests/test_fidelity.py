"""Loss recovered, on a tiny model whose cross-entropies can be written down."""

from __future__ import annotations

import pytest
import torch
from eval_fakes import D_IN, FakeLM, fake_words, word_tokenizer

from sae_train.errors import UserError
from sae_train.evals.baselines import random_sae
from sae_train.evals.fidelity import FidelityData, loss_recovered, losses_recovered


class Scaled:
    """An "SAE" that multiplies by a number."""

    W_dec = torch.zeros(4, D_IN)

    def __init__(self, factor):
        self.factor = factor

    def encode(self, x):
        return self.factor * x

    def decode(self, latents):
        return latents


@pytest.fixture(scope="module")
def lm():
    return FakeLM(word_tokenizer(fake_words()))


@pytest.fixture(scope="module")
def tokens(lm):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, len(lm.tokenizer), (6, 12), generator=g)
    tokens[:, 0] = lm.bos_id
    tokens[2, 5] = lm.bos_id
    return tokens


def test_identity_recovers_all_and_zero_nothing(lm, tokens):
    same, zero = loss_recovered(lm, Scaled(1.0), tokens), loss_recovered(lm, Scaled(0.0), tokens)
    assert same["metrics/ce_loss_score"] == pytest.approx(1.0) and zero["metrics/ce_loss_score"] == pytest.approx(0.0)
    assert same["metrics/kl_div_with_sae"] == pytest.approx(0.0, abs=1e-6)
    assert zero["metrics/ce_loss_with_sae"] == pytest.approx(zero["metrics/ce_loss_with_ablation"])


def test_by_hand(lm, tokens):
    found = loss_recovered(lm, Scaled(0.5), tokens)
    x = lm.activations(tokens)
    special = tokens == lm.bos_id
    spliced = torch.where(special[..., None], x, 0.5 * x) @ lm.unembed
    scored = ~special[:, 1:]
    target = tokens[:, 1:][scored]

    def log_probs(logits):
        return logits[:, :-1][scored].log_softmax(-1)

    loss = torch.nn.functional.nll_loss(log_probs(spliced), target)
    assert found["metrics/ce_loss_with_sae"] == pytest.approx(float(loss), rel=1e-5)
    clean = log_probs(x @ lm.unembed)
    kl = torch.nn.functional.kl_div(log_probs(spliced), clean, log_target=True, reduction="batchmean")
    assert found["metrics/kl_div_with_sae"] == pytest.approx(float(kl), rel=1e-4)


def test_shared_clean_pass_and_recomputed_one_agree(lm, tokens, monkeypatch):
    from sae_train.evals import fidelity

    shared = loss_recovered(lm, Scaled(0.3), FidelityData.build(lm, tokens))
    monkeypatch.setattr(fidelity, "_KEEP_ELEMENTS", 0)
    monkeypatch.setattr(fidelity, "_LOGIT_ELEMENTS", 1)
    again = loss_recovered(lm, Scaled(0.3), tokens)
    assert again == pytest.approx(shared, rel=1e-5)


def test_saes_measured_together_share_the_clean_pass_and_have_their_own_figures(lm, tokens, monkeypatch):
    from sae_train.evals import fidelity

    monkeypatch.setattr(fidelity, "_KEEP_ELEMENTS", 0)
    data = FidelityData.build(lm, tokens)
    saes = [Scaled(factor) for factor in (0.2, 0.5, 0.9)]
    alone = [loss_recovered(lm, sae, data) for sae in saes]
    edits = []
    logits = lm.logits
    monkeypatch.setattr(lm, "logits", lambda tokens, edit=None, start=None: edits.append(edit) or logits(tokens, edit))
    heard = []
    makers = [lambda sae=sae: sae for sae in saes]
    assert losses_recovered(lm, makers, data, lambda *said: heard.append(said)) == alone
    assert heard == [("measuring loss recovered", n, 3) for n in range(3)]
    assert sum(edit is None for edit in edits) == 1 and len(edits) == 4


def test_dropped_tokens_stay_clean(lm, tokens):
    every_id = range(len(lm.tokenizer))
    kept = loss_recovered(lm, Scaled(0.0), FidelityData.build(lm, tokens, every_id))
    assert kept["metrics/ce_loss_with_sae"] == pytest.approx(kept["metrics/ce_loss_without_sae"])


def test_nothing_to_predict_is_a_sentence(lm):
    with pytest.raises(UserError, match="at least two tokens"):
        loss_recovered(lm, Scaled(1.0), torch.full((2, 4), lm.bos_id))


@pytest.mark.parametrize(("architecture", "k"), [("topk", 5), ("relu", None)])
def test_random_sae_has_the_width_and_l0(architecture, k):
    class Like:
        W_dec = torch.zeros(128, 16)
        cfg = type("Cfg", (), {"architecture": architecture, "k": k})

        def encode(self, x):
            return torch.ones(len(x), 128) * (torch.arange(128) < 5)

    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + 2
    sae = random_sae(Like(), x)
    assert sae.W_dec.shape == (128, 16) and torch.allclose(sae.W_dec.norm(dim=1), torch.ones(128))
    assert float((sae.encode(x) != 0).sum(1).float().mean()) == pytest.approx(5, abs=0.1)
    assert (sae(x) - x).square().sum() < (x - x.mean(0)).square().sum()
    assert torch.equal(random_sae(Like(), x).W_dec, sae.W_dec)
