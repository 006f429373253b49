"""What sae-bench's core eval reads, an SAE's own held-out text, and what sae-train measures on the same rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_train.errors import UserError
from sae_train.evals.fidelity import FidelityData, loss_recovered
from sae_train.training.metrics import held_out_metrics

if TYPE_CHECKING:
    from sae_train.data.language_model import LanguageModel
    from sae_train.runs.corpus import Corpus
    from sae_train.sae.model import SAE

BATCH_ROWS = 16  # that sae-bench's core eval reads at a time


@dataclass(frozen=True)
class CoreText:
    """What the core eval reads: rows of the SAE's own text, or, where `corpus` is None, sae-bench's own."""

    corpus: Corpus | None
    name: str
    settings: dict[str, Any]

    @classmethod
    def choose(cls, given: dict[str, Any], found: tuple[Corpus | None, str]) -> CoreText:
        """All rows of held-out text, once; as many of them as the eval's `given` settings ask for where they do.

        `found` is the text with its name, or None with the reason why there is none.
        """
        corpus, name = found
        if "dataset" in given:
            return cls(None, str(given["dataset"]), {})
        if corpus is None:
            return cls(None, f"sae-bench's own text ({name})", {})
        n_rows, context = corpus.language.rows.shape
        batch = min(_count(given, "batch_size_prompts", BATCH_ROWS), n_rows)
        context = min(_count(given, "context_size", context), context)
        names = ("n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches")
        asked = [_count(given, each, n_rows // batch) for each in names]
        settings = {"batch_size_prompts": batch, "context_size": context, **dict(zip(names, asked, strict=True))}
        return cls(corpus.first(batch * max(asked), context), name, settings)

    def beside(self, lm: LanguageModel, sae: SAE) -> tuple[str, dict[str, float]]:
        """The text's name, and our figures of the same rows under sae-bench's names: none where it reads another."""
        if self.corpus is None:
            return self.name, {}
        own = held_out_metrics(sae, self.corpus.activations())
        text = self.corpus.language
        own |= loss_recovered(lm, sae, FidelityData.build(lm, text.rows, text.drop_ids))
        names = ("l0", "explained_variance", "ce_loss_score", "kl_div_with_sae")
        alive = (own["density"] > 0).float().mean().item()
        return self.name, {each: own[f"metrics/{each}"] for each in names} | {"frac_alive": alive}


def _count(given: dict[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or value < 1:
        raise UserError(f"--suite-config: core's {name} {value!r} is no whole number of at least 1")
    return value
