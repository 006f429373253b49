"""Every threshold of the absorption eval, by name: a preset name comes in, a frozen set of numbers goes out.

`saebench` follows SAEBench 0.6.0 (arXiv 2503.09532); `saebench-0.3` differs from it only in the fraction score, in
which the numbers published before SAEBench 0.4.1 stand. The method itself is arXiv 2409.14507.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from sae_train.errors import UserError


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
    l1_coefficient: float = 0.01
    l1_lr: float = 1e-2
    l1_end_lr: float = 1e-5
    l1_weight_decay: float = 1e-6
    l1_epochs: int = 50
    l1_max_batch: int = 4096
    l1_min_steps: int = 1500
    """with few words, 50 epochs of one batch each leave the ranking at its start"""
    max_k: int = 10
    f1_jump: float = 0.03

    # scoring
    fraction: str = "top3"
    """`top3`: projections of the three largest absorbers; `total`: all projections (SAEBench before 0.4.1)"""
    n_absorbers: int = 3
    absorber_cos: float = 0.1
    absorbed_share: float = 0.4
    """share of the word's projection that absorbers must carry"""
    full_cos: float = 0.025
    silent_below: float = 1e-8
    """a main latent under this activation is silent"""

    # intervals
    n_bootstrap: int = 1000


SAEBENCH = Preset("saebench")
PRESETS = {p.name: p for p in (SAEBENCH, replace(SAEBENCH, name="saebench-0.3", fraction="total"))}


def get_preset(preset: str | Preset) -> Preset:
    """Look a preset up by name; an unknown name raises UserError with the names that exist."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise UserError(f"unknown absorption preset '{preset}'{hint}; the presets are {', '.join(PRESETS)}")
    return PRESETS[preset]
