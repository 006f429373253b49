"""The planted dictionary and the measures against it: what was asked for comes, and known SAEs get known marks."""

import math

import pytest
import torch

from sae_train import train
from sae_train.cli import main
from sae_train.config import SAESpec, TrainSettings, flat, resolve
from sae_train.data.buffer import estimate_scale
from sae_train.data.toy import PLANTED, held_out_sample, open_toy, plant, random_directions
from sae_train.data.toy_source import ToyStream
from sae_train.evals.presets import SAEBENCH
from sae_train.evals.truth import k_sparse_latents, truth
from sae_train.files import write_json
from sae_train.runs import session
from sae_train.runs.run import Run, resume
from sae_train.sae.model import SAE, SAEConfig
from sae_train.training.learner import Learner

N = 20_000


@pytest.mark.parametrize("dataset", PLANTED)
def test_features_are_as_frequent_as_planted(dataset):
    toy = open_toy(dataset)
    sample = held_out_sample(toy, N)
    found = sample.features.bincount(minlength=toy.n_features) / N
    p = toy.frequency
    deviation = (found - p) / (p * (1 - p) / N).clamp_min(1e-12).sqrt()
    assert deviation.abs().max() < 5
    assert 0.9 < deviation[p < 1].std() < 1.15
    assert len(sample.features) / N == pytest.approx(float(p.sum()), rel=0.02)


def test_letters_have_one_child_with_its_parent_and_true_l0_4():
    toy = open_toy("letters")
    assert float(toy.frequency.sum()) == pytest.approx(4.0)
    sample = held_out_sample(toy, 2000)
    active = torch.zeros(2000, toy.n_features, dtype=torch.bool).index_put_(
        (sample.rows, sample.features), torch.tensor(True)
    )
    children = active[:, 26:338]
    assert (children.sum(1) == 1).all() and (active[:, :26].sum(1) == 1).all()
    assert (children.float().argmax(1) // 12 == active[:, :26].float().argmax(1)).all()


@pytest.mark.parametrize("dataset", ["letters", "trees"])
def test_a_child_is_never_without_its_parent(dataset):
    toy = open_toy(dataset)
    sample = held_out_sample(toy, 5000)
    cells = {*zip(sample.rows.tolist(), sample.features.tolist(), strict=True)}
    assert len(cells) == len(sample.rows), "a feature is active once or not at all"
    parents = toy.parents.tolist()
    assert all((row, parents[f]) in cells for row, f in cells if parents[f] >= 0)


def test_pairs_have_the_correlation_that_was_planted():
    toy = open_toy("pairs")
    sample = held_out_sample(toy, N)
    first = torch.zeros(2, N).index_put_((sample.features[sample.features < 2], sample.rows[sample.features < 2]),
                                         torch.tensor(1.0))  # fmt: skip
    assert torch.corrcoef(first)[0, 1] == pytest.approx(0.5, abs=0.05)


def test_activations_are_the_sum_of_their_features_up_to_magnitude_and_noise():
    toy = open_toy("dictionary")
    sample = held_out_sample(toy, N)
    plain = torch.zeros(N, toy.d_in).index_add_(0, sample.rows, toy.directions[sample.features])
    spread = (sample.x - plain).square().sum(1).mean()
    assert spread == pytest.approx(float(toy.frequency.sum()) * 0.1**2 + toy.d_in * 0.02**2, rel=0.05)


def test_a_stream_repeats_by_seed_and_resumes_bit_equal():
    toy = open_toy("letters")
    one, two, other = ToyStream(toy, 64), ToyStream(toy, 64), ToyStream(toy, 64, seed=1)
    first = [next(one) for _ in range(3)]
    assert torch.equal(first[0], next(two)) and not torch.equal(first[0], next(other))
    state = one.state_dict()
    rest = [next(one) for _ in range(3)]
    two.load_state_dict(state)
    assert all(torch.equal(x, next(two)) for x in rest)
    assert torch.equal(ToyStream(toy, 64).peek(150), torch.cat(first)[:150])
    assert first[0].dtype == torch.float32 and first[0].shape == (64, 64)


PARENTS, CHILDREN = 4, 5


def small():
    """4 parents × 5 children on orthogonal directions."""
    n = PARENTS * CHILDREN
    words = [(1 / n, (word // CHILDREN, PARENTS + word)) for word in range(n)]
    parents = [-1] * PARENTS + [word // CHILDREN for word in range(n)]
    return plant("small", [(1.0, words)], parents, torch.eye(PARENTS + n))


def made(W_enc: torch.Tensor, W_dec: torch.Tensor, threshold: float = 0.3) -> SAE:
    sae = SAE(SAEConfig("jumprelu", W_enc.shape[0], W_enc.shape[1]))
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
        sae.threshold.fill_(threshold)
    return sae


def test_the_true_dictionary_is_recovered_and_absorbs_nothing():
    toy = small()
    figures = truth(made(toy.directions.T, toy.directions), toy, held_out_sample(toy, 4000))
    assert figures["mcc"] == figures["recovered"] == figures["f1"] == pytest.approx(1.0)
    assert figures["parent_precision"] == figures["parent_recall"] == pytest.approx(1.0)
    for name in ("absorption", "absorption_weighted", "absorption_split", "encoder_child", "decoder_parent"):
        assert figures[name] == pytest.approx(0.0, abs=1e-6), name


def test_a_dictionary_whose_children_took_the_parents_over_absorbs_everything():
    """Child rows are (p + c)/√2, and a child in the input silences its parent's latent."""
    toy = small()
    d, child = toy.directions, (toy.parents >= 0).nonzero().squeeze(1)
    W_enc, W_dec = d.clone(), d.clone()
    W_dec[child] = (d[child] + d[toy.parents[child]]) / math.sqrt(2)
    W_enc.index_add_(0, toy.parents[child], -d[child])
    figures = truth(made(W_enc.T, W_dec), toy, held_out_sample(toy, 4000))
    assert figures["absorption"] == figures["absorption_weighted"] == pytest.approx(1.0)
    assert figures["parent_recall"] == 0.0
    assert figures["encoder_child"] == pytest.approx(-1 / math.sqrt(1 + CHILDREN), rel=1e-5)
    assert figures["decoder_parent"] == pytest.approx(1 / math.sqrt(2), rel=1e-5)
    # Five children at 20 % of the words each: a k-sparse probe takes every absorber for a split latent.
    assert figures["absorption_split"] == pytest.approx(0.0)


def test_a_hedged_dictionary_has_its_children_in_the_parents_and_is_made_up_for():
    toy, beta = small(), 0.2
    d, child = toy.directions, (toy.parents >= 0).nonzero().squeeze(1)
    W_enc, W_dec = d.clone(), d.clone()
    W_enc.index_add_(0, toy.parents[child], beta * d[child])
    W_dec[child] = d[child] - beta * d[toy.parents[child]]
    figures = truth(made(W_enc.T, W_dec), toy, held_out_sample(toy, 4000))
    assert figures["absorption"] == 0.0
    assert figures["encoder_child"] == pytest.approx(beta / math.sqrt(1 + CHILDREN * beta**2), rel=1e-5)
    assert figures["decoder_parent"] == pytest.approx(-beta / math.sqrt(1 + beta**2), rel=1e-5)


def test_frequent_words_weigh_more():
    """One of two children is absorbed; it comes in 90 % of the samples."""
    toy = plant("two", [(1.0, [(0.9, (0, 1)), (0.1, (0, 2))])], [-1, 0, 0], torch.eye(3))
    W_enc, W_dec = torch.eye(3), torch.eye(3)
    W_enc[0, 1], W_dec[1, 0] = -1.0, 0.9
    figures = truth(made(W_enc.T, W_dec), toy, held_out_sample(toy, 1000))
    assert figures["absorption"] == pytest.approx(0.5)
    assert figures["absorption_weighted"] == pytest.approx(0.9)


def test_k_sparse_latents_stop_where_f1_gains_less_than_the_jump():
    there = torch.tensor([True] * 4 + [False] * 4)
    fires = torch.zeros(8, 3, dtype=torch.bool)
    fires[:2, 0] = fires[2:4, 1] = True
    fires[4:, 2] = True
    assert sorted(k_sparse_latents(fires, there, SAEBENCH)) == [0, 1]


RUN = {"model": "toy", "width": 64, "l0": 3, "tokens": 26_000, "held_out_tokens": 2048, "absorption_evals": 2}


def test_topk_recovers_an_easy_dictionary():
    """32 independent features in 32 dimensions, as many latents, L0 about 2."""
    n = 32
    toy = plant("easy", [(2 / n, [(1.0, (i,))]) for i in range(n)], [-1] * n, random_directions(n, 32))
    settings, n_steps = TrainSettings(tokens=300_000, batch_tokens=256, lr=5e-3), 1172
    learner = Learner(SAESpec(arch="topk", width=n, l0=2), settings, toy.d_in, n_steps)
    stream = ToyStream(toy, 256)
    scale = estimate_scale(stream.peek(4096))
    learner.initialise(stream.peek(4096) * scale)
    for _ in range(n_steps):
        learner.step(next(stream) * scale)
    figures = truth(learner.export(scale), toy, held_out_sample(toy, 4096))
    assert figures["mcc"] > 0.9
    assert "absorption" not in figures, "there are no parents"


def test_the_command_trains_a_toy_and_shows_its_truth(tmp_path, capsys):
    flags = [part for name, value in RUN.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*flags, "--out", str(tmp_path), "--name", "run"]) == 0
    assert "truth: MCC" in capsys.readouterr().out
    final = Run(tmp_path / "run").info["saes"][0]["final"]
    assert 0 < final["toy/mcc"] <= 1 and 0 <= final["toy/absorption"] <= 1
    assert "metrics/ce_loss_score" not in final and "absorption/valid" not in final
    assert "Against the truth" in (tmp_path / "run" / "report.html").read_text()
    assert f"MCC {final['toy/mcc']:.4f}" in (tmp_path / "run" / "saes" / "topk-64-l0_3" / "README.md").read_text()
    assert main(["eval", str(tmp_path / "run" / "saes" / "topk-64-l0_3")]) == 2
    assert "against the truth" in capsys.readouterr().err


def test_an_interrupted_toy_run_resumes_to_the_unbroken_one(tmp_path):
    whole = train(**RUN, out=str(tmp_path), name="whole")
    settings = resolve(RUN | {"out": str(tmp_path), "name": "cut"})
    opened = session.open_session(settings)
    session.begin(opened)
    for x, _ in zip(opened.batches(), range(40), strict=False):
        opened.learners[0].step(x[""])
    opened.first.data.load_state_dict({"batches": {"batch": 40}, "used": 0, "left_out": 0})
    folder = tmp_path / "cut"
    folder.mkdir()
    opened.step = 40
    session.save(opened, folder)
    info = {"status": "interrupted", "settings": flat(settings), "passes": [["topk-64-l0_3"]], "saes": []}
    write_json(folder / "run.json", info)
    resumed = resume(folder)
    one, two = whole.saes["topk-64-l0_3"], resumed.saes["topk-64-l0_3"]
    assert torch.equal(one.W_enc, two.W_enc) and torch.equal(one.W_dec, two.W_dec)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--hook", "blocks.0.hook_resid_post"], "hook means nothing with the model toy"),
        (["--context", "64", "--drop", "a"], "context, drop mean nothing"),
        (["--dataset", "generated"], "letters, dictionary, trees, pairs"),
        (["--preset", "paper"], "preset means nothing"),
    ],
)
def test_what_a_toy_cannot_be_asked_is_refused_in_one_sentence(given, words, capsys):
    assert main(["--model", "toy", *given]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1


def test_without_the_eval_a_toy_run_has_no_truth_and_the_same_weights(tmp_path):
    runs = [train(**RUN, absorption=on, out=str(tmp_path), name=str(on)) for on in (True, False)]
    assert not any(name.startswith("toy/") for name in runs[1].info["saes"][0]["final"])
    one, two = (run.saes["topk-64-l0_3"] for run in runs)
    assert torch.equal(one.W_enc, two.W_enc)


def test_a_dry_run_names_the_toy(capsys):
    assert main(["--model", "toy", "--dataset", "trees", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "trees (d_in 128)" in said and "hook " not in said
