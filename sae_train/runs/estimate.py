"""How long a run will take, part by part: what there is to compute over what this machine computes in a second.

The shares below were measured on two cores of a Xeon with AMX; benchmarks/estimate.py compares the sum with real runs.
"""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config import EACH
from sae_train.data.dtypes import DTYPES
from sae_train.data.pretrained import special_ids
from sae_train.evals import asset_cache, assets, vocab
from sae_train.evals.fidelity import FIDELITY_TOKENS
from sae_train.evals.hierarchy import get_hierarchy
from sae_train.evals.presets import get_preset
from sae_train.runs.disk import Kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_train.config import SAESpec, Settings
    from sae_train.data.sources import Facts

START = 6.0  # seconds: imports, the first activations
QUANTISED_WEIGHTS = 10e6  # made whole again in a second
STEP_EFFICIENCY = 0.5  # share of the rate of a matrix product which a training step reaches
ENCODER_SHARE = 1.4  # a whole step in encoder products
LM_EFFICIENCY = 0.45  # share which a language model's blocks reach
KEPT = 2.0  # seconds that the eval's set-up takes from its cache
TRUE_POSITIVES = 0.19  # of the words are read a second time
PROMPT = 80  # tokens
LONE = 6  # what a lone token behind a shared context costs, in tokens of a long pass
PROBE_STEP = 250e-6  # seconds
ENCODING = 0.8  # of an SAE's latents, in encoder products at a step's efficiency
RANKING = 3.0e-6  # seconds for an active latent of a word
BASELINES = 13  # of an SAE, in looks: six random SAEs; shuffled labels, which are hard to rank by; its own latents
FIDELITY = 2 * FIDELITY_TOKENS  # tokens that go through the whole language model in a look at an SAE
END = 4.0  # seconds: files and report


def seconds_at_hooks(
    settings: Settings, facts: dict[str, Facts], specs: list[SAESpec], device: str, n_processes: int, sharing: int,
    after_another: bool,
) -> dict[str, float]:  # fmt: skip
    """Seconds by part of a run that trains `specs`: its passes over the text go to the deepest hook, once for all."""
    deepest = max(facts, key=lambda hook: facts[hook].n_parameters_to_hook)
    rate = functools.cache(functools.partial(matrix_rate, device))
    words = Words(settings, facts[deepest].tokenizer)
    total: dict[str, float] = {}
    for hook, each in facts.items():
        own = [spec for spec in specs if spec.hook == hook]
        alone = Estimate(settings.at(hook), each, own, rate, words, n_processes, sharing)
        for part, seconds in alone.parts(after_another, beside=hook != deepest).items():
            total[part] = total.get(part, 0.0) + seconds
    return total


class Words:
    """What the eval asks about, looked up once for all hooks; `tokenizer` is None without a language model."""

    def __init__(self, settings: Settings, tokenizer: Callable[[], Any] | None):
        self.how, self.has_any = settings.eval, tokenizer is not None and settings.eval.absorption
        self._load = tokenizer

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self._load()

    @functools.cached_property
    def number(self) -> int:
        """Tokenizer entries that the eval asks about, before those are left out that a prompt splits."""
        found, _ = vocab.entries(self.tokenizer, special_ids(self.tokenizer), get_hierarchy(self.how.hierarchy))
        return min(len(found), self.how.eval_words or len(found))


class Estimate:
    """Seconds of a process that trains `specs`, of `n_processes` that share the language model's work.

    Each SAE's steps are shared by `sharing` of them.
    """

    def __init__(
        self, settings: Settings, facts: Facts, specs: list[SAESpec],
        rate: Callable[[torch.dtype], float], words: Words, n_processes: int = 1, sharing: int = 1,
    ):  # fmt: skip
        """`rate` is FLOP/s of a matrix product in a number format."""
        self.settings, self.facts, self.specs, self.words = settings, facts, specs, words
        self.n_processes, self.sharing = n_processes, sharing
        self.step_rate = rate(torch.float32) * STEP_EFFICIENCY
        self.lm_rate = rate(DTYPES[facts.dtype]) * LM_EFFICIENCY

    def parts(self, after_another: bool = False, beside: bool = False) -> dict[str, float]:
        """Seconds by part; `after_another` run that left activations and set-up in its caches, or `beside` a deeper
        hook of the same run, which has the start, the passes over the text and the end.
        """
        facts, n_looks = self.facts, self.settings.eval.absorption_evals
        training = self.training(read=1.0 if after_another or beside else self.kept_share())
        start = 0.0 if beside else START + facts.is_quantised * facts.n_parameters / QUANTISED_WEIGHTS
        end = 0.0 if beside else END
        if not self.words.has_any:
            looks = n_looks * len(self.specs) * facts.look_seconds
            return {"start": start, "training": training, "looks": looks, "end": end}
        n_words = self.words.number
        looks = [self.look(spec, n_words) for spec in self.specs]
        keeps = asset_cache.cache_folder(self.settings.eval.eval_cache) is not None
        is_kept = (after_another and keeps) or self.is_set_up()
        set_up = KEPT if is_kept else self.reading(n_words) + self.probe(n_words)
        end += sum(BASELINES * look + self.probe(n_words) for look in looks)
        fidelity = FIDELITY * 2.0 * facts.n_parameters / self.lm_rate
        return {
            "start": start, "set-up of the eval": set_up, "training": training,
            "looks": n_looks * (sum(looks) + fidelity * len(looks)), "end": end,
        }  # fmt: skip

    def is_set_up(self) -> bool:
        """Whether an earlier run left the eval's set-up in the cache."""
        how, facts, tokenizer = self.settings.eval, self.facts, self.words.tokenizer
        folder = asset_cache.cache_folder(how.eval_cache)
        known = SimpleNamespace(
            name=self.settings.lm.model, hook_name=facts.hook_name, tokenizer=tokenizer, dtype=facts.dtype,
            special_ids=special_ids(tokenizer), context=facts.context, bos_id=tokenizer.bos_token_id,
        )  # fmt: skip
        return folder is not None and assets.is_kept(
            known, folder, how.hierarchy, how.template, how.eval_seed, how.preset, how.eval_words, how.eval_contexts
        )

    def kept_share(self) -> float:
        """Share of the activations that an earlier run left in the cache."""
        return min(1.0, Kept.find(self.settings, self.facts).tokens / self.tokens)

    @property
    def tokens(self) -> int:
        return self.settings.n_steps * self.settings.train.batch_tokens

    def training(self, read: float = 0.0) -> float:
        """The SAEs' steps, and the language model up to the hook but for the share that is `read` from a cache."""
        lm = (1.0 - read) * 2.0 * self.facts.n_parameters_to_hook / self.n_processes / self.lm_rate
        encoders = sum(2.0 * self.facts.d_in * spec.width for spec in self.specs) / self.sharing
        return self.tokens * (lm + encoders * ENCODER_SHARE / self.step_rate)

    def reading(self, n_words: int) -> float:
        """The words of the eval and its true positives, each a token behind a shared context or a whole prompt."""
        contexts = self.settings.eval.eval_contexts
        read = n_words * (1 + TRUE_POSITIVES)
        tokens = read * PROMPT if contexts == EACH else LONE * read + 3 * contexts * PROMPT
        return tokens * 2.0 * self.facts.n_parameters_to_hook / self.lm_rate

    def probe(self, n_words: int) -> float:
        """Fitting the linear probe of the labels."""
        preset = get_preset(self.settings.eval.preset)
        return n_words / preset.probe_batch * preset.probe_epochs * PROBE_STEP

    def look(self, spec: SAESpec, n_words: int) -> float:
        """The absorption eval of one SAE."""
        read = n_words * (1 + TRUE_POSITIVES)
        encoding = ENCODING * 2.0 * self.facts.d_in * spec.width / self.step_rate
        return read * encoding + n_words * spec.l0 * RANKING


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this device, measured in a moment."""
    a = torch.ones(2048, 1024, device=device, dtype=dtype)
    (a @ a.T).sum().item()
    start = time.perf_counter()
    for _ in range(5):
        product = a @ a.T
    product.sum().item()
    return 5 * 2.0 * 2048 * 2048 * 1024 / (time.perf_counter() - start)
