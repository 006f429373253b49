"""Causal measures: gradients against finite differences and a literal splice, ablations one by one, the decision."""

import pytest
import torch

from sae_train.evals import causal
from sae_train.evals.causal import Prompts

D_IN, D_SAE, VOCAB, WORD, STEPS = 6, 9, 30, -3, 6
ANSWERS = torch.tensor([4, 9, 2, 17, 11])


class Vocabulary(list):
    """A tokenizer as far as batches need one: its length."""


class MixingLM:
    """One attention head and one tanh layer after the hook in float64, so that the last position reads the word."""

    def __init__(self, linear: bool = False, seed: int = 0):
        g = torch.Generator().manual_seed(seed)

        def weights(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.device, self.d_in, self.tokenizer = torch.device("cpu"), D_IN, Vocabulary(range(VOCAB))
        self.table, self.place = weights(VOCAB, D_IN), weights(16, D_IN)
        self.query, self.key, self.value, self.hidden = (weights(D_IN, D_IN) * 0.5 for _ in range(4))
        self.unembed = weights(D_IN, VOCAB)
        self.linear, self.rectangles = linear, []

    def weights(self):
        return [w for w in vars(self).values() if isinstance(w, torch.Tensor)]

    def activations(self, tokens):
        here = self.table[tokens] + self.place[: tokens.shape[1]]
        return here + 0.3 * torch.nn.functional.pad(here, (0, 0, 1, 0))[:, :-1]

    def logits(self, tokens, edit=None):
        assert (tokens >= 0).all()
        self.rectangles.append(tuple(tokens.shape))
        x = self.activations(tokens)
        x = x if edit is None else edit(x)
        if self.linear:
            return (x + x.cumsum(1) @ self.value) @ self.unembed
        score = (x @ self.query) @ (x @ self.key).mT / D_IN**0.5
        later = torch.ones_like(score, dtype=torch.bool).triu(1)
        x = x + score.masked_fill(later, -torch.inf).softmax(-1) @ (x @ self.value)
        return (x + torch.tanh(x @ self.hidden)) @ self.unembed


class TinySAE:
    """relu((x − b_dec)·W_enc) with decoder rows of several norms, and an error that is far from small."""

    def __init__(self, seed: int = 1):
        g = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(D_IN, D_SAE, generator=g, dtype=torch.float64)
        self.W_dec = torch.randn(D_SAE, D_IN, generator=g, dtype=torch.float64)
        self.b_dec = torch.randn(D_IN, generator=g, dtype=torch.float64)

    def encode(self, x):
        return torch.relu((x - self.b_dec) @ self.W_enc - 0.5)


def ragged_prompts(n: int = 7, seed: int = 2) -> Prompts:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (n, 9), generator=g)
    for row, length in enumerate(torch.randint(3, 10, (n,), generator=g).tolist()):
        tokens[row, : 9 - length] = -1
    return Prompts(tokens, WORD, ANSWERS, torch.randint(0, len(ANSWERS), (n,), generator=g))


def row_tokens(prompts: Prompts, row: int) -> torch.Tensor:
    return prompts.tokens[row][prompts.tokens[row] >= 0][None]


def word_activation(lm, prompts: Prompts, row: int) -> torch.Tensor:
    return lm.activations(row_tokens(prompts, row))[0, WORD]


def slow_metric(lm, prompts: Prompts, row: int, word: torch.Tensor) -> torch.Tensor:
    """The margin of one prompt with the word's activation replaced, written out."""

    def edit(x):
        return torch.cat([x[:, :WORD], word[None, None], x[:, WORD + 1 :]], 1)

    logits = lm.logits(row_tokens(prompts, row), edit)[0, -1]
    right = int(prompts.answer_ids[prompts.labels[row]])
    wrong = [int(a) for a in prompts.answer_ids if int(a) != right]
    return logits[right] - sum(logits[w] for w in wrong) / len(wrong)


def padded_latents(lm, sae, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """The words' firing latents as evals.latents pads them: value 0 at column 0 behind each row's own entries."""
    x = torch.stack([word_activation(lm, prompts, row) for row in range(len(prompts))])
    dense = sae.encode(x)
    width = int((dense > 0).sum(1).max())
    acts = torch.zeros(len(prompts), width, dtype=dense.dtype)
    columns = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, latents in enumerate(dense):
        fires = latents.nonzero().squeeze(1)
        acts[row, : len(fires)], columns[row, : len(fires)] = latents[fires], fires
    return acts, columns


def spliced_attributions(lm, sae, prompts, row: int) -> torch.Tensor:
    """The released definition for one prompt: an SAE in the model, latents and error scaled, gradients on latents."""
    x = word_activation(lm, prompts, row)
    f = sae.encode(x)
    error = x - (f @ sae.W_dec + sae.b_dec)
    total = torch.zeros(D_SAE, dtype=torch.float64)
    for step in range(STEPS):
        alpha = step / STEPS
        scaled = ((1 - alpha) * f).requires_grad_()
        word = scaled @ sae.W_dec + sae.b_dec + (1 - alpha) * error
        total += torch.autograd.grad(slow_metric(lm, prompts, row, word), scaled)[0]
    return total / STEPS * (0 - f)


@pytest.fixture
def lm():
    return MixingLM()


@pytest.fixture
def sae():
    return TinySAE()


@pytest.fixture
def prompts():
    return ragged_prompts()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_margin_is_the_right_answer_minus_the_mean_of_the_others():
    logits = torch.tensor([[0.0, 3.0, 1.0, 8.0], [2.0, 0.0, 5.0, -1.0]])
    got = causal.answer_margin(logits, torch.tensor([0, 2]), torch.tensor([3, 1, 0]))
    assert got.tolist() == [8.0 - 1.5, 2.0 - (-1.0 + 0.0) / 2]


def test_mean_gradients_equal_central_differences_of_the_interpolated_margin(lm, sae, prompts):
    got, eps = causal.mean_gradients(lm, prompts, sae.b_dec, STEPS), 1e-4
    for row in range(len(prompts)):
        x, slopes = word_activation(lm, prompts, row), torch.zeros(D_IN, dtype=torch.float64)
        for alpha in (0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6):
            here = (1 - alpha) * x + alpha * sae.b_dec
            for i, step in enumerate(torch.eye(D_IN, dtype=torch.float64) * eps):
                up, down = (slow_metric(lm, prompts, row, here + s) for s in (step, -step))
                slopes[i] += (up - down) / (2 * eps) / 6
        assert close(got[row], slopes, 1e-6)


def test_attributions_equal_those_of_a_literally_spliced_sae(lm, sae, prompts):
    acts, columns = padded_latents(lm, sae, prompts)
    gradients = causal.mean_gradients(lm, prompts, sae.b_dec, STEPS)
    got = causal.attributions(gradients, acts, columns, sae.W_dec)
    assert (acts == 0).any() and (acts != 0).any()
    for row in range(len(prompts)):
        wanted = spliced_attributions(lm, sae, prompts, row)[columns[row]]
        assert close(got[row], torch.where(acts[row] != 0, wanted, 0))


def test_blocks_and_batches_change_no_result(lm, sae, prompts, monkeypatch):
    acts, columns = padded_latents(lm, sae, prompts)
    gradients = causal.mean_gradients(lm, prompts, sae.b_dec)
    whole = causal.attributions(gradients, acts, columns, sae.W_dec)
    exact = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, 99)
    monkeypatch.setattr(causal, "_BLOCK_ELEMENTS", 3 * D_IN)
    monkeypatch.setattr(causal, "CPU_TOKENS", 1)
    assert close(causal.mean_gradients(lm, prompts, sae.b_dec), gradients)
    assert close(causal.attributions(gradients, acts, columns, sae.W_dec), whole)
    assert close(causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, 99), exact)


def test_attributions_and_error_sum_to_the_margin_lost_exactly_in_a_linear_model(sae, prompts):
    lm = MixingLM(linear=True)
    for row in range(len(prompts)):
        one = prompts.subset(torch.tensor([row]))
        x = word_activation(lm, prompts, row)
        f = sae.encode(x)
        gradient = causal.mean_gradients(lm, one, sae.b_dec)
        latents = causal.attributions(gradient, f[None], torch.arange(D_SAE)[None], sae.W_dec).sum()
        error = -(gradient[0] @ (x - f @ sae.W_dec - sae.b_dec))
        lost = slow_metric(lm, prompts, row, sae.b_dec) - slow_metric(lm, prompts, row, x)
        assert close(latents + error, lost)


def test_attributions_approach_completeness_with_more_steps_in_a_nonlinear_model(lm, sae, prompts):
    rows = range(len(prompts))
    x = torch.stack([word_activation(lm, prompts, row) for row in rows])
    lost = torch.stack([slow_metric(lm, prompts, r, sae.b_dec) - slow_metric(lm, prompts, r, x[r]) for r in rows])

    def gap(steps):
        return ((causal.mean_gradients(lm, prompts, sae.b_dec, steps) * (sae.b_dec - x)).sum(1) - lost).abs()

    # A left Riemann sum: its error falls as 1/steps.
    assert (gap(400) < 1e-2 * lost.abs().clamp(min=1)).all() and gap(400).max() < gap(40).max() / 8


def test_margins_move_the_word_of_their_own_row_only(lm, prompts):
    g = torch.Generator().manual_seed(3)
    rows = torch.randint(0, len(prompts), (40,), generator=g)
    deltas = torch.randn(40, D_IN, generator=g, dtype=torch.float64)
    got = causal.margins(lm, prompts, rows, deltas)
    for i, row in enumerate(rows.tolist()):
        assert close(got[i], slow_metric(lm, prompts, row, word_activation(lm, prompts, row) + deltas[i]))


def test_clean_margins_equal_those_of_zero_deltas(lm, prompts):
    rows = torch.tensor([3, 0, 0, 6, 2])
    clean = causal.margins(lm, prompts, rows, None)
    assert torch.equal(clean, causal.margins(lm, prompts, rows, torch.zeros(5, D_IN)))
    assert close(clean[1], slow_metric(lm, prompts, 0, word_activation(lm, prompts, 0)))


def test_batches_keep_to_the_budgets_of_tokens_and_logits(lm, monkeypatch):
    prompts, rows = ragged_prompts(40), torch.arange(40).repeat(10)
    for tokens, elements, most in ((64, 2**26, 64), (8192, 50 * VOCAB, 50), (1, 1, 9)):
        monkeypatch.setattr(causal, "CPU_TOKENS", tokens)
        monkeypatch.setattr(causal, "_LOGIT_ELEMENTS", elements)
        lm.rectangles.clear()
        causal.margins(lm, prompts, rows, None)
        causal.mean_gradients(lm, prompts, torch.zeros(D_IN, dtype=torch.float64))
        assert max(n * length for n, length in lm.rectangles) <= most
        assert sum(n for n, _ in lm.rectangles) == len(rows) + STEPS * len(prompts)


def test_nothing_to_do_gives_empty_results(lm, sae, prompts):
    none = prompts.subset(torch.tensor([], dtype=torch.long))
    empty = torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.long)
    assert causal.margins(lm, prompts, torch.tensor([], dtype=torch.long), None).shape == (0,)
    assert causal.mean_gradients(lm, none, sae.b_dec).shape == (0, D_IN)
    assert causal.exact_attributions(lm, none, *empty, sae.W_dec, 3).shape == (0, 1)
    assert causal.attributions(torch.zeros(0, D_IN), *empty, sae.W_dec).shape == (0, 1)


def test_exact_attributions_equal_ablations_one_by_one_with_the_error_kept(lm, sae, prompts):
    acts, columns = padded_latents(lm, sae, prompts)
    got = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, keep=99)
    for row in range(len(prompts)):
        x = word_activation(lm, prompts, row)
        f = sae.encode(x)
        error = x - (f @ sae.W_dec + sae.b_dec)
        for entry in acts[row].nonzero().squeeze(1).tolist():
            without = f.clone()
            without[columns[row, entry]] = 0
            spliced = without @ sae.W_dec + sae.b_dec + error
            assert close(got[row, entry], slow_metric(lm, prompts, row, spliced) - slow_metric(lm, prompts, row, x))
        assert (got[row][acts[row] == 0] == 0).all()


def test_exact_attributions_equal_integrated_gradients_in_a_linear_model(sae, prompts):
    lm = MixingLM(linear=True)
    acts, columns = padded_latents(lm, sae, prompts)
    exact = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, keep=99)
    gradients = causal.mean_gradients(lm, prompts, sae.b_dec)
    assert exact.abs().max() > 0.1
    assert close(exact, causal.attributions(gradients, acts, columns, sae.W_dec))


def test_exact_attributions_run_only_the_largest_vectors(lm, sae, prompts):
    acts, columns = padded_latents(lm, sae, prompts)
    every = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, keep=99)
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
        ([3.0, -1.0, 0.0], [0.5, 0.5, 0.5], False, 0),  # removing the first helps the answer
        ([-3.0, 4.5, 0.0], [0.5, 0.5, 0.5], False, 1),  # the most negative is not the largest
        ([-2.0, -1.0, 0.0], [0.5, 0.5, 0.5], True, 0),  # margin exactly 1.0
        ([-2.0, 1.0, 0.0], [0.5, 0.5, 0.5], True, 0),
        ([-2.0, -1.01, 0.0], [0.5, 0.5, 0.5], False, 0),  # margin .99
        ([-2.0, 1.01, 0.0], [0.5, 0.5, 0.5], False, 0),
        ([-2.0, 0.0, 0.0], [0.025, 0.5, 0.5], True, 0),
        ([-2.0, 0.0, 0.0], [0.0249, 0.5, 0.5], False, 0),
        ([-2.0, 0.0, 0.0], [-0.5, 0.5, 0.5], False, 0),
        ([-1.0], [0.5], True, 0),  # one latent: there is no second to lead
        ([-0.99], [0.5], False, 0),
        ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5], False, 0),  # nothing fires
        ([float("nan"), -3.0, 0.0], [0.5, 0.5, 0.5], False, 0),
    ],
)
def test_absorbed_follows_the_decision_table(attribution, cos, flag, first):
    got, entry, s1, s2 = causal.absorbed(torch.tensor([attribution]), torch.tensor([cos]))
    assert got.tolist() == [flag] and got.dtype == torch.bool
    ranked = sorted(attribution, key=abs, reverse=True) + [0.0]
    if any(attribution) and ranked[0] == ranked[0]:
        assert entry.tolist() == [first]
        assert close(torch.cat([s1, s2]), torch.tensor(ranked[:2]), 1e-6)


def test_absorbed_takes_other_thresholds():
    attribution, cos = torch.tensor([[-2.0, 1.5]]), torch.tensor([[0.01, 0.0]])
    assert not causal.absorbed(attribution, cos)[0]
    assert causal.absorbed(attribution, cos, min_margin=0.5, min_cos=0.01)[0]


def test_interventions_are_the_four_edits_written_out(lm, prompts):
    g = torch.Generator().manual_seed(4)
    removed, control, inserted = torch.randn(3, len(prompts), D_IN, generator=g, dtype=torch.float64)
    got = causal.intervene(lm, prompts, removed, control, inserted)
    for row in range(len(prompts)):
        x = word_activation(lm, prompts, row)
        edits = {
            "absorber": x - removed[row],
            "random": x - control[row],
            "parent": x + inserted[row],
            "swap": x - removed[row] + inserted[row],
        }
        clean = slow_metric(lm, prompts, row, x)
        assert close(got.clean[row], clean)
        for name, word in edits.items():
            assert close(getattr(got, name)[row], slow_metric(lm, prompts, row, word) - clean)


def control_case():
    """Three words: two free latents besides an excluded one, only an excluded one, and one free latent behind it."""
    W_dec = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(5))
    W_dec[4] = 0
    acts = torch.tensor([[1.0, 2.0, 3.0, 9.0], [2.0, 0.0, 0.0, 0.0], [7.0, 0.5, 0.0, 0.0]])
    columns = torch.tensor([[0, 1, 2, 4], [1, 0, 0, 0], [3, 2, 0, 0]])
    exclude = torch.tensor([[True, False, False, False], [True, False, False, False], [True, False, False, False]])
    return acts, columns, W_dec, exclude, torch.randn(3, D_IN, generator=torch.Generator().manual_seed(6))


def test_controls_are_other_firing_latents_at_the_norm_of_the_removed_vector():
    acts, columns, W_dec, exclude, removed = control_case()
    g, chosen = torch.Generator().manual_seed(7), []
    for _ in range(200):
        control = causal.matched_controls(acts, columns, W_dec, exclude, removed, g)
        assert close(control[[0, 2]].norm(dim=1), removed[[0, 2]].norm(dim=1), 1e-5)
        assert (control[1] == 0).all()  # its only latent is excluded
        cos = torch.nn.functional.cosine_similarity(control[:, None], W_dec, dim=-1)
        assert cos[2].argmax() == 2
        chosen.append(int(cos[0].argmax()))
        assert cos[0].max() > 1 - 1e-5
    # Latents 1 and 2 are free, 0 is excluded, 4 has no direction; 200 fair draws leave 60–140 with odds of 2e-8.
    assert set(chosen) == {1, 2} and 60 < chosen.count(1) < 140


def test_controls_repeat_with_the_generator():
    case = control_case()
    first, again = (causal.matched_controls(*case, torch.Generator().manual_seed(8)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_prompt_that_ends_before_its_word_is_refused():
    with pytest.raises(AssertionError, match="before its word"):
        Prompts(torch.tensor([[-1, -1, 4, 5]]), WORD, ANSWERS, torch.tensor([0]))


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_random_state_and_weights_stay_as_they_were(lm, sae, prompts, enabled):
    for w in [*lm.weights(), sae.W_dec, sae.b_dec]:
        w.requires_grad_(w.is_floating_point())
    with torch.no_grad():
        acts, columns = padded_latents(lm, sae, prompts)
    state = torch.get_rng_state()
    with torch.set_grad_enabled(enabled):
        gradients = causal.mean_gradients(lm, prompts, sae.b_dec)
        attribution = causal.attributions(gradients, acts, columns, sae.W_dec)
        exact = causal.exact_attributions(lm, prompts, acts, columns, sae.W_dec, 3)
        removed = acts[:, :1] * sae.W_dec[columns[:, 0]].detach()
        exclude = torch.zeros_like(acts, dtype=torch.bool)
        g = torch.Generator().manual_seed(0)
        control = causal.matched_controls(acts, columns, sae.W_dec, exclude, removed, g)
        changes = causal.intervene(lm, prompts, removed, control, -removed)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(torch.get_rng_state(), state)
    assert all(w.grad is None for w in [*lm.weights(), sae.W_dec, sae.b_dec])
    assert not any(t.requires_grad for t in [gradients, attribution, exact, control, *vars(changes).values()])
