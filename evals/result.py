"""The result of one evaluation: tables by letter and by word, the means and intervals read off them, and SAEBench's
JSON.
"""

from __future__ import annotations

import functools
import time
import uuid
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sae_train.errors import UserError
from sae_train.evals.intervals import bootstrap
from sae_train.evals.k_sparse import mark
from sae_train.evals.presets import Preset, get_preset
from sae_train.evals.prompts import query_of

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool

_WORD_COLUMN = {
    "mean_fraction": "fraction", "mean_full": "full", "mean_full_family": "full_family",
    "mean_fraction_family": "fraction_family", "mean_recall_main": "main_act",
}  # fmt: skip
_BESIDE = (
    "mean_f1", "mean_n_split", "mean_recall_main", "mean_precision_main", "mean_fraction_family", "mean_full_family",
    "mean_lost_carried", "mean_lost_below", "mean_lost_nobody",
)  # fmt: skip


@dataclass(frozen=True)
class AbsorptionResult:
    """Absorption of one SAE. If not valid, reason says why in a sentence and the means are NaN; by_letter and words
    hold whatever could be measured. Means and standard deviations (n − 1) are over the letters that count; "letter"
    stands for any label of the hierarchy that was asked for."""

    preset: str
    seed: int
    asset_hash: str
    valid: bool
    reason: str
    by_letter: pd.DataFrame
    words: pd.DataFrame
    l0: float = float("nan")
    """active latents per test word; on the corpus it differs"""
    ev: float = float("nan")
    """explained variance on test words"""
    details: dict[str, Any] = field(default_factory=dict)
    """settings and sizes worth keeping: steps and batch of the ranking, firing latents, asset settings, sampling"""
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    thresholds: Preset | None = None

    @property
    def n_letters(self) -> int:
        return int(self.by_letter["counts"].sum()) if len(self.by_letter) else 0

    mean_fraction = property(lambda self: self._mean("fraction"))
    mean_full = property(lambda self: self._mean("full"))
    mean_f1 = property(lambda self: self._mean("f1_k1"))
    mean_n_split = property(lambda self: self._mean("n_split"))
    mean_fraction_family = property(lambda self: self._mean("fraction_family"))
    mean_full_family = property(lambda self: self._mean("full_family"))
    mean_lost_carried = property(lambda self: self._mean("lost_carried"))
    mean_lost_below = property(lambda self: self._mean("lost_below"))
    mean_lost_nobody = property(lambda self: self._mean("lost_nobody"))
    mean_recall_main = property(lambda self: self._mean("recall_main"))
    mean_precision_main = property(lambda self: self._mean("precision_main"))
    std_fraction = property(lambda self: self._std("fraction"))
    std_full = property(lambda self: self._std("full"))
    std_n_split = property(lambda self: self._std("n_split"))

    def is_main(self, d_sae: int) -> Bool[torch.Tensor, "labels d_sae"]:
        """Which latents are main latents of which label."""
        return mark(list(self.by_letter["main_latents"]), d_sae)

    def figures(self) -> dict[str, Any]:
        """The evaluation in numbers: validity with the reason, means with intervals, what stands beside the score."""
        out: dict[str, Any] = {"valid": self.valid, "n_letters": self.n_letters}
        if not self.valid:
            return out | {"reason": self.reason}
        for name in ("mean_fraction", "mean_full"):
            low, high = self.interval(name)
            out |= {name: getattr(self, name), f"{name}_low": low, f"{name}_high": high}
        return out | {name: getattr(self, name) for name in _BESIDE} | {"l0_words": self.l0}

    def metrics(self) -> dict[str, Any]:
        """The same under the names of metrics.jsonl."""
        return {f"absorption/{name}": value for name, value in self.figures().items()}

    def table(self, sae: str, step: int, with_words: bool) -> pd.DataFrame:
        """Letters (and words) as rows of absorption.parquet."""
        import pandas as pd

        parts = [self.by_letter.assign(level="letter")]
        if with_words:
            parts.append(self.words.assign(level="word"))
        rows = pd.concat([part for part in parts if len(part)], ignore_index=True) if any(map(len, parts)) else parts[0]
        return rows.assign(
            sae=sae, step=step, preset=self.preset, eval_seed=self.seed, asset_hash=self.asset_hash, valid=self.valid,
            reason=self.reason,
        )  # fmt: skip

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval over words, resampled within each letter, of mean_fraction, mean_full, mean_recall_main
        or a mean over families: what other words of these letters might give, with this SAE and these letters."""
        if name not in _WORD_COLUMN:
            raise UserError(f"there is no interval for {name!r}; there are {', '.join(_WORD_COLUMN)}.")
        if not self.valid:
            return float("nan"), float("nan")
        values = self._resampled_means[:, list(_WORD_COLUMN).index(name)]
        tail = (1 - level) / 2
        low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
        return low, high

    def to_saebench_json(self, baselines: dict[str, Any] | None = None, **eval_fields: Any) -> dict[str, Any]:
        """The result in SAEBench's output layout; eval_fields fill its other top-level entries, NaN becomes null.

        What SAEBench has no place for stands in eval_result_unstructured. Two kinds of results its reader refuses, as
        it knows none such: one that is not valid (its means are null), and one of another hierarchy, whose eval_type_id
        and labels say so.
        """
        counting = self.by_letter[self.by_letter["counts"]] if len(self.by_letter) else self.by_letter
        out = {
            "eval_type_id": "absorption_" + self.details["assets"]["hierarchy"].replace("-", "_"),
            "eval_config": self._saebench_config(),
            "eval_id": str(uuid.uuid4()),
            "datetime_epoch_millis": int(time.time() * 1000),
            "eval_result_metrics": {"mean": self._saebench_means()},
            "eval_result_details": [_saebench_letter(row) for row in counting.to_dict("records")],
            "sae_bench_commit_hash": "",
            "sae_lens_id": "",
            "sae_lens_release_id": "",
            "sae_lens_version": "",
            "sae_cfg_dict": {},
            "eval_result_unstructured": {
                "preset": self.preset, "seed": self.seed, "asset_hash": self.asset_hash, "valid": self.valid,
                "reason": self.reason, **{n: getattr(self, n) for n in (*_BESIDE, "l0", "ev")},
                "intervals": {n: list(self.interval(n)) for n in _WORD_COLUMN},
                "baselines": baselines or {}, "thresholds": asdict(self.thresholds or get_preset(self.preset)),
                **self.details,
            },
            **eval_fields,
        }  # fmt: skip
        return _nan_to_none(out)

    def _saebench_config(self) -> dict[str, Any]:
        preset = self.thresholds or get_preset(self.preset)
        assets = self.details.get("assets", {})
        return {
            "model_name": assets.get("model", ""),
            "random_seed": self.seed,
            "f1_jump_threshold": preset.f1_jump,
            "max_k_value": preset.max_k,
            "prompt_template": query_of(assets.get("template", "")),
            "prompt_token_pos": assets.get("word_position", 0),
            "llm_batch_size": 1,
            "llm_dtype": assets.get("dtype", "float32"),
            "k_sparse_probe_l1_decay": preset.l1_coefficient,
            "k_sparse_probe_batch_size": preset.l1_max_batch,
            "k_sparse_probe_num_epochs": preset.l1_epochs,
            "min_GT_probe_f1": preset.min_probe_f1,
            "min_feats_for_eval": preset.min_letters,
        }

    def _saebench_means(self) -> dict[str, float]:
        return {
            "mean_absorption_fraction_score": self.mean_fraction,
            "mean_full_absorption_score": self.mean_full,
            "mean_num_split_features": self.mean_n_split,
            "std_dev_absorption_fraction_score": self.std_fraction,
            "std_dev_full_absorption_score": self.std_full,
            "std_dev_num_split_features": self.std_n_split,
        }

    def _select(self, column: str) -> pd.Series:
        return self.by_letter.loc[self.by_letter["counts"], column].astype(float)

    def _mean(self, column: str) -> float:
        return float(self._select(column).mean()) if self.valid else float("nan")

    def _std(self, column: str) -> float:
        return float(self._select(column).std(ddof=1)) if self.valid else float("nan")

    @functools.cached_property
    def _resampled_means(self) -> torch.Tensor:
        """The means over letters in each of n_bootstrap resamples, a column for each name that has an interval."""
        preset = self.thresholds or get_preset(self.preset)
        counting = self.by_letter.loc[self.by_letter["counts"], "letter"].tolist()
        number = {letter: i for i, letter in enumerate(counting)}
        words = self.words[self.words["letter"].isin(number)]
        values = torch.tensor(words[list(_WORD_COLUMN.values())].to_numpy(dtype=float))
        recalled = list(_WORD_COLUMN).index("mean_recall_main")
        values[:, recalled] = (values[:, recalled] > 0).double()
        groups = torch.tensor([number[letter] for letter in words["letter"]])
        return bootstrap(values, groups, len(number), preset.n_bootstrap, self.seed).mean(1)


def _saebench_letter(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "first_letter": row["letter"].lower(),
        "mean_absorption_fraction": row["fraction"],
        "full_absorption_rate": row["full"],
        "num_full_absorption": int(row["n_full"]),
        "num_probe_true_positives": int(row["n_tp"]),
        "num_split_features": int(row["n_split"]),
    }


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nan_to_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(v) for v in value]
    return None if isinstance(value, float) and value != value else value
