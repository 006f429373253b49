"""What is written when a trained SAE leaves memory: its weights, how often its latents fire and their pages, its
evaluation in SAEBench's layout with its baselines.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.data.harvest import dropped, is_seen
from sae_train.data.outliers import is_kept
from sae_train.evals import baselines, latent_pages
from sae_train.evals.latents import encode
from sae_train.files import write_json, write_lines
from sae_train.sae.files import save_sae, save_sparsity

if TYPE_CHECKING:
    from torch import Tensor

    from sae_train.runs.callbacks import Absorption
    from sae_train.runs.stream import Stream
    from sae_train.sae.model import SAE
    from sae_train.training.learner import Learner

SAMPLE_TOKENS = 16_384  # of held-out text in which latents are looked up


class Finisher:
    """Writes the SAEs of one hook into the run's folder."""

    def __init__(self, stream: Stream, folder: Path):
        self.stream, self.folder = stream, folder

    def write(self, learner: Learner, final: dict[str, Any], absorption: Absorption | None) -> dict[str, Any]:
        """Write a finished SAE with where it came from; return its baselines, of which it has none without the eval."""
        stream, language = self.stream, self.stream.language
        sae = stream.export(learner)
        sae.cfg = replace(
            sae.cfg,
            hook_name=stream.source.hook_name,
            model_name=stream.source.name,
            context_size=language.context if language else None,
            prepend_bos=language is None or language.lm.bos_id is not None,
            dataset_path=stream.settings.dataset,
            l0=final.get("metrics/l0"),
        )
        if absorption is not None:
            self._describe_latents(learner, sae, absorption)
        own = self.folder / "saes" / learner.name
        save_sae(sae, own)
        save_sparsity(encode(sae, stream.held_out).frequency(), own)
        if absorption is None or not final.get("absorption/valid"):
            return {}
        result, progress = absorption.result_of(learner), absorption.progress_of(learner)
        beside = baselines.all_scores(sae, stream.held_out, absorption.assets, result, absorption.lm, progress)
        write_json(own / "absorption.json", result.to_saebench_json(beside, sae_cfg_dict=asdict(sae.cfg)))
        return beside

    def _describe_latents(self, learner: Learner, sae: SAE, absorption: Absorption) -> None:
        """Look up what the main latents and the absorbers do on held-out text."""
        roles = latent_pages.choose(absorption.result_of(learner))
        if roles:
            records = latent_pages.describe(sae, roles, self._sample, absorption.lm)
            write_lines(self.folder / "latents" / f"{learner.name}.jsonl", records)

    @functools.cached_property
    def _sample(self) -> latent_pages.Sample:
        """Held-out text with its activations, run through the language model once."""
        language = self.stream.language
        rows = language.rows[: max(1, SAMPLE_TOKENS // language.context)]
        drop, limit = dropped(language.lm, language.drop_ids), self.stream.limit

        def seen(tokens: Tensor, x: Tensor) -> Tensor:
            return is_seen(tokens, drop, language.skip_first) & is_kept(x, limit)

        return latent_pages.sample(language.lm, rows, seen)
