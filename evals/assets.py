"""What every evaluation of a model shares: a language model and a hierarchy come in; words, their activations at the
hook, and the ground-truth probe go out. Built once for all that decides them (`_key`), kept on disk if asked.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config import EACH, parse_contexts
from sae_train.errors import UserError, explaining
from sae_train.evals import asset_cache, prompts, vocab
from sae_train.evals.contexts import (
    Contexts,
    Progress,
    answer_accuracy,
    can_share,
    fresh_prompts,
    own_split_prompts,
    read_words,
    show_nothing,
)
from sae_train.evals.figures import auroc, f1_precision_recall
from sae_train.evals.hierarchy import Hierarchy, get_hierarchy
from sae_train.evals.presets import ASSET_FIELDS, Preset, get_preset, needed_labels
from sae_train.evals.probes import Probe, Schedule, fit_dense

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.protocols import LanguageModel

_SMALL_BATCH = 64
_WHOLE = "words are read in whole prompts: behind a shared context {} does not give the same activations"
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
    notes: list[str] = field(default_factory=list)
    """what was done otherwise than asked"""
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
    contexts: Contexts = 64,
    progress: Progress = show_nothing,
) -> Assets:
    """Collect the assets, or read them from cache_dir if the same ones are there.

    The template takes the place of the hierarchy's own prompt line. n_words takes a sample stratified by label instead
    of the whole vocabulary. contexts is how many sets of in-context examples the words of a split side share, or "each"
    for SAEBench's draw, one a word. progress hears (what is being done, how much of it is done, how much there is). A
    tokenizer that cannot write the template raises UserError.
    """
    if hook_name not in (None, lm.hook_name):
        raise UserError(f"the model is hooked at {lm.hook_name}, not at {hook_name}: load it with that hook.")
    asked = prompts.with_template(get_hierarchy(hierarchy), template)
    if n_words is not None and n_words < len(asked.labels):
        raise UserError(f"the eval needs at least {len(asked.labels)} words, one per label; got {n_words}.")
    chosen = get_preset(preset)
    with explaining(str, ValueError):
        contexts = parse_contexts(contexts)
    key = _key(lm, asked, seed, chosen, n_words, contexts)
    if cache_dir is None:
        return _collect(lm, asked, seed, chosen, n_words, key, progress)
    fingerprint = asset_cache.fingerprint_of(lm)
    for fields in asset_cache.read(Path(cache_dir), key, partial(asset_cache.is_same, lm.dtype, fingerprint)):
        if content_hash(kept := Assets(**fields)) == kept.hash:
            return kept
    assets = _collect(lm, asked, seed, chosen, n_words, key, progress)
    try:
        asset_cache.write(Path(cache_dir), key, fingerprint, assets)
    except UserError as error:  # what was computed is not lost with it
        return replace(assets, notes=[*assets.notes, str(error)])
    return assets


def is_kept(
    lm: Any, cache_dir: Path, hierarchy: str, template: str | None, seed: int, preset: str, n_words: int | None,
    contexts: Contexts,
) -> bool:  # fmt: skip
    """Whether cache_dir seems to hold the assets of a model of which only name, hook_name, tokenizer, special_ids,
    dtype, context and bos_id are known: whether its weights are the same shows once they are loaded."""
    asked = prompts.with_template(get_hierarchy(hierarchy), template)
    return asset_cache.holds(cache_dir, _key(lm, asked, seed, get_preset(preset), n_words, contexts))


def _collect(
    lm: LanguageModel,
    hierarchy: Hierarchy,
    seed: int,
    preset: Preset,
    n_words: int | None,
    key: dict,
    progress: Progress,
) -> Assets:
    start = time.perf_counter()
    seconds = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - start - sum(seconds.values()), 3)

    progress("finding words", 0, 1)
    fmt, words, few = vocab.choose(lm, hierarchy, preset)
    hierarchy, sampled_from = fmt.hierarchy, None
    if n_words is not None and n_words < len(words):
        words, sampled_from = vocab.sample(words, n_words, _generator(seed, "sample")), len(words)
    lap("vocabulary")
    is_test = vocab.split(words, preset.test_share, _generator(seed, "split"), together=hierarchy.is_listed)
    contexts, place = key["contexts"], fmt.word_position
    rows = own_split_prompts(lm, fmt, words, is_test, contexts, _generator(seed, "prompts"))
    shared = contexts != EACH and can_share(lm, place, rows)
    notes = [] if shared or contexts == EACH else [_WHOLE.format(lm.name)]
    notes += [vocab.left_out_note(lm.name, few)] if few else []
    x = read_words(lm, place, rows, shared, lambda n: progress("reading words", n, len(words)))
    lap("activations")
    labels = torch.tensor(words.labels)
    probe, figures = ground_truth(x, labels, is_test, len(hierarchy.labels), preset, seed, lm.device, progress)
    lap("probe")
    tp_rows = true_positives(probe, x, labels, is_test)
    rows = fresh_prompts(lm, fmt, words, tp_rows, contexts, _generator(seed, "true positives"))
    tp_x = read_words(lm, place, rows, shared, lambda n: progress("reading true positives", n, len(rows)))
    lap("true positives")
    accuracy = answer_accuracy(
        lm, fmt, rows, labels[tp_rows], shared, lambda n, of: progress("asking the model", n, of)
    )
    lap("model accuracy")
    settings = {**key, "n_examples": fmt.n_examples, "word_position": fmt.word_position}
    settings |= {"labels": list(hierarchy.labels), "left_out": few} if few else {}
    answers = torch.tensor(fmt.answer_ids or (), dtype=torch.long)
    assets = Assets(
        words.words, torch.tensor(words.token_ids), labels, is_test, x, tp_rows, tp_x, prompts.right_aligned(rows),
        answers, probe.weight, probe.bias, figures, settings, words.counts, accuracy, sampled_from, notes,
        seconds,
    )  # fmt: skip
    return replace(assets, hash=content_hash(assets))


def ground_truth(
    x: Tensor, labels: Tensor, is_test: Tensor, n_labels: int, preset: Preset, seed: int, device: Any = "cpu",
    progress: Progress = show_nothing,
) -> tuple[Probe, Float[Tensor, "n_labels 4"]]:  # fmt: skip
    """The linear probe of the labels, fitted on the training words, and its figures on the test words."""
    train = ~is_test
    # With few words a large batch would leave the probe near its start: some 1,500 steps at least.
    batch = min(preset.probe_batch, max(_SMALL_BATCH, int(train.sum()) // 30))
    schedule = Schedule(preset.probe_lr, preset.probe_end_lr, preset.probe_weight_decay, preset.probe_epochs, batch)
    with torch.no_grad():
        probe = fit_dense(
            x[train].to(device), labels[train].to(device), n_labels, schedule, _generator(seed, "probe"),
            partial(progress, "fitting the probe"),
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


def _key(
    lm: LanguageModel, hierarchy: Hierarchy, seed: int, preset: Preset, n_words: int | None, contexts: Contexts
) -> dict[str, Any]:
    """What decides the assets' content, apart from the model's weights."""
    return {
        "version": 4 if hierarchy.is_listed else 3,  # since 4 the forms of a word are on one side of the split
        "model": lm.name,
        "hook_name": lm.hook_name,
        "tokenizer": _tokenizer_digest(lm.tokenizer),
        "special_ids": sorted(lm.special_ids),
        "hierarchy": hierarchy.name,
        "hierarchy_digest": hierarchy.digest,
        "labels": list(hierarchy.labels),
        "template": hierarchy.template,
        "seed": seed,
        "n_words": n_words,
        "contexts": contexts,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "context": lm.context,
        "bos_id": lm.bos_id,
        "preset": {k: v for k, v in asdict(preset).items() if k in ASSET_FIELDS},
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    """Hash of the vocabulary and, where they are known (of a fast tokenizer), of the rules that cut a text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rules = getattr(tokenizer, "backend_tokenizer", None)
    # How a batch is padded and cut off is left in the rules by the last call.
    rules = {} if rules is None else json.loads(rules.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps([vocabulary, tokenizer.unk_token_id, rules]).encode()).hexdigest()[:16]


def content_hash(assets: Assets) -> str:
    """Hash of the settings and of every number that an evaluation reads."""
    h = hashlib.sha256(json.dumps([assets.settings, assets.words], sort_keys=True).encode())
    for name in _TENSORS:
        h.update(getattr(assets, name).contiguous().cpu().numpy())
    return h.hexdigest()[:16]


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for every draw, so that one more draw somewhere shifts no other."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose}/{seed}".encode()))
