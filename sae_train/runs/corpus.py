"""The text that random SAEs are fitted on beside an SAE that is evaluated after its run: where there is one, the part
that its own run held out, so that the run and its evaluation have the same random SAEs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sae_train.config import LOCAL_NAMES, Settings, flat, resolve
from sae_train.config.record import RunRecord, at_hook, read_run
from sae_train.data.buffer import held_out_activations
from sae_train.data.outliers import is_kept, norm_limit
from sae_train.data.sources import Language
from sae_train.data.text_source import check_text, open_text
from sae_train.errors import UserError, first_line
from sae_train.runs.folder import restore_settings, run_of
from sae_train.runs.stream import split_held_out
from sae_train.training.ranks import current

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sae_train.data.language_model import LanguageModel
    from sae_train.sae.model import SAE

T = TypeVar("T")
ASKED = ("dataset", "text_column")  # that a user may name


def check_asked(settings: Settings, given: dict[str, Any]) -> None:
    """UserError for a text that the user named and that cannot be read."""
    if given.get("dataset"):
        check_text(settings)


def corpus_activations(
    lm: LanguageModel, sae: SAE, checkpoint: Path, settings: Settings, given: dict[str, Any]
) -> tuple[Tensor | None, str]:
    """Held-out activations of an SAE's text with its name, or None with the reason why there are none.

    A text that the user named (`given`) comes first, then that of the SAE's run, then one that is here by its name.
    UserError where a named one cannot be read.
    """
    return _read(sae, checkpoint, settings, given, functools.partial(_activations, lm))


def corpus_rows(
    lm: LanguageModel, sae: SAE, checkpoint: Path, settings: Settings, given: dict[str, Any]
) -> tuple[Corpus | None, str]:
    """The held-out text itself, in rows of tokens, with its name; else as `corpus_activations`."""
    return _read(sae, checkpoint, settings, given, functools.partial(_rows, lm))


def _read(
    sae: SAE, checkpoint: Path, settings: Settings, given: dict[str, Any],
    read: Callable[[Settings, float | None], T],
) -> tuple[T | None, str]:  # fmt: skip
    """What is read of an SAE's text, with its name, or None with the reason."""
    try:
        of_text, limit = _find_text(sae, checkpoint, settings, given)
        if of_text.data.dataset is None:
            return None, _unknown(sae)
        return read(of_text, limit), of_text.dataset
    except UserError as error:
        if given.get("dataset"):
            raise
        return None, first_line(error)


def _find_text(
    sae: SAE, checkpoint: Path, settings: Settings, given: dict[str, Any]
) -> tuple[Settings, float | None]:  # fmt: skip
    """Settings of the text, and the largest norm that is no outlier's, where that is known."""
    asked = {name: given[name] for name in ASKED if given.get(name)}
    fresh = {"text_column": "text"} | asked if "dataset" in asked else asked
    run = run_of(checkpoint)
    if run is None:
        path = sae.cfg.dataset_path
        here = {"dataset": path} if path in LOCAL_NAMES else {}
        return resolve({"model": settings.lm.model} | here | fresh), None
    info = read_run(run, RunRecord)
    if info.get("activations") and "dataset" not in asked:
        raise UserError("its run was given activations, not text")
    if info.get("activations"):
        return resolve({"model": settings.lm.model} | fresh), None
    begun, _ = restore_settings(run, info, None)
    of_text = resolve(flat(begun) | {"dataset": begun.dataset} | fresh)
    own = at_hook(info, sae.cfg.hook_name)
    return of_text, None if given.get("model") or given.get("hook") else norm_limit_of(own, of_text)


@dataclass(frozen=True)
class Corpus:
    """Rows of held-out text, and what of them a run leaves out."""

    language: Language
    outlier_norm: float | None
    limit: float | None
    """the largest norm that is no outlier's, where it is known"""

    def first(self, n_rows: int, context: int) -> Corpus:
        """So many rows, each cut to a context."""
        return replace(self, language=replace(self.language, rows=self.language.rows[:n_rows, :context]))

    def activations(self) -> Tensor:
        """Those that SAEs are trained on."""
        lm, text = self.language.lm, self.language
        x = held_out_activations(lm, text.rows, text.drop_ids, skip_first=text.skip_first).to(lm.device)
        return _without_outliers(x, self.outlier_norm, self.limit)


def norm_limit_of(info: dict[str, Any], settings: Settings) -> float | None:
    """The norm above which the run left activations out."""
    left_out, norm = info.get("outliers"), settings.outlier_norm
    return (left_out["median_norm"] or math.inf) * norm if left_out and norm else None


def _activations(lm: LanguageModel, settings: Settings, limit: float | None) -> Tensor:
    """Those of the held-out text that a run measures its figures on."""
    x = open_text(lm, settings, current()).held_out(settings.data.held_out_tokens).to(lm.device)
    return split_held_out(_without_outliers(x, settings.outlier_norm, limit))[0]


def _rows(lm: LanguageModel, settings: Settings, limit: float | None) -> Corpus:
    text = open_text(lm, settings, current())
    return Corpus(Language(lm, text.stream.held_out, text.drop_ids, text.skip_first), settings.outlier_norm, limit)


def _without_outliers(x: Tensor, outlier_norm: float | None, limit: float | None) -> Tensor:
    if outlier_norm is None:
        return x
    return x[is_kept(x, norm_limit(x, outlier_norm) if limit is None else limit)]


def _unknown(sae: SAE) -> str:
    path = sae.cfg.dataset_path
    return f"its text, {path}, is not fetched unasked" if path else "it does not say what text it was trained on"
