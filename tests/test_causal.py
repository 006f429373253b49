"""Causal measures: gradients against finite differences and a literal splice, ablations one by one, the decision."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sae_train.data.language_model import load_language_model
from sae_train.evals import causal
from sae_train.evals.causal import Prompts
from sae_train.evals.prompts import right_aligned

D_IN, D_SAE, VOCAB, WORD, ALL = 6, 9, 30, -3, 99


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


class MixingLM:
    """One attention head and one tanh layer after the hook in float64, so that the last position reads the word."""

    def __init__(self, linear: bool = False):
        self.weights = [w / 2 for w in draw(0, (VOCAB, D_IN), (16, D_IN), *[(D_IN, D_IN)] * 4, (D_IN, VOCAB))]
        self.device, self.tokenizer = torch.device("cpu"), range(VOCAB)
        self.linear, self.rectangles = linear, []

    def activations(self, tokens):
        here = self.weights[0][tokens] + self.weights[1][: tokens.shape[1]]
        return here + 0.3 * torch.nn.functional.pad(here, (0, 0, 1, 0))[:, :-1]

    def logits(self, tokens, edit=None):
        assert (tokens >= 0).all()
        self.rectangles.append(tuple(tokens.shape))
        x = (edit or torch.clone)(self.activations(tokens))
        *_, query, key, value, hidden, unembed = self.weights
        if self.linear:
            return (x + x.cumsum(1) @ value) @ unembed
        score = (x @ query) @ (x @ key).mT / D_IN**0.5
        x = x + (score + torch.full_like(score, -torch.inf).triu(1)).softmax(-1) @ (x @ value)
        return (x + torch.tanh(x @ hidden)) @ unembed


@pytest.fixture
def lm():
    return MixingLM()


@pytest.fixture
def sae():
    """Decoder rows have several norms, and the error is far from small."""
    W_enc, W_dec, b_dec = draw(1, (D_IN, D_SAE), (D_SAE, D_IN), (D_IN,))
    W_dec *= torch.tensor([0.1, 1, 4] * 3)[:, None]
    return SimpleNamespace(
        W_enc=W_enc,
        decode=lambda f: f @ W_dec + b_dec,
        W_dec=W_dec,
        b_dec=b_dec,
        encode=lambda x: torch.relu((x - b_dec) @ W_enc - 0.5),
    )


@pytest.fixture
def prompts():
    return ragged_prompts(7)


def ragged_prompts(n: int) -> Prompts:
    g = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 10, (n, 1), generator=g)
    tokens = torch.where(torch.arange(9) >= 9 - lengths, torch.randint(0, VOCAB, (n, 9), generator=g), -1)
    return Prompts(tokens, WORD, torch.tensor([4, 9, 2, 17, 11]), torch.randint(0, 5, (n,), generator=g))


def words(lm, prompts: Prompts) -> torch.Tensor:
    return torch.stack([lm.activations(t[t >= 0][None])[0, WORD] for t in prompts.tokens])


def slow_margin(lm, prompts: Prompts, row: int, word: torch.Tensor) -> torch.Tensor:
    """The margin of one prompt with the word's activation replaced, written out."""

    def edit(x):
        return torch.cat([x[:, :WORD], word[None, None], x[:, WORD + 1 :]], 1)

    logits = lm.logits(prompts.tokens[row][prompts.tokens[row] >= 0][None], edit)[0, -1]
    right = int(prompts.answer_ids[prompts.labels[row]])
    return logits[right] - sum(logits[int(a)] for a in prompts.answer_ids if int(a) != right) / 4


def slow_margins(lm, prompts, replaced: torch.Tensor) -> torch.Tensor:
    return torch.stack([slow_margin(lm, prompts, row, word) for row, word in enumerate(replaced)])


def padded_latents(lm, sae, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """The words' firing latents as evals.latents pads them: value 0 at column 0 behind each row's own entries."""
    dense = sae.encode(words(lm, prompts))
    columns = (dense > 0).long().argsort(stable=True, dim=1, descending=True)[:, : (dense > 0).sum(1).max()]
    acts = dense.gather(1, columns)
    return acts, torch.where(acts > 0, columns, 0)


def spliced_attributions(lm, sae, prompts, row: int) -> torch.Tensor:
    """The released definition for one prompt: an SAE in the model, latents and error scaled, gradients on latents."""
    x = words(lm, prompts)[row]
    f = sae.encode(x)
    error = x - (f @ sae.W_dec + sae.b_dec)
    total = torch.zeros(D_SAE, dtype=torch.float64)
    for alpha in (0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6):
        scaled = ((1 - alpha) * f).requires_grad_()
        word = scaled @ sae.W_dec + sae.b_dec + (1 - alpha) * error
        total += torch.autograd.grad(slow_margin(lm, prompts, row, word), scaled)[0]
    return total / 6 * (0 - f)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_mean_gradients_equal_central_differences_of_the_interpolated_margin(lm, sae, prompts):
    x, eps = words(lm, prompts), 1e-4
    slopes = torch.zeros_like(x)
    for alpha in (0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6):
        here = (1 - alpha) * x + alpha * sae.b_dec
        for i, step in enumerate(torch.eye(D_IN, dtype=torch.float64) * eps):
            up, down = slow_margins(lm, prompts, here + step), slow_margins(lm, prompts, here - step)
            slopes[:, i] += (up - down) / (2 * eps) / 6
    assert close(causal.mean_gradients(lm, prompts, sae.b_dec), slopes, 1e-6)


def test_attributions_equal_those_of_a_literally_spliced_sae(lm, sae, prompts):
    acts, columns = padded_latents(lm, sae, prompts)
    got = causal.attributions(causal.mean_gradients(lm, prompts, sae.b_dec), acts, columns, sae.W_dec)
    wanted = torch.stack([spliced_attributions(lm, sae, prompts, row) for row in range(len(prompts))])
    assert (acts == 0).any() and got.abs().max() > 0.1
    assert close(got, torch.where(acts != 0, wanted.gather(1, columns), 0))


def test_in_a_linear_model_attributions_are_exact_and_sum_with_the_error_to_the_margin_lost(sae, prompts):
    lm = MixingLM(linear=True)
    x = words(lm, prompts)
    f, gradients = sae.encode(x), causal.mean_gradients(lm, prompts, sae.b_dec)
    table = f, torch.arange(D_SAE).expand_as(f), sae.W_dec
    latents = causal.attributions(gradients, *table)
    assert close(latents, causal.exact_attributions(lm, prompts, *table, ALL))
    error = -(gradients * (x - f @ sae.W_dec - sae.b_dec)).sum(1)
    assert close(latents.sum(1) + error, slow_margins(lm, prompts, 0 * x + sae.b_dec) - slow_margins(lm, prompts, x))


def test_margins_move_the_word_of_their_own_row_only(lm, prompts):
    rows = torch.randint(0, len(prompts), (40,), generator=torch.Generator().manual_seed(3))
    (deltas,) = draw(3, (40, D_IN))
    deltas[::5] = 0
    got, clean = causal.margins(lm, prompts, rows, deltas), causal.margins(lm, prompts, rows, None)
    assert close(got, slow_margins(lm, prompts.subset(rows), words(lm, prompts)[rows] + deltas))
    assert torch.equal(clean[::5], got[::5]) and not close(clean[1], got[1])


@pytest.mark.parametrize(("tokens", "elements", "most"), [(64, 2**26, 64), (8192, 50 * VOCAB, 50), (1, 1, 9)])
def test_batches_keep_to_their_budgets_and_change_no_result(lm, sae, monkeypatch, tokens, elements, most):
    prompts, rows = ragged_prompts(40), torch.arange(40).repeat(10)
    latents = *padded_latents(lm, sae, prompts), sae.W_dec

    def results():
        lm.rectangles.clear()
        gradients = causal.mean_gradients(lm, prompts, sae.b_dec)
        both = causal.attributions(gradients, *latents), causal.exact_attributions(lm, prompts, *latents, 3)
        return torch.cat([gradients, *both, causal.margins(lm, prompts, rows, None).view(40, 10)], 1)

    whole, n_runs = results(), sum(n for n, _ in lm.rectangles)
    for name, value in (("_CPU_TOKENS", tokens), ("_LOGIT_ELEMENTS", elements), ("_BLOCK_ELEMENTS", 20 * D_IN)):
        monkeypatch.setattr(causal, name, value)
    assert close(results(), whole)
    assert max(n * length for n, length in lm.rectangles) <= most
    assert sum(n for n, _ in lm.rectangles) == n_runs


def test_no_prompts_give_empty_results(lm, sae, prompts):
    none = prompts.subset(torch.arange(0))
    latents = torch.zeros(0, 1), torch.zeros(0, 1).long()
    assert causal.margins(lm, prompts, torch.arange(0), None).shape == (0,)
    assert causal.mean_gradients(lm, none, sae.b_dec).shape == (0, D_IN)
    assert causal.attributions(torch.zeros(0, D_IN), *latents, sae.W_dec).shape == (0, 1)
    assert causal.exact_attributions(lm, none, *latents, sae.W_dec, 3).shape == (0, 1)


def test_exact_attributions_equal_ablations_one_by_one_with_the_error_kept(lm, sae, prompts):
    acts, columns = padded_latents(lm, sae, prompts)
    x = words(lm, prompts)
    f, clean = sae.encode(x), slow_margins(lm, prompts, x)
    error, wanted = x - (f @ sae.W_dec + sae.b_dec), torch.zeros_like(acts)
    for row, entry in acts.nonzero().tolist():
        without = f[row].clone()
        without[columns[row, entry]] = 0
        spliced = without @ sae.W_dec + sae.b_dec + error[row]
        wanted[row, entry] = slow_margin(lm, prompts, row, spliced) - clean[row]
    assert close(causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, ALL), wanted)


def test_exact_attributions_run_only_the_largest_vectors(lm, sae, prompts):
    acts, columns = padded_latents(lm, sae, prompts)
    every = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, ALL)
    lm.rectangles.clear()
    some = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, keep=2)
    size = acts * sae.W_dec.norm(dim=1)[columns]
    largest = (size >= size.sort(1, descending=True).values[:, 1:2]) & (size > 0)
    assert close(some, torch.where(largest, every, 0))
    assert sum(n for n, _ in lm.rectangles) == len(prompts) + int(largest.sum())


@pytest.mark.parametrize(
    ("attribution", "cos", "flag", "first"),
    [
        ([-0.2, -3.0, 1.5], [0.0, 0.3, 0.9], True, 1),
        ([3.0, -1.0], [0.5, 0.5], False, 0),  # removing the first helps the answer
        ([-3.0, 4.5], [0.5, 0.5], False, 1),  # the most negative is not the largest
        ([-2.0, -1.0], [0.5, 0.5], True, 0),  # leads by exactly 1.0
        ([-2.0, -1.01], [0.5, 0.5], False, 0),
        ([-2.0, 1.01], [0.5, 0.5], False, 0),
        ([-2.0, 0.0], [0.025, 0.5], True, 0),
        ([-2.0, 0.0], [0.0249, 0.5], False, 0),
        ([-1.0], [0.5], True, 0),  # one latent: there is no second to lead
        ([0.0, 0.0], [0.5, 0.5], False, None),  # nothing fires
        ([float("nan"), -3.0], [0.5, 0.5], False, None),
    ],
)
def test_absorbed_follows_the_decision_table(attribution, cos, flag, first):
    got, entry, s1, s2 = causal.absorbed(torch.tensor([attribution]), torch.tensor([cos]))
    assert got.tolist() == [flag]
    ranked = [*sorted(attribution, key=abs, reverse=True), 0.0]
    assert first is None or (int(entry) == first and close(torch.cat([s1, s2]), torch.tensor(ranked[:2]), 1e-6))


def test_absorbed_takes_other_thresholds():
    case = torch.tensor([[-2.0, 1.5]]), torch.tensor([[0.01, 0.0]])
    assert not causal.absorbed(*case)[0] and causal.absorbed(*case, min_margin=0.5, min_cos=0.01)[0]


def test_interventions_are_the_four_edits_written_out(lm, prompts):
    removed, control, inserted = draw(4, *[(len(prompts), D_IN)] * 3)
    got, x = causal.intervene(lm, prompts, removed, control, inserted), words(lm, prompts)
    assert close(got.clean, slow_margins(lm, prompts, x))
    for name, delta in zip(("absorber", "random", "parent"), (-removed, -control, inserted), strict=True):
        assert close(getattr(got, name), slow_margins(lm, prompts, x + delta) - got.clean)
    assert close(got.swap, slow_margins(lm, prompts, x - removed + inserted) - got.clean)


def test_controls_are_other_firing_latents_at_the_norm_of_the_removed_vector():
    W_dec, removed = draw(5, (5, D_IN), (3, D_IN))
    W_dec[4] = 0
    # Each word's first entry is excluded: two free latents and one without direction are left; none; one.
    acts = torch.tensor([[1.0, 2.0, 3.0, 9.0], [2.0, 0.0, 0.0, 0.0], [7.0, 0.5, 0.0, 0.0]])
    columns = torch.tensor([[0, 1, 2, 4], [1, 0, 0, 0], [3, 2, 0, 0]])
    case = acts, columns, W_dec, torch.tensor([[True, False, False, False]]).expand(3, 4), removed
    g, chosen = torch.Generator().manual_seed(7), []
    for _ in range(200):
        control = causal.matched_controls(*case, g)
        cos = torch.nn.functional.cosine_similarity(control[:, None], W_dec, dim=-1)
        chosen.append(int(cos[0].argmax()))
        assert close(control[[0, 2]].norm(dim=1), removed[[0, 2]].norm(dim=1)) and (control[1] == 0).all()
        assert cos[2].argmax() == 2 and close(cos[[0, 2]].amax(1), torch.ones(2, dtype=torch.float64))
    # 200 fair draws between latents 1 and 2 leave 60–140 with odds of 2e-8.
    assert set(chosen) == {1, 2} and 60 < chosen.count(1) < 140
    first, again = (causal.matched_controls(*case, torch.Generator().manual_seed(8)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_prompt_that_ends_before_its_word_is_refused():
    with pytest.raises(AssertionError, match="before its word"):
        Prompts(torch.tensor([[-1, -1, 4, 5]]), WORD, torch.arange(5), torch.tensor([0]))


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_random_state_and_weights_stay_as_they_were(lm, sae, prompts, enabled):
    acts, columns = padded_latents(lm, sae, prompts)
    weights = [w.requires_grad_() for w in [*lm.weights, sae.W_dec, sae.b_dec]]
    state, g = torch.get_rng_state(), torch.Generator().manual_seed(0)
    with torch.set_grad_enabled(enabled):
        gradients = causal.mean_gradients(lm, prompts, sae.b_dec)
        ig = causal.attributions(gradients, acts, columns, sae.W_dec)
        exact = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, 3)
        control = causal.matched_controls(acts, columns, sae.W_dec, acts < 0, gradients, g)
        changes = causal.intervene(lm, prompts, gradients, control, -gradients)
        clean = causal.margins(lm, prompts, torch.arange(7), None)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(torch.get_rng_state(), state) and all(w.grad is None for w in weights)
    assert not any(t.requires_grad for t in [gradients, ig, exact, clean, control, *vars(changes).values()])


def test_the_embedded_model_answers_by_the_word_that_stands_in_the_residual():
    lm = load_language_model("speller")
    chosen = [" short", " house", " river", " king", " green", " milk", " paper", " lamp"]
    shown = "<bos>\n dog has the first letter: D\n cat has the first letter: C\n moon has the first letter: M\n"
    texts = [f"{shown}{w} has the first letter:" for w in chosen]
    tokens = torch.tensor(lm.tokenizer(texts, add_special_tokens=False)["input_ids"])
    answers = torch.tensor(lm.tokenizer.convert_tokens_to_ids([f" {chr(65 + i)}" for i in range(26)]))
    prompts = Prompts(tokens, -6, answers, torch.tensor([ord(w[1]) - ord("a") for w in chosen]))
    x = lm.activations(tokens)[:, -6]
    swap = x.roll(1, 0) - x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noise *= swap.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    got = causal.intervene(lm, prompts, -swap, noise, swap)
    assert (got.clean > 5).all() and got.absorber.mean() < 3 * got.random.mean()
    away = x.mean(0) - x
    path = (causal.mean_gradients(lm, prompts, x.mean(0), 100) * away).sum(1)
    assert torch.allclose(path.mean(), causal.intervene(lm, prompts, -away, away, away).absorber.mean(), rtol=0.05)


@pytest.mark.parametrize("elements", [causal._LOGIT_ELEMENTS, 1])
def test_margins_behind_prefixes_that_are_read_once_are_those_of_whole_prompts(elements, monkeypatch):
    """Contexts of two lengths, two words behind each, three changes a word."""
    lm = load_language_model("speller")
    lines = [" dog has the first letter: D\n", " dog has the first letter: D\n cat has the first letter: C\n"]
    words = [" short", " house", " river", " king"]
    texts = [f"<bos>\n{lines[i % 2]}{word} has the first letter:" for i, word in enumerate(words)]
    rows = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers = torch.tensor(lm.tokenizer.convert_tokens_to_ids([f" {chr(65 + i)}" for i in range(26)]))
    labels = torch.tensor([ord(word[1]) - ord("a") for word in words])
    prompts = Prompts(right_aligned(rows), -6, answers, labels)
    each = torch.arange(4).repeat(3)
    deltas = torch.randn(12, lm.d_in, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(causal, "_LOGIT_ELEMENTS", elements)
    for change in (None, deltas):
        whole, behind = (causal.margins(lm, replace(prompts, shared=s), each, change) for s in (False, True))
        assert torch.allclose(whole, behind, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(behind, causal.margins(lm, prompts, each, None), atol=0.01)
    assert len(causal.margins(lm, replace(prompts, shared=True), each[:0], None)) == 0
