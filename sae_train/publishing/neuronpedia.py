"""SAEs in the format that Neuronpedia imports: a folder a source, with its records and with batches of latents.

Followed is the repository hijohnnylin/neuronpedia: what reads the files is apps/webapp/app/api/admin/import/route.ts
(commit 3861c05) with apps/webapp/lib/db/import.ts (efd6e35), and the fields are those of the tables in
apps/webapp/prisma/schema.prisma (008d504). The layout is that of its utils' export-data.py (1a80fe9).

What reads a batch takes its columns from the first line, so every line has the same ones, and no file is empty; what is
left out has a default in the table. An Activation and an Explanation have none for their id.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config import width_label
from sae_train.errors import UserError
from sae_train.files import finite, read_lines, whole, write_lines

if TYPE_CHECKING:
    from torch import Tensor

    from sae_train.evals.firing import Context, Firing
    from sae_train.protocols import LanguageModel
    from sae_train.sae.model import SAE

BATCH = 1024  # latents in a file, as in Neuronpedia's own exports
CREATOR_ID = "clkht01d40000jv08hvalcvly"  # the account that owns what is imported, in every database of Neuronpedia's
N_LOGITS, N_BARS = 10, 50  # tokens a latent favours and disfavours; bars of all its logits
LOGIT_ELEMENTS = 2**24  # of a block of logits: 64 MB
PLACES = {"resid": "res", "mlp": "mlp", "attn": "att"}
GZIP_LEVEL = 5
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Names:
    """Names under which Neuronpedia shows SAEs: `repo` is theirs on the hub, if they are there."""

    model_id: str
    release: str
    creator: str
    model: str
    dataset: str
    repo: str | None = None
    creator_id: str = CREATOR_ID


@dataclass(frozen=True)
class NeuronpediaSource:
    """One SAE as Neuronpedia knows it: a source, which is one layer of a source set."""

    names: Names
    name: str
    arch: str
    width: int
    hook_name: str
    notes: str
    """which weights and how many tokens the export is of: what tells a finished one from another"""

    @property
    def layer(self) -> int:
        found = re.search(r"\d+", self.hook_name)
        return int(found[0]) if found else 0

    @property
    def set_name(self) -> str:
        place = next((short for part, short in PLACES.items() if part in self.hook_name), "hook")
        return slug(f"{self.names.release}-{place}-{self.name}")

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.set_name}"

    @property
    def address(self) -> dict[str, str]:
        """What names it in rows of other tables."""
        return {"modelId": self.names.model_id, "layer": self.id}

    def folder(self, out: Path) -> Path:
        return out / self.names.model_id / self.id

    def is_in(self, out: Path) -> bool:
        """Whether an export of the same weights and tokens is finished: its record is written last."""
        records, _ = read_lines(self.folder(out) / "source.jsonl")
        return [record.get("notes") for record in records] == [self.notes]


def slug(name: str) -> str:
    """A name of letters, digits and dashes, as Neuronpedia's addresses have them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def check_model_id(name: str) -> str:
    """Return a model's id; UserError for one that Neuronpedia's table does not take."""
    if not re.fullmatch(r"[a-z0-9_-]{1,128}", name):
        raise UserError(f"--model-id {name!r} is no id of Neuronpedia's: give small letters, digits, '-' and '_'.")
    return name


def write_source(
    out: Path, source: NeuronpediaSource, sae: SAE, firing: Firing, lm: LanguageModel, about: dict[str, Any],
    explained: dict[int, str], progress: Progress,
) -> None:  # fmt: skip
    """Write one source whole; its own record comes last and says that the others are there.

    `about` is what is known of the model (layers, d_model) and the SAE's configuration (cfg); `explained` says in words
    what single latents do.
    """
    folder, written = source.folder(out), _Writer(source, sae, firing, lm)

    def activations(latents: range) -> Iterator[dict[str, Any]]:
        for latent in latents:
            progress(f"writing {source.name}", latent, firing.d_sae)
            yield from written.activations(latent)

    for begin in range(0, firing.d_sae, BATCH):
        latents = range(begin, min(begin + BATCH, firing.d_sae))
        name = f"batch-{begin // BATCH}.jsonl.gz"
        _write_rows(folder / "features" / name, written.features(latents))
        _write_rows(folder / "activations" / name, activations(latents))
        told = {latent: explained[latent] for latent in latents if latent in explained}
        _write_rows(folder / "explanations" / name, (written.explanation(*each) for each in told.items()))
    for kind, record in records(source, firing, about).items():
        write_lines(folder / f"{kind}.jsonl", [record])


def records(source: NeuronpediaSource, firing: Firing, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the tables SourceRelease, Model, SourceSet and Source, in the order in which they are needed."""
    names, repo = source.names, source.names.repo
    urls = [f"https://huggingface.co/{repo}"] if repo else []
    folder = source.name if repo else None
    owner = {"creatorId": names.creator_id, "visibility": "PUBLIC"}
    what = f"{source.arch} SAEs, {width_label(source.width)} latents, {source.hook_name.rsplit('.')[-1]}"
    return {
        "release": owner | {
            "name": names.release, "description": f"SAEs of {names.model} trained with sae-train",
            "descriptionShort": f"SAEs of {names.model}", "urls": urls, "creatorName": names.creator,
            "creatorNameShort": names.creator,
        },
        "model": owner | {
            "id": names.model_id, "displayName": names.model, "displayNameShort": names.model.split("/")[-1],
            "layers": about["layers"], "neuronsPerLayer": 0, "dimension": about["d_model"],
            "owner": names.model.split("/")[0], "inferenceEnabled": False,
            "instruct": "instruct" in names.model.lower(),
        },
        "sourceset": owner | {
            "modelId": names.model_id, "name": source.set_name, "description": what, "creatorName": names.creator,
            "urls": urls, "releaseName": names.release, "hasDashboards": True, "allowInferenceSearch": False,
        },
        "source": owner | {
            "id": source.id, "modelId": names.model_id, "setName": source.set_name, "hasDashboards": True,
            "inferenceEnabled": False, "saelensConfig": about["cfg"], "saelensRelease": repo,
            "saelensSaeId": folder, "hfRepoId": repo, "hfFolderId": folder,
            "num_prompts": firing.n_rows, "num_tokens_in_prompt": firing.context, "dataset": names.dataset,
            "notes": source.notes,
        },
    }  # fmt: skip


class _Writer:
    """Makes the rows of the tables Neuron, Activation and Explanation."""

    def __init__(self, source: NeuronpediaSource, sae: SAE, firing: Firing, lm: LanguageModel):
        self.source, self.sae, self.firing, self.lm = source, sae, firing, lm
        self.frequency = firing.frequency().tolist()
        self.owner = {"creatorId": source.names.creator_id}
        self.text_of: dict[int, str] = {}

    def features(self, latents: range) -> Iterator[dict[str, Any]]:
        """A row a latent: how often and how strongly it fires, and what it says of the next token."""
        most = self.firing.strongest.peaks.amax(1).tolist()
        known = self.owner | {"sourceSetName": self.source.set_name, "hookName": self.source.hook_name}
        for latent, logits in zip(latents, self._logits(latents), strict=True):
            heights, middles = self.firing.bars(latent)
            yield self.source.address | known | {
                "index": str(latent), "maxActApprox": _short(most[latent]), "frac_nonzero": self.frequency[latent],
                "freq_hist_data_bar_heights": heights, "freq_hist_data_bar_values": list(map(_short, middles)),
                **logits,
            }  # fmt: skip

    def activations(self, latent: int) -> Iterator[dict[str, Any]]:
        """A row a context. The strongest have -1 where the others have their interval, as SAEDashboard has it."""
        for rank, context in enumerate(self.firing.contexts(latent)):
            values = list(map(_short, context.values))
            yield self.source.address | self.owner | {
                "id": self._id("activation", latent, rank), "index": str(latent), "dataIndex": str(context.row),
                "tokens": [self._text(token) for token in context.tokens], "values": values,
                "maxValue": max(values), "maxValueTokenIndex": context.place, "minValue": min(values),
                "qualifyingTokenIndex": context.place, **_bin(context, max(values)),
            }  # fmt: skip

    def explanation(self, latent: int, words: str) -> dict[str, Any]:
        return self.source.address | {
            "id": self._id("explanation", latent, 0),
            "index": str(latent),
            "description": words,
            "authorId": self.source.names.creator_id,
        }

    def _id(self, kind: str, latent: int, rank: int) -> str:
        """The same id for the same row of every export of a source, so that none is imported twice."""
        key = json.dumps([*self.source.address.values(), self.source.notes, kind, latent, rank])
        return "c" + hashlib.sha256(key.encode()).hexdigest()[:24]

    def _text(self, token: int) -> str:
        """A token as it stands in the text: some tokenizers drop the space before the first one that they decode."""
        if token not in self.text_of:
            text, raw = self.lm.tokenizer.decode([token]), self.lm.tokenizer.convert_ids_to_tokens(token)
            spaced = isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" ")
            self.text_of[token] = " " + text if spaced else text
        return self.text_of[token]

    def _logits(self, latents: range) -> Iterator[dict[str, Any]]:
        """The most and least favoured next tokens and the distribution of all logits, empty where there are none."""
        n_vocabulary = len(self.lm.tokenizer)
        for part in torch.arange(latents.start, latents.stop).split(max(1, LOGIT_ELEMENTS // n_vocabulary)):
            effects = self.lm.read_out(self.sae.W_dec[part.to(self.sae.W_dec.device)])
            for i in range(len(part)):
                yield _NO_LOGITS if effects is None else self._rank(effects[i, :n_vocabulary])

    def _rank(self, effect: Tensor) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, largest in (("pos", True), ("neg", False)):
            values, ids = effect.topk(min(N_LOGITS, len(effect)), largest=largest)
            out[f"{name}_str"] = [self._text(token) for token in ids.tolist()]
            out[f"{name}_values"] = list(map(_short, values.tolist()))
        low, high = float(effect.min()), float(effect.max())
        middles = torch.linspace(low, high, 2 * N_BARS + 1)[1::2].tolist()
        out["logits_hist_data_bar_heights"] = effect.histc(N_BARS, low, high).int().tolist()
        out["logits_hist_data_bar_values"] = list(map(_short, middles))
        return out


_NO_LOGITS: dict[str, Any] = {
    "pos_str": [], "pos_values": [], "neg_str": [], "neg_values": [], "logits_hist_data_bar_heights": [],
    "logits_hist_data_bar_values": [],
}  # fmt: skip


def _bin(context: Context, most: float) -> dict[str, float]:
    low, high, share = context.interval or (-1, most, -1)
    return {"binMin": _short(low), "binMax": _short(high), "binContains": _short(share)}


def _short(value: float) -> float:
    return float(f"{value:.5g}") if value else 0.0  # as most are


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as a packed JSON-lines file, whole, row by row; none at all where there are no rows."""
    first = next(rows, None)
    if first is None:
        return
    with whole(path) as temporary, temporary.open("wb") as raw, gzip.GzipFile(
        "", "wb", GZIP_LEVEL, raw, mtime=0
    ) as packed:  # fmt: skip
        for row in itertools.chain([first], rows):
            packed.write(json.dumps(finite(row)).encode() + b"\n")
