"""First-letter absorption of one SAE: an SAE and a model's eval assets come in, an AbsorptionResult goes out.

The SAE is anything with encode(x) -> (n, d_sae) and W_dec (d_sae, d_in); encode_sparse, decode and W_enc are used where
they exist. It is only read: no gradient mode, weight, dtype or global random state changes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evals import k_sparse
from sae_train.evals.figures import auroc, f1_precision_recall
from sae_train.evals.latents import Latents, encode
from sae_train.evals.presets import Preset, get_preset
from sae_train.evals.probes import N_LETTERS, rank_latents, ranking_schedule
from sae_train.evals.result import AbsorptionResult
from sae_train.evals.scoring import WordScores, score_entries, score_projections, score_words, unit
from sae_train.evals.vocab import LETTERS

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sae_train.evals.assets import Assets

__all__ = ["AbsorptionResult", "evaluate", "score_projections", "score_words"]

_TOP = ("top_latent", "top_f1", "top_precision", "top_recall", "top_auroc")
_WORD_COLUMNS = (
    "letter", "word", "token_id", "fraction", "full", "main_act", "a", "main_latents", "absorbers", "absorber_cos",
    "absorber_proj",
)  # fmt: skip


@torch.no_grad()
def evaluate(sae: Any, assets: Assets, preset: str | Preset = "saebench", seed: int = 0) -> AbsorptionResult:
    """Evaluate one SAE; whatever is wrong with it or with the assets ends in valid = False and a reason."""
    return _Evaluation(sae, assets, get_preset(preset), seed).run()


@dataclass(frozen=True)
class _Encoded:
    """Latents of the three groups of words, in the order of the assets."""

    train: Latents
    test: Latents
    tp: Latents


class _Evaluation:
    """The steps of one evaluation, in order, with the time each one took."""

    def __init__(self, sae: Any, assets: Assets, preset: Preset, seed: int):
        self.sae, self.assets, self.preset, self.seed = sae, assets, preset, seed
        self.device, self.dtype = sae.W_dec.device, sae.W_dec.dtype
        self.labels = assets.labels.to(self.device)
        self.is_test = assets.is_test.to(self.device)
        self.W_dec = sae.W_dec.detach().float()
        self.directions = unit(assets.probe_weight.T.float()).to(self.device)
        self.timings: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def run(self) -> AbsorptionResult:
        latents = self.encode()
        self.lap("encode")
        if broken := self.broken(latents):
            return self.invalid(broken)
        ranking = self.rank(latents.train)
        self.lap("rank latents")
        chosen = self.probe_latents(latents, ranking)
        self.lap("k-sparse probes")
        scores, cos, a, columns = self.score(latents.tp, chosen)
        words = self.word_table(scores, cos, a, columns, chosen)
        letters = self.letter_table(words, chosen, latents.test)
        self.lap("score")
        return self.result(letters, words, latents)

    def encode(self) -> _Encoded:
        x, tp_x = (t.to(self.device, self.dtype) for t in (self.assets.x, self.assets.tp_x))
        return _Encoded(encode(self.sae, x[~self.is_test]), encode(self.sae, x[self.is_test]), encode(self.sae, tp_x))

    def broken(self, latents: _Encoded) -> str:
        parts = (latents.train, latents.test, latents.tp)
        if not all(bool(p.values.isfinite().all()) for p in parts):
            return "the SAE's latents are not finite"
        if not bool(self.W_dec.isfinite().all()):
            return "the SAE's decoder is not finite"
        if not len(latents.train.values):
            return "no latent of the SAE fires on any training word"
        return ""

    def rank(self, train: Latents) -> Tensor:
        g = torch.Generator().manual_seed(self.seed)
        schedule = self.schedule(train.n_rows)
        return rank_latents(train, self.labels[~self.is_test], schedule, g, self.preset.max_k)

    def probe_latents(self, latents: _Encoded, ranking: Tensor) -> k_sparse.KSparse:
        y_train, y_test = self.truth(~self.is_test), self.truth(self.is_test)
        return k_sparse.fit(latents.train, y_train, latents.test, y_test, ranking, self.preset.f1_jump)

    def schedule(self, n_rows: int) -> Any:
        p = self.preset
        return ranking_schedule(
            n_rows, epochs=p.l1_epochs, max_batch=p.l1_max_batch, min_steps=p.l1_min_steps, lr=p.l1_lr,
            end_lr=p.l1_end_lr, weight_decay=p.l1_weight_decay, l1=p.l1_coefficient,
        )  # fmt: skip

    def truth(self, rows: Tensor) -> Tensor:
        return self.labels[rows][:, None] == torch.arange(N_LETTERS, device=self.device)

    def score(self, tp: Latents, chosen: k_sparse.KSparse) -> tuple[WordScores, Tensor, Tensor, Tensor]:
        letter = self.assets.tp_labels.to(self.device)
        acts, columns = tp.padded()
        cos = (self.directions @ unit(self.W_dec).T)[letter[:, None], columns]
        proj = acts * cos * self.W_dec.norm(dim=1)[columns]
        is_main = torch.zeros(N_LETTERS, tp.d_sae, dtype=torch.bool, device=self.device)
        for c in range(N_LETTERS):
            is_main[c, chosen.main_latents(c)] = True
        a = (self.assets.tp_x.to(self.device).float() * self.directions[letter]).sum(1)
        scores = score_entries(acts, proj, cos, is_main[letter[:, None], columns], a, self.preset)
        return scores, cos, a, columns

    def word_table(
        self, s: WordScores, cos: Tensor, a: Tensor, columns: Tensor, chosen: k_sparse.KSparse
    ) -> pd.DataFrame:
        import pandas as pd

        entry, proj = s.absorber_entry, s.absorber_proj.tolist()
        absorbers, cosines = columns.gather(1, entry).tolist(), cos.gather(1, entry).tolist()
        n_real = (s.absorber_proj > 0).sum(1).tolist()
        rows, letters = self.assets.tp_rows.tolist(), self.assets.tp_labels.tolist()
        main = [chosen.main_latents(c) for c in range(N_LETTERS)]
        values = zip(
            [LETTERS[c] for c in letters], [self.assets.words[r] for r in rows],
            self.assets.token_ids[self.assets.tp_rows].tolist(), s.fraction.tolist(), s.full.tolist(),
            s.main_act.tolist(), a.tolist(), [main[c] for c in letters],
            *([row[:n] for row, n in zip(part, n_real, strict=True)] for part in (absorbers, cosines, proj)),
            strict=True,
        )  # fmt: skip
        return pd.DataFrame(list(values), columns=list(_WORD_COLUMNS))

    def letter_table(self, words: pd.DataFrame, chosen: k_sparse.KSparse, test: Latents) -> pd.DataFrame:
        import pandas as pd

        counts, figures = self.assets.letters_that_count.tolist(), self.assets.probe_figures.tolist()
        groups = dict(list(words.groupby("letter")))
        rows = []
        for c, letter in enumerate(LETTERS):
            n_main = int(chosen.n_main[c])
            rows.append(
                {"letter": letter, "counts": counts[c], **_absorption_of(groups.get(letter)), "n_split": n_main,
                 "main_latents": chosen.main_latents(c),
                 **dict(zip(("probe_f1", "probe_precision", "probe_recall", "probe_auroc"), figures[c], strict=True)),
                 "f1_k1": float(chosen.f1[c, 0]), "f1_split": float(chosen.f1[c, n_main - 1])}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        table["counts"] &= table["n_tp"] > 0
        return table.assign(**self.top_latents(test))

    def top_latents(self, test: Latents) -> dict[str, Any]:
        """Per letter the latent whose encoder column points most along the probe, as a classifier of test words."""
        W_enc = getattr(self.sae, "W_enc", None)
        if W_enc is None:
            return dict.fromkeys(_TOP)
        cos = self.directions @ unit(W_enc.detach().float().T).T
        top = cos.nan_to_num(-1).argmax(1)
        acts, truth = test.take(top), self.truth(self.is_test)
        figures = [*f1_precision_recall(acts > 0, truth), auroc(acts, truth)]
        return dict(zip(_TOP, [top.tolist(), *(f.tolist() for f in figures)], strict=True))

    def explained_variance(self, test: Latents) -> float:
        """On at most 1,024 test words; NaN for an SAE without decode."""
        if not hasattr(self.sae, "decode"):
            return float("nan")
        rows = self.is_test.nonzero().squeeze(1)[:1024]
        x = self.assets.x.to(self.device, self.dtype)[rows]
        recon = torch.cat([self.sae.decode(part) for part in test.head(len(rows)).dense().to(self.dtype).split(256)])
        residual = (x - recon).float().square().sum()
        return float(1 - residual / (x - x.mean(0)).float().square().sum())

    def result(self, letters: pd.DataFrame, words: pd.DataFrame, latents: _Encoded) -> AbsorptionResult:
        n_letters, needed = int(letters["counts"].sum()), self.preset.min_letters
        reason = "" if n_letters >= needed else (
            f"only {n_letters} of {N_LETTERS} letters can be read off the model by a linear probe (F1 above "
            f"{self.preset.min_probe_f1} on test words); the eval needs {needed}"
        )  # fmt: skip
        ev = self.explained_variance(latents.test)
        self.lap("explained variance")
        out = self.invalid(reason)
        details = {
            **out.details, "n_firing_on_train": int(latents.train.fires().sum()),
            "ranking": vars(self.schedule(latents.train.n_rows)),
        }  # fmt: skip
        return replace(
            out, valid=not reason, by_letter=letters, words=words, l0=latents.test.l0, ev=ev, details=details
        )

    def invalid(self, reason: str) -> AbsorptionResult:
        import pandas as pd

        return AbsorptionResult(
            preset=self.preset.name, seed=self.seed, asset_hash=self.assets.hash, valid=False, reason=reason,
            by_letter=pd.DataFrame(), words=pd.DataFrame(columns=list(_WORD_COLUMNS)), details=self.details(),
            seconds=time.perf_counter() - self._start, timings=self.timings, thresholds=self.preset,
        )  # fmt: skip

    def details(self) -> dict[str, Any]:
        a = self.assets
        return {
            "assets": a.settings, "n_words": len(a.words), "sampled_from": a.sampled_from,
            "n_true_positives": len(a.tp_rows), "model_accuracy": a.model_accuracy,
        }  # fmt: skip

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.timings[name], self._last = now - self._last, now


def _absorption_of(words: pd.DataFrame | None) -> dict[str, float]:
    """Scores over one letter's true positives; NaN and 0 where there is none."""
    nan = float("nan")
    if words is None:
        return {"n_tp": 0, "fraction": nan, "full": nan, "n_full": 0, "recall_main": nan}
    return {
        "n_tp": len(words),
        "fraction": words["fraction"].mean(),
        "full": words["full"].mean(),
        "n_full": int(words["full"].sum()),
        "recall_main": (words["main_act"] > 0).mean(),
    }
