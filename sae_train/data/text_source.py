"""A language model as a source: the activations at one hook of a model that reads a text."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import LEAST_HELD_OUT
from sae_train.data.activation_cache import ActivationCache, files_of, key_of
from sae_train.data.buffer import ActivationBuffer, held_out_activations, rounded_up
from sae_train.data.documents import find_documents
from sae_train.data.dtypes import choose_dtype
from sae_train.data.harvest import LM_BATCH_TOKENS, Harvest, Reader, waiting_room
from sae_train.data.language_model import LanguageModel, describe_at_hooks, load_at_hooks, load_language_model
from sae_train.data.origin import describe_text
from sae_train.data.pretrained import tokenizer_of
from sae_train.data.sources import Facts, Language, Opened
from sae_train.data.tokens import open_tokens
from sae_train.errors import UserError
from sae_train.evals.hierarchy import get_hierarchy
from sae_train.evals.prompts import with_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from jaxtyping import Float
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.tokens import TokenStream
    from sae_train.training.ranks import Ranks


class HookedText:
    """The activations of the tokens of a text; special and dropped tokens are left out.

    `lm` may be one that several processes compute together.
    """

    def __init__(self, lm: LanguageModel, stream: TokenStream, drop: set[int], settings: Settings) -> None:
        self.name, self.hook_name, self.d_in = lm.name, lm.hook_name, lm.d_in
        self.lm, self.stream, self.drop_ids, self.settings = lm, stream, drop, settings
        # Without BOS it is the first token that attention falls back on, with a norm of many times the usual.
        self.skip_first = lm.bos_id is None and settings.outlier_norm is not None
        self.weights, self.packages = lm.weights, stream.packages  # for the record of a run
        self.made_from = {
            "weights": lm.weights, "packages": stream.packages, "text": describe_text(settings.dataset, stream),
        }  # fmt: skip
        self.cache: ActivationCache | None = None
        self.reader: Reader | None = None
        """of this hook, where several share their passes over the text"""
        self._held_out: Tensor | None = None
        self._asked = 0

    def held_out(self, n_tokens: int) -> Float[Tensor, "n d_in"]:
        """Return the first n activations of the held-out rows."""
        if self._held_out is None or self._asked < n_tokens:
            rows, self._asked = self.stream.held_out, n_tokens
            self._held_out = held_out_activations(
                self.lm, rows, self.drop_ids, n_tokens, at_least=LEAST_HELD_OUT, skip_first=self.skip_first
            )
        return self._held_out[:n_tokens]

    def batches(self, batch_tokens: int) -> ActivationBuffer:
        """Return shuffled batches; the text is read once for all."""
        return ActivationBuffer(
            self.lm,
            self.stream,
            batch_tokens=batch_tokens,
            buffer_tokens=self.settings.data.buffer_tokens,
            drop_ids=self.drop_ids,
            skip_first=self.skip_first,
            seed=0,
            cache=self.cache,
            reader=self.reader,
        )


class TextSource:
    """`--model` with a language model: a named one, a local Hugging Face folder, a GGUF file, or a hub id."""

    def problems(self, settings: Settings) -> list[str]:
        """Whatever is wrong with the model or its text shows when they are described or opened."""
        return []

    def describe(self, settings: Settings, device: torch.device) -> dict[str, Facts]:
        """Sizes from the model's configuration alone; UserError for an unknown model, hook, text or prompt."""
        s, lm = settings, settings.lm
        dtype = choose_dtype(lm.dtype, device)
        models = describe_at_hooks(lm.model, lm.hooks or (lm.hook,), lm.trust_remote_code)
        notes = check_text(settings)
        _check_drop(settings)
        evals = f"{s.eval.absorption_evals} evaluations, preset {s.eval.preset}" if s.eval.absorption else "off"
        facts = {}
        for model in models:
            lines = (
                f"model      {lm.model}: {model.architecture}, {model.n_layers} blocks, d_model {model.d_model}, "
                f"{model.n_parameters / 1e6:,.1f} M weights, {dtype} on {device}",
                f"hook       {model.hook_name} (d_in {model.d_in})",
                f"text       {s.dataset}, sequences of {s.context(model.context)} tokens, "
                f"{s.data.held_out_tokens:,} activations held out",
                f"absorption {evals}",
            )
            chosen = () if lm.hook else (f"no hook was named: {model.hook_name} was taken",)
            facts[model.hook_name if len(models) > 1 else ""] = Facts(
                model.d_in, model.hook_name, lines, notes + chosen, model.n_parameters, model.n_parameters_to_hook,
                dtype=dtype, is_quantised=model.is_quantised, context=model.context,
                tokenizer=partial(tokenizer_of, lm.model, lm.trust_remote_code),
                kept_bytes=model.d_in * (4 if dtype == "float32" else 2),
            )  # fmt: skip
        return facts

    def open(self, settings: Settings, device: torch.device, ranks: Ranks, folder: Path | None) -> dict[str, Opened]:
        """Load the model and open the text; UserError for whatever cannot work."""
        lm, asked = settings.lm, settings.data.activation_cache
        lms = load_at_hooks(lm.model, lm.hooks or (lm.hook,), device, lm.dtype, lm.trust_remote_code)
        opened = []
        for lm, source in zip(lms, open_texts(lms, settings, ranks), strict=True):
            if asked or folder:
                source.cache = open_cache(source, Path(asked).expanduser() if asked else folder, ranks)
            language = Language(lm, source.stream.held_out, source.drop_ids, source.skip_first)
            opened.append(Opened(source, language, cache=source.cache))
        return dict(zip(settings.lm.hooks or ("",), opened, strict=True))

    def language_model(self, settings: Settings, device: torch.device) -> LanguageModel:
        """Load the language model that the settings name."""
        lm = settings.lm
        return load_language_model(lm.model, lm.hook, device, lm.dtype, lm.trust_remote_code)


def open_text(lm: LanguageModel, settings: Settings, ranks: Ranks) -> HookedText:
    """Open the text that the settings name for a loaded model; UserError for one that cannot be read."""
    return open_texts([lm], settings, ranks)[0]


def open_texts(lms: Sequence[LanguageModel], settings: Settings, ranks: Ranks) -> list[HookedText]:
    """Open the text that the settings name once, for a loaded model as seen from each hook."""
    lm = lms[0]
    context = settings.context(lm.context)
    stream = open_tokens(
        settings.dataset,
        lm.tokenizer,
        context=context,
        sequences=max(1, LM_BATCH_TOKENS // context),
        bos_id=lm.bos_id,
        text_column=settings.data.text_column,
        held_out_tokens=settings.data.held_out_tokens,
    )
    drop = drop_ids(lm.tokenizer, lm.name, settings.data.drop)
    sources = [HookedText(lm.shared_by(ranks), stream, drop, settings) for lm in lms]
    if len(lms) > 1:
        harvest = Harvest(lms, stream, drop, sources[0].skip_first, waiting_room(settings.data.buffer_tokens))
        for source, reader in zip(sources, harvest.readers, strict=True):
            source.reader = reader
    return sources


def open_cache(source: HookedText, folder: Path, ranks: Ranks) -> ActivationCache:
    """Name what the activations are made from: settings, text files, the first tokens, and the weights.

    Weights of which neither a revision nor hashes are known are told by the held-out activations, bit by bit.
    """
    settings, stream, lm = source.settings, source.stream, source.lm
    start = stream.state_dict()
    first = next(stream)
    stream.load_state_dict(start)
    weights = lm.weights or {}
    files = stream.packages or files_of(settings.dataset)
    apart = {"activation_cache", "buffer_tokens", *(["dataset"] if files else [])}  # where it lies says nothing
    named = weights.get("revision") or (weights.get("files") and all(each["sha256"] for each in weights["files"]))
    made_from = {
        "weights": weights if named else None, "dtype": str(lm.dtype), "hook": source.hook_name,
        "data": settings.data.model_dump(mode="json", exclude=apart),
        "block": rounded_up(settings.data.buffer_tokens, settings.train.batch_tokens),
        "files": files, "context": stream.context,
        "special": sorted(lm.special_ids), "skip_first": source.skip_first,
        "positions": 4,  # how the place after a block is written
    }  # fmt: skip
    bits = () if named else (source.held_out(settings.data.held_out_tokens),)
    about = about_cache(settings, source.hook_name, str(lm.dtype).removeprefix("torch."), stream.context)
    return ActivationCache(folder, key_of(made_from, first, *bits), lm.dtype, ranks, about)


def about_cache(settings: Settings, hook_name: str, dtype: str, context: int) -> dict[str, Any]:
    """What activations are of as far as a plan knows it, without model and text at hand."""
    return {
        "model": settings.lm.model, "hook": hook_name, "dtype": dtype, "context": context,
        "block": rounded_up(settings.data.buffer_tokens, settings.train.batch_tokens),
        "data": settings.data.model_dump(mode="json", exclude={"activation_cache", "buffer_tokens"}),
    }  # fmt: skip


def check_text(settings: Settings) -> tuple[str, ...]:
    """Return notes on what is read; UserError for no data set, one without text, and prompts that cannot be made."""
    if settings.eval.absorption:
        with_template(get_hierarchy(settings.eval.hierarchy), settings.eval.template)
    documents, _ = find_documents(settings.dataset, settings.data.text_column)
    if Path(settings.dataset).expanduser().exists():  # a first read of the hub's would take long
        with closing(documents.reads()) as reads:
            next(reads, None)
    return documents.notes


def _check_drop(settings: Settings) -> None:
    """UserError for a string to be dropped that is not one token."""
    if settings.data.drop:
        model = settings.lm.model
        drop_ids(tokenizer_of(model, settings.lm.trust_remote_code), model, settings.data.drop)


def drop_ids(tokenizer: Any, name: str, strings: tuple[str, ...]) -> set[int]:
    """Token ids of the strings left out of SAE training; UserError for a string that is not one token of a model's."""
    ids = {string: tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings}
    wrong = [repr(string) for string, tokens in ids.items() if len(tokens) != 1]
    if wrong:
        raise UserError(f"drop: {', '.join(wrong)} is not a single token of {name}: name whole tokens")
    return {tokens[0] for tokens in ids.values()}
