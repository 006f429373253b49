"""What every evaluation of a model shares: a language model and a hierarchy come in; words, their activations at the
hook, and the ground-truth probe go out. Built once per (model, hook, hierarchy, template, seed, preset), kept on disk
if asked.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError
from sae_train.evals import asset_cache, prompts, vocab
from sae_train.evals.figures import auroc, f1_precision_recall
from sae_train.evals.hierarchy import Hierarchy, get_hierarchy
from sae_train.evals.presets import ASSET_FIELDS, Preset, get_preset, needed_labels
from sae_train.evals.probes import Probe, Schedule, fit_dense
from sae_train.evals.vocab import Vocabulary

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.protocols import LanguageModel

_BATCH_TOKENS = 8192
_N_ACCURACY = 256  # prompts for the model's own accuracy, a sanity figure that takes whole forward passes
_LOGIT_ELEMENTS = 2**26  # of one (batch, position, vocabulary) block: 256 MB in float32
_SMALL_BATCH = 64
_TENSORS = (
    "token_ids", "labels", "is_test", "x", "tp_rows", "tp_x", "tp_tokens", "answer_ids", "probe_weight", "probe_bias",
    "probe_figures",
)  # fmt: skip


@dataclass(frozen=True)
class Assets:
    """Words with their activations x; the rows tp_rows are the test words that the probe gets right, and tp_x their
    activations under fresh prompts. probe_figures columns: F1, precision, recall, AUROC on test words."""

    words: list[str]
    token_ids: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    is_test: Bool[Tensor, " n"]
    x: Float[Tensor, "n d_in"]
    tp_rows: Int[Tensor, " t"]
    tp_x: Float[Tensor, "t d_in"]
    tp_tokens: Int[Tensor, "t position"]
    """those prompts, right-aligned; shorter ones begin with −1"""
    answer_ids: Int[Tensor, " n_labels"]
    """per label the token that begins the right answer; empty if the template asks for none"""
    probe_weight: Float[Tensor, "d_in n_labels"]
    probe_bias: Float[Tensor, " n_labels"]
    probe_figures: Float[Tensor, "n_labels 4"]
    settings: dict[str, Any]
    """everything they depend on: model, hook, hierarchy, template, seed, preset, number of examples, word position"""
    counts: dict[str, int]
    """what became of the tokenizer's entries"""
    model_accuracy: float | None = None
    """how often the model itself names a true positive's first letter; None if the template asks for none"""
    sampled_from: int | None = None
    """number of words before sampling; None if all were taken"""
    seconds: dict[str, float] = field(default_factory=dict)
    hash: str = ""

    @property
    def probe(self) -> Probe:
        probe = Probe(*self.probe_weight.shape, self.probe_weight.device)
        probe.weight, probe.bias = self.probe_weight, self.probe_bias
        return probe

    @property
    def tp_labels(self) -> Int[Tensor, " t"]:
        return self.labels[self.tp_rows]

    @property
    def label_names(self) -> list[str]:
        return self.settings["labels"]

    @property
    def letters_that_count(self) -> Bool[Tensor, " n_labels"]:
        return self.probe_figures[:, 0] > self.settings["preset"]["min_probe_f1"]

    def n_needed(self, preset: Preset) -> int:
        """How many labels must count."""
        return needed_labels(preset, self.settings["hierarchy"], len(self.labels.unique()))

    def to(self, device: torch.device | str) -> Assets:
        """The same assets on a device, so that evaluations there copy nothing."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


def build(
    lm: LanguageModel,
    hook_name: str | None = None,
    *,
    hierarchy: str | Path | Hierarchy = "first-letter",
    template: str | None = None,
    seed: int = 0,
    preset: str | Preset = "saebench",
    cache_dir: str | Path | None = None,
    n_words: int | None = None,
) -> Assets:
    """Collect the assets, or read them from cache_dir if the same ones are there.

    The template takes the place of the hierarchy's own prompt line. n_words takes a sample stratified by label instead
    of the whole vocabulary. A tokenizer that cannot write the template raises UserError.
    """
    if hook_name not in (None, lm.hook_name):
        raise UserError(f"the model is hooked at {lm.hook_name}, not at {hook_name}: load it with that hook.")
    asked = prompts.with_template(get_hierarchy(hierarchy), template)
    if n_words is not None and n_words < len(asked.labels):
        raise UserError(f"the eval needs at least {len(asked.labels)} words, one per label; got {n_words}.")
    chosen = get_preset(preset)
    key = _key(lm, asked, seed, chosen, n_words)
    fingerprint = _fingerprint(lm)
    if cache_dir is not None and (cached := asset_cache.read(Path(cache_dir), key, fingerprint)):
        return Assets(**cached)
    assets = _collect(lm, asked, seed, chosen, n_words, key)
    if cache_dir is not None:
        asset_cache.write(Path(cache_dir), key, fingerprint, assets)
    return assets


def _collect(
    lm: LanguageModel, hierarchy: Hierarchy, seed: int, preset: Preset, n_words: int | None, key: dict
) -> Assets:
    start = time.perf_counter()
    seconds = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - start - sum(seconds.values()), 3)

    fmt, words, sampled_from = _vocabulary(lm, hierarchy, seed, preset, n_words)
    lap("vocabulary")
    is_test = vocab.split(words, preset.test_share, _generator(seed, "split"))
    x = _activations(lm, fmt, _own_split_prompts(lm, fmt, words, is_test, seed))
    lap("activations")
    labels = torch.tensor(words.labels)
    probe, figures = ground_truth(x, labels, is_test, len(hierarchy.labels), preset, seed, lm.device)
    lap("probe")
    tp_rows = true_positives(probe, x, labels, is_test)
    rows = _fresh_prompts(lm, fmt, words, tp_rows, seed)
    tp_x = _activations(lm, fmt, rows)
    lap("true positives")
    every = max(1, len(rows) // _N_ACCURACY)
    accuracy = _model_accuracy(lm, fmt, rows[::every], labels[tp_rows][::every])
    lap("model accuracy")
    settings = {**key, "n_examples": fmt.n_examples, "word_position": fmt.word_position}
    answers = torch.tensor(fmt.answer_ids or (), dtype=torch.long)
    assets = Assets(
        words.words, torch.tensor(words.token_ids), labels, is_test, x, tp_rows, tp_x, prompts.right_aligned(rows),
        answers, probe.weight, probe.bias, figures, settings, words.counts, accuracy, sampled_from, seconds,
    )  # fmt: skip
    return replace(assets, hash=content_hash(assets))


def _vocabulary(
    lm: LanguageModel, hierarchy: Hierarchy, seed: int, preset: Preset, n_words: int | None
) -> tuple[prompts.PromptFormat, Vocabulary, int | None]:
    found, dropped = vocab.entries(lm.tokenizer, lm.special_ids, hierarchy)
    fmt = prompts.fit_format(lm, hierarchy, found, preset)
    words = vocab.keep_single_tokens(found, dropped, lambda v: prompts.single_token_words(lm, fmt, v))
    if len(words) < len(hierarchy.labels):
        raise UserError(
            f"only {len(words)} words are one token of {lm.name} in the template {hierarchy.template!r}; the eval "
            f"needs at least {len(hierarchy.labels)}."
        )
    if n_words is None or n_words >= len(words):
        return fmt, words, None
    return fmt, vocab.sample(words, n_words, _generator(seed, "sample")), len(words)


def _own_split_prompts(lm: LanguageModel, fmt: Any, words: Vocabulary, is_test: Tensor, seed: int) -> list[list[int]]:
    """A prompt per word, its examples drawn from the word's own side of the split."""
    g = _generator(seed, "prompts")
    examples: list[list[str]] = [[] for _ in words.words]
    for side in (~is_test, is_test):
        rows = side.nonzero().squeeze(1)
        drawn = rows[prompts.draw_examples(torch.arange(len(rows)), len(rows), fmt.n_examples, g)]
        for row, others in zip(rows.tolist(), drawn.tolist(), strict=True):
            examples[row] = [words.words[o] for o in others]
    return _checked(lm, fmt, words, prompts.token_rows(lm, fmt, words.words, examples))


def _fresh_prompts(lm: LanguageModel, fmt: Any, words: Vocabulary, tp_rows: Tensor, seed: int) -> list[list[int]]:
    """New prompts for the true positives, with examples from the whole vocabulary."""
    drawn = prompts.draw_examples(tp_rows, len(words), fmt.n_examples, _generator(seed, "true positives"))
    examples = [[words.words[o] for o in others] for others in drawn.tolist()]
    chosen = words.subset(tp_rows.tolist())
    return _checked(lm, fmt, chosen, prompts.token_rows(lm, fmt, chosen.words, examples))


def _checked(lm: LanguageModel, fmt: Any, words: Vocabulary, rows: list[list[int]]) -> list[list[int]]:
    for ids, token_id, word in zip(rows, words.token_ids, words.words, strict=True):
        if ids[fmt.word_position] != token_id:
            raise UserError(
                f"the tokenizer of {lm.name} does not keep {word!r} as one token at position {fmt.word_position} of "
                f"the template {fmt.hierarchy.template!r} once examples stand before it; give another template."
            )
        if len(ids) > lm.context:
            raise UserError(f"a prompt of {len(ids)} tokens does not fit the {lm.context} positions of {lm.name}.")
    return rows


@torch.no_grad()
def _activations(lm: LanguageModel, fmt: Any, rows: list[list[int]]) -> Float[Tensor, "n d_in"]:
    out = torch.zeros(len(rows), lm.d_in)
    for numbers, tokens in prompts.batches(rows, _BATCH_TOKENS):
        out[numbers] = lm.activations(tokens.to(lm.device))[:, fmt.word_position].float().cpu()
    return out


@torch.no_grad()
def _model_accuracy(lm: LanguageModel, fmt: Any, rows: list[list[int]], labels: Tensor) -> float | None:
    if fmt.answer_ids is None or not rows:
        return None
    right, answers = 0, torch.tensor(fmt.answer_ids)[labels]
    for numbers, tokens in prompts.batches(rows, min(_BATCH_TOKENS, _LOGIT_ELEMENTS // len(lm.tokenizer))):
        said = lm.logits(tokens.to(lm.device))[:, -1].argmax(-1).cpu()
        right += int((said == answers[numbers]).sum())
    return right / len(rows)


def ground_truth(
    x: Tensor, labels: Tensor, is_test: Tensor, n_labels: int, preset: Preset, seed: int, device: Any = "cpu"
) -> tuple[Probe, Float[Tensor, "n_labels 4"]]:
    """The linear probe of the labels, fitted on the training words, and its figures on the test words."""
    train = ~is_test
    # With few words a large batch would leave the probe near its start: some 1,500 steps at least.
    batch = min(preset.probe_batch, max(_SMALL_BATCH, int(train.sum()) // 30))
    schedule = Schedule(preset.probe_lr, preset.probe_end_lr, preset.probe_weight_decay, preset.probe_epochs, batch)
    with torch.no_grad():
        probe = fit_dense(
            x[train].to(device), labels[train].to(device), n_labels, schedule, _generator(seed, "probe")
        )  # fmt: skip
        probe.weight, probe.bias = probe.weight.cpu(), probe.bias.cpu()
        logits = probe.logits(x[is_test])
        truth = labels[is_test][:, None] == torch.arange(n_labels)
        figures = [*f1_precision_recall(logits > 0, truth), auroc(logits, truth)]
    return probe, torch.stack([f.double() for f in figures], 1)


def true_positives(probe: Probe, x: Tensor, labels: Tensor, is_test: Tensor) -> Int[Tensor, " t"]:
    """Test words whose own label's logit is positive."""
    right = probe.logits(x).gather(1, labels[:, None]).squeeze(1) > 0
    return (is_test & right).nonzero().squeeze(1)


def _key(lm: LanguageModel, hierarchy: Hierarchy, seed: int, preset: Preset, n_words: int | None) -> dict[str, Any]:
    """What decides the assets' content, apart from the model's weights."""
    vocabulary = json.dumps(sorted(lm.tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return {
        "version": 2,
        "model": lm.name,
        "hook_name": lm.hook_name,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "hierarchy": hierarchy.name,
        "hierarchy_digest": hierarchy.digest,
        "labels": list(hierarchy.labels),
        "template": hierarchy.template,
        "seed": seed,
        "n_words": n_words,
        "context": lm.context,
        "bos_id": lm.bos_id,
        "preset": {k: v for k, v in asdict(preset).items() if k in ASSET_FIELDS},
    }


@torch.no_grad()
def _fingerprint(lm: LanguageModel) -> Float[Tensor, "16 d_in"]:
    """Activations of 16 entries spread over the vocabulary: they tell when a model's weights changed under its name."""
    tokens = (torch.arange(16) * len(lm.tokenizer) // 16)[None]
    return lm.activations(tokens.to(lm.device))[0].float().cpu()


def content_hash(assets: Assets) -> str:
    """Hash of the settings and of every number that an evaluation reads."""
    h = hashlib.sha256(json.dumps([assets.settings, assets.words], sort_keys=True).encode())
    for name in _TENSORS:
        h.update(getattr(assets, name).contiguous().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for every draw, so that one more draw somewhere shifts no other."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose}/{seed}".encode()))
