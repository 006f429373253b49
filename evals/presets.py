"""Every threshold of the absorption eval, by the preset's name.

- `saebench` follows SAEBench 0.6.0 (arXiv 2503.09532), with the ranking of latents solved instead of stopped early.
- `saebench-adam` stops the ranking where SAEBench does; it depends on a seed.
- `saebench-0.3` has the older fraction score, in which the numbers published before SAEBench 0.4.1 stand.
- `paper` is the causal rate of arXiv 2409.14507 by integrated gradients, with all letters in the mean.
- `paper-exact` puts the exact effect of ablating each latent in the gradients' place.
- `paper-released` counts as the paper's code does: letters without candidates are left out, the lower-case letter is
  taken for the right answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sae_train import config
from sae_train.config.units import parse_preset
from sae_train.errors import explaining


@dataclass(frozen=True)
class Preset:
    """One way of measuring absorption; two results compare only if their presets are equal."""

    name: str

    # prompts
    n_examples: int = 10
    """in-context examples before the word, fewer where the model's context is short"""
    leading_newline: bool = True

    # ground-truth probe
    test_share: float = 0.2
    probe_lr: float = 1e-2
    probe_end_lr: float = 1e-5
    probe_weight_decay: float = 1e-4
    probe_epochs: int = 50
    probe_batch: int = 64
    min_probe_f1: float = 0.6
    """a letter counts above this F1 of its probe"""
    min_letters: int = 20
    """fewer counting letters make the result invalid"""

    # ranking of latents, k-sparse probes, feature splitting
    ranking: str = "optimum"
    """`optimum`: the L1 probe solved; `adam`: its iterate after SAEBench's schedule"""
    l1_coefficient: float = 0.01
    l1_tolerance: float = 1e-3
    """of the optimum: largest violation of an optimality condition, as a share of l1_coefficient"""
    l1_lr: float = 1e-2
    l1_end_lr: float = 1e-5
    l1_weight_decay: float = 1e-6
    l1_epochs: int = 50
    l1_max_batch: int = 4096
    l1_min_steps: int = 1500
    """with few words, 50 epochs of one batch each leave the ranking at its start"""
    max_k: int = 10
    f1_jump: float = 0.03

    # scoring by projections
    fraction: str = "top3"
    """`top3`: projections of the three largest absorbers; `total`: all projections (SAEBench before 0.4.1)"""
    n_absorbers: int = 3
    absorber_cos: float = 0.1
    absorbed_share: float = 0.4
    """share of the word's projection that absorbers must carry"""
    full_cos: float = 0.025
    silent_below: float = 1e-8
    """a main latent under this activation is silent"""

    # the causal rate, which takes the place of the full score
    attribution: str | None = None
    """None: projections decide; `gradients`: integrated gradients; `ablation`: exact ablation of each latent"""
    gradient_steps: int = 6
    """latents and error are scaled by 1 − 0/n, 1 − 1/n, …, 1 − (n − 1)/n"""
    min_margin: float = 1.0
    """logits by which the first latent's effect must exceed the second's"""
    max_candidates: int = 200
    """words looked at per letter; the rate is scaled by the share"""
    n_ablated: int = 16
    """latents ablated per word, those of the largest vectors first"""
    letters_without_candidates: str = "zero"
    """`zero`: their rate is 0; `drop`: they do not count"""
    lower_case_answer: bool = False
    """take the lower-case letter's token for the right answer"""

    # beside the score: latents that share a letter between them are splitting, not absorption
    family_precision: float = 0.5
    """a latent is of a letter's family if at least this share of the training words it fires on have the letter,"""
    family_recall: float = 0.05
    """and it fires on at least this share of the letter's training words,"""
    family_words: int = 3
    """and on at least so many of them"""

    # intervals
    n_bootstrap: int = 1000


SAEBENCH = Preset("saebench")
PAPER = Preset("paper", leading_newline=False, probe_batch=4096, max_k=15, attribution="gradients")
PRESETS = {
    p.name: p
    for p in (
        SAEBENCH,
        replace(SAEBENCH, name="saebench-adam", ranking="adam"),
        replace(SAEBENCH, name="saebench-0.3", fraction="total"),
        PAPER,
        replace(PAPER, name="paper-exact", attribution="ablation"),
        replace(PAPER, name="paper-released", letters_without_candidates="drop", lower_case_answer=True),
    )
}
assert tuple(PRESETS) == config.EVAL_PRESETS, "the settings tree knows the presets by other names"


# What a preset decides about the assets; presets that only score otherwise share them.
ASSET_FIELDS = (
    "n_examples", "leading_newline", "test_share", "min_probe_f1", "probe_lr", "probe_end_lr", "probe_weight_decay",
    "probe_epochs", "probe_batch",
)  # fmt: skip


def needed_labels(preset: Preset, hierarchy: str, n_labels: int) -> int:
    """Labels that must count: the preset's number of letters, or the same share of another hierarchy's labels."""
    return preset.min_letters if hierarchy == "first-letter" else math.ceil(preset.min_letters * n_labels / 26)


def get_preset(preset: str | Preset) -> Preset:
    """Look a preset up by name; an unknown name raises UserError with the names that exist."""
    if isinstance(preset, Preset):
        return preset
    with explaining(str, ValueError):
        return PRESETS[parse_preset(preset)]
