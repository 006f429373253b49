"""`sae-train export-neuronpedia`: what a run's SAEs do on the run's own text, in the format that Neuronpedia imports.

The text goes through the language model once for as many SAEs as fit into memory together. A source is written whole,
its own record last, so that an export that was interrupted goes on with the sources that are not there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_train.config.flags import ExportFlags
from sae_train.config.record import LatentRecord, fits
from sae_train.config.units import read_count
from sae_train.data.harvest import dropped, is_seen
from sae_train.data.origin import check_unchanged
from sae_train.data.outliers import is_kept
from sae_train.errors import UserError
from sae_train.evals.firing import Firing, memory_of
from sae_train.evals.latents import encode
from sae_train.files import read_lines
from sae_train.publishing.neuronpedia import Names, NeuronpediaSource, check_model_id, slug, write_source
from sae_train.publishing.publish import find, public_name
from sae_train.runs.corpus import norm_limit_of
from sae_train.runs.display import Display
from sae_train.runs.folder import alone_in, restore_settings, trusting
from sae_train.runs.process import prepare_process
from sae_train.sae.files import load_sae, sae_lens_cfg
from sae_train.sae.layouts import WEIGHTS
from sae_train.training.ranks import choose_device, current

if TYPE_CHECKING:
    from torch import Tensor

    from sae_train.config import Settings
    from sae_train.data.text_source import HookedText

TOGETHER = 2**30  # bytes of contexts of the SAEs that are looked at in one pass over the text
WORDS_SHOWN = 8  # of those that a latent absorbs


@dataclass(frozen=True)
class Looked:
    """The run's model and text, read from its start and once at most."""

    source: HookedText
    start: dict[str, Any]
    limit: float
    n_rows: int

    @property
    def context(self) -> int:
        return self.source.stream.context

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield tokens (rows, context), which of them SAEs see, and the activations of these."""
        source, left = self.source, self.n_rows
        source.stream.load_state_dict(self.start)
        drop = dropped(source.lm, source.drop_ids)
        while left > 0:
            tokens = next(source.stream)[:left].to(source.lm.device)
            if source.stream.epoch:  # some of these rows are from the start again
                return
            left -= len(tokens)
            x = source.lm.activations(tokens)
            seen = is_seen(tokens, drop, source.skip_first) & is_kept(x, self.limit)
            yield tokens, seen, x[seen]


def export_neuronpedia(
    checkpoint: Path,
    asked: ExportFlags,
    out: Path | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write a run's SAEs, or one of them, as sources of Neuronpedia's; return their folders.

    UserError where there is no run with text, no finished SAE, or another model or text than the run had.
    """
    prepare_process()
    found = find(checkpoint)
    settings = _settings(found.run, found.info, checkpoint, trust_remote_code)
    n_tokens = read_count("--tokens", asked.tokens)
    names = _names(found.info, found.run, asked)
    out = out or found.run / "neuronpedia"
    finished = [each for each in found.candidates if (each.folder / "cfg.json").is_file()]
    if not finished:
        raise UserError(f"{checkpoint} holds no finished SAE: nothing to export.")
    with alone_in(found.run), Display() as display:
        display.interrupted = "sources that are written stay: the same command goes on with the others"
        display(f"loading {settings.lm.model} and its text")
        looked = _open(settings, found.info, n_tokens)
        hook = looked.source.hook_name
        sources = {each.folder: _source(each.entry, each.folder, hook, names, n_tokens) for each in finished}
        left = {folder: source for folder, source in sources.items() if not source.is_in(out)}
        if len(left) < len(sources):
            display.say(f"{len(sources) - len(left)} of {len(sources)} sources are written already")
        groups = _groups(left, looked.context)
        for line in _plan(groups, looked, out, display):
            display.say(line)
        for group in groups if not dry_run else ():
            _export(group, looked, settings, found.info, out, display)
    return [source.folder(out) for source in sources.values()]


def _settings(run: Path | None, info: dict[str, Any], checkpoint: Path, trust_remote_code: bool) -> Settings:
    """The run's settings; UserError for an SAE of no run, and for a run without a language model that reads text."""
    if run is None:
        raise UserError(f"{checkpoint} lies in no run's folder, so nothing says which text to read: give a run's.")
    if info.get("activations") or info["model"] == "toy" or not info.get("settings"):
        raise UserError(f"the run {str(run)!r} has no language model that reads text: Neuronpedia shows nothing else.")
    info = trusting(run, info, trust_remote_code, f"sae-train export-neuronpedia {checkpoint}")
    if current().size > 1:
        raise UserError("sae-train export-neuronpedia is the work of one process: start it without torchrun")
    return restore_settings(run, info, None)[0]


def _names(info: dict[str, Any], run: Path | None, asked: ExportFlags) -> Names:
    """Names as they were asked for; by default those of the repo, else of the run's folder."""
    owner, _, repo = (asked.repo or "").rpartition("/")
    if asked.repo and not (owner and repo):
        raise UserError(f"--repo takes an owner and a name, such as you/name, not {asked.repo!r}")
    model, dataset = public_name(info["model"]), public_name(info["dataset"])
    release = repo or run.name
    model_id = check_model_id(asked.model_id or slug(model.split("/")[-1]))
    creator = asked.creator or owner or "sae-train"
    given = {"creator_id": asked.creator_id} if asked.creator_id else {}
    return Names(model_id, slug(release), creator, model, dataset, repo=asked.repo, **given)


def _open(settings: Settings, info: dict[str, Any], n_tokens: int) -> Looked:
    """Load the run's model and open its text; UserError where either is another one by now."""
    from sae_train.data.sources import kind_of
    from sae_train.data.text_source import open_text

    lm = kind_of(settings).language_model(settings, choose_device(settings.lm.device))
    source = open_text(lm, settings, current())
    check_unchanged(info, source.made_from)
    limit = norm_limit_of(info, settings)
    n_rows = -(-n_tokens // source.stream.context)
    return Looked(source, source.stream.state_dict(), float("inf") if limit is None else limit, n_rows)


def _source(
    entry: dict[str, Any], folder: Path, hook_name: str, names: Names, n_tokens: int
) -> NeuronpediaSource:  # fmt: skip
    """An SAE's source; its notes tell this export from one of other weights or of another length."""
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() if (folder / WEIGHTS).is_file() else ""
    notes = f"sae-train, {n_tokens:,} tokens asked for, weights {digest[:16]}"
    return NeuronpediaSource(names, entry["name"], entry["arch"], entry["width"] or 0, hook_name, notes)


def _groups(left: dict[Path, NeuronpediaSource], context: int) -> list[dict[Path, NeuronpediaSource]]:
    """SAEs that are looked at in one pass: as many as fit, at least one."""
    groups: list[dict[Path, NeuronpediaSource]] = []
    used = TOGETHER
    for folder, source in left.items():
        needed = memory_of(source.width, context)
        if used + needed > TOGETHER:
            groups.append({})
            used = 0
        groups[-1][folder] = source
        used += needed
    return groups


def _plan(groups: list[dict[Path, NeuronpediaSource]], looked: Looked, out: Path, display: Display) -> Iterator[str]:
    """Say how many tokens are read, how long that takes by two batches of the first pass, and what memory is kept."""
    if not groups:
        yield f"nothing is left to write in {out}"
        return
    display("timing two batches")
    seconds, n_rows = _time_a_batch(groups[0], looked)
    passes = f"{len(groups)} passes" if len(groups) > 1 else "one pass"
    kept = max(sum(memory_of(source.width, looked.context) for source in group.values()) for group in groups)
    tokens = looked.n_rows * looked.context
    n_saes, reading = sum(map(len, groups)), len(groups) * seconds * looked.n_rows / n_rows
    yield f"{tokens:,} tokens in {looked.n_rows:,} rows of {looked.context}, in {passes} for {n_saes} SAEs, to {out}"
    yield f"about {reading:,.0f} s of reading, then the writing; contexts take {kept / 2**30:.2f} GiB of memory"


def _time_a_batch(group: dict[Path, NeuronpediaSource], looked: Looked) -> tuple[float, int]:
    """Seconds and rows of the second batch; the first one warms up."""
    seconds, n_rows, states = 0.0, 1, _states(group, looked)
    begun = time.perf_counter()
    for i, batch in enumerate(looked.batches()):
        _take_in(batch, states)
        seconds, n_rows, begun = time.perf_counter() - begun, len(batch[0]), time.perf_counter()
        if i == 1:
            break
    return seconds, n_rows


def _states(group: dict[Path, NeuronpediaSource], looked: Looked) -> list[tuple[Any, Firing]]:
    """The SAEs of a pass, each with what is kept of the text for it."""
    lm, states = looked.source.lm, []
    for folder in group:
        sae = load_sae(folder).to(lm.device)
        if sae.cfg.hook_name not in ("", lm.hook_name) or sae.cfg.d_in != lm.d_in:
            raise UserError(f"{folder} is an SAE of {sae.cfg.hook_name}, not of {lm.hook_name} as its run's others are")
        states.append((sae, Firing(sae.cfg.d_sae, looked.context, lm.device)))
    return states


def _take_in(batch: tuple[Tensor, Tensor, Tensor], states: list[tuple[Any, Firing]]) -> None:
    tokens, seen, x = batch
    for sae, firing in states:
        firing.add(tokens, seen, encode(sae, x))


@torch.no_grad()
def _export(
    group: dict[Path, NeuronpediaSource], looked: Looked, settings: Settings, info: dict[str, Any], out: Path,
    display: Display,
) -> None:  # fmt: skip
    """Read the text for the SAEs of a pass and write their sources."""
    from sae_train.data.language_model import describe_language_model

    states, wanted = _states(group, looked), looked.n_rows * looked.context
    doing = f"reading text for {', '.join(source.name for source in group.values())}"
    done = 0
    display(doing, done, wanted)
    for batch in looked.batches():
        _take_in(batch, states)
        done += batch[0].numel()
        display(doing, done, wanted)
    if done < wanted:
        display.say(f"the text ends after {done:,} tokens of the {wanted:,} asked for: it is not read twice")
    facts = describe_language_model(settings.lm.model, settings.lm.hook, settings.lm.trust_remote_code)
    for (folder, source), (sae, firing) in zip(group.items(), states, strict=True):
        shutil.rmtree(source.folder(out), ignore_errors=True)
        cfg = replace(sae.cfg, model_name=source.names.model, dataset_path=source.names.dataset)
        about = {"layers": facts.n_layers, "d_model": facts.d_model, "cfg": sae_lens_cfg(cfg)}
        write_source(out, source, sae, firing, looked.source.lm, about, _explained(folder, info), display)
        display.say(f"written: {source.folder(out)}")


def _explained(folder: Path, info: dict[str, Any]) -> dict[int, str]:
    """In words what the run's eval found latents to do."""
    records, _ = read_lines(folder.parent.parent / "latents" / f"{folder.name}.jsonl")
    of = (info.get("eval_assets") or {}).get("hierarchy", "first-letter")
    found = {}
    for record in records:
        if not fits(LatentRecord, record):
            continue
        words = [f"main latent of {', '.join(record['main_of'])} ({of} eval)"] if record["main_of"] else []
        if absorbed := record["absorbs"]:
            more = f" and {len(absorbed) - WORDS_SHOWN} more words" if len(absorbed) > WORDS_SHOWN else ""
            words.append(f"absorbs {', '.join(absorbed[:WORDS_SHOWN])}{more} ({of} eval)")
        if words:
            found[record["latent"]] = "; ".join(words)
    return found
