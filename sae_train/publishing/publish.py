"""Publishes a run, or one of its SAEs, as a repo on the hub that SAELens reads, in one commit.

Everything is staged and read back in a temporary folder first. What is off its L0 or was not evaluated is refused.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sae_train.config import flat, leaves, resolve
from sae_train.config.record import EvalFile, MetricsRow, PublishedRun, at_hook, fits, read_run
from sae_train.config.settings import LOCAL_NAMES
from sae_train.errors import UserError
from sae_train.files import check_types, read_json, read_metrics, write_json, write_text
from sae_train.publishing.card import card
from sae_train.publishing.curves import write_curves
from sae_train.publishing.hub import Origin, check_repo_id, is_hub_id, upload
from sae_train.publishing.licences import check_licence
from sae_train.publishing.release import stage_result, stage_sparsity, training_metadata, write_registry
from sae_train.publishing.reproduce import command
from sae_train.report.text import number
from sae_train.sae.files import load_sae, save_sae
from sae_train.sae.model import SAE, SAEConfig, fold_decoder_norm

MAX_L0_ERROR = 0.02
UNIT = 1e-5  # how far from 1 sae-bench lets the norm of a decoder row be
KEPT = ("hook_name", "d_in", "context", "tokens", "epochs", "seconds", "eval_seconds", "processes", "weights",
        "text_packages", "versions", "hardware", "git_commit")  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An SAE to be published, with its entry of run.json (name, arch, width, l0, seed, failed, final, baseline)."""

    folder: Path
    entry: dict[str, Any]

    def problems(self) -> list[str]:
        """Why it should not be published as it is."""
        name, final = self.entry["name"], self.entry["final"]
        asked, reached = number(self.entry["l0"]), number(final.get("metrics/l0"))
        if not (self.folder / "cfg.json").is_file():
            return [f"{name} is not finished ({self.entry['failed'] or 'its run was interrupted'})"]
        problems = []
        if not asked:
            problems.append(f"{name} is in no run's folder, so nothing says what it was to be")
        elif reached is None:
            problems.append(f"the L0 of {name} was not measured")
        elif abs(reached / asked - 1) > MAX_L0_ERROR:
            problems.append(f"{name} has L0 {reached:.2f} where {asked:g} was asked")
        if final.get("absorption/valid") is None and number(final.get("toy/mcc")) is None:
            problems.append(f"the absorption eval of {name} is missing (sae-train eval {self.folder})")
        return problems


@dataclass(frozen=True)
class Source:
    """run.json's content (or what stands in for it), the run's folder if there is one, its SAEs."""

    info: dict[str, Any]
    run: Path | None
    candidates: list[Candidate]

    def problems(self) -> list[str]:
        """Why they should not be published as they are."""
        status = self.info.get("status", "finished")
        own = [] if status == "finished" else [f"the run's status is {status!r}"]
        return own + [problem for candidate in self.candidates for problem in candidate.problems()]


def publish(
    checkpoint: str | Path, repo: str, *, private: bool = False, dry_run: bool = False, force: bool = False,
    license: str = "mit", base_model: str | None = None,
) -> str | Path:  # fmt: skip
    """Publish a run's SAEs, or one of them, and return the repo's address; with dry_run, the staged folder.

    `force` publishes what is off its L0 or not evaluated, leaves out what is not finished, and adds to a repo that
    holds files already. `base_model` is the language model's hub id, where the run names a local folder. UserError
    says in one sentence what stands in the way; the repo then holds nothing new.
    """
    check_repo_id(repo)
    license = check_licence(license)
    if base_model and not is_hub_id(base_model):
        raise UserError(f"--base-model {base_model!r} is no id of the hub's: give one such as gpt2 or owner/name")
    source = find(Path(checkpoint))
    problems = source.problems()
    if problems and not force:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"not published: {'; '.join(problems[:4])}{more}; --force publishes all the same.")
    finished = [candidate for candidate in source.candidates if (candidate.folder / "cfg.json").is_file()]
    if not finished:
        raise UserError(f"{checkpoint} holds no finished SAE: nothing to publish.")
    origin = _origin(source.info, repo, license, base_model)
    staged, keep = None, False
    try:
        staged = Path(tempfile.mkdtemp(prefix="sae-train-publish-"))
        _stage(staged, replace(source, candidates=finished), origin)
        print("\n".join(_listing(staged, origin)))
        if dry_run:
            print(f"dry run: nothing was uploaded; look at {staged / 'README.md'}")
            keep = True
            return staged
        print("uploading (where the hub fails, up to a minute of retries) …", flush=True)
        url = upload(staged, repo, private, replace=force)
    except OSError as error:
        where = error.filename or staged or "a temporary folder"
        raise UserError(f"nothing was published: {error.strerror} ({where}); TMPDIR names a disk with room.") from error
    finally:
        if staged and not keep:
            shutil.rmtree(staged, ignore_errors=True)
    print(f"published: {url}")
    return url


def find(checkpoint: Path) -> Source:
    """What a run's folder, or one SAE's, holds for publication."""
    folder = checkpoint.expanduser().resolve()
    if (folder / "run.json").is_file():
        info = read_run(folder, PublishedRun)
        return Source(info, folder, [_candidate(folder / "saes" / entry["name"], entry) for entry in info["saes"]])
    sae, run = load_sae(folder), folder.parent.parent
    info = read_run(run, PublishedRun) if (run / "run.json").is_file() else {}
    entry = next((entry for entry in info.get("saes", ()) if entry["name"] == folder.name), None)
    if not entry:
        return _lone_source(folder, sae.cfg)
    return Source(at_hook(info, entry.get("hook_name")), run, [_candidate(folder, entry)])


def _lone_source(folder: Path, cfg: SAEConfig) -> Source:
    """An SAE in no run's folder: its configuration is all that is known."""
    entry = {"name": folder.name, "arch": cfg.metadata.get("trained_as", cfg.architecture), "width": cfg.d_sae,
             "l0": None, "failed": None, "final": {}, "baseline": {}}  # fmt: skip
    info = {"model": cfg.model_name, "hook_name": cfg.hook_name, "dataset": cfg.dataset_path, "d_in": cfg.d_in}
    return Source(info, None, [_candidate(folder, entry)])


def _candidate(folder: Path, entry: dict[str, Any]) -> Candidate:
    """Fill in what `sae-train eval` wrote beside the SAE, where the run itself did not evaluate it."""
    entry = {"arch": "", "width": 0, "l0": None, "failed": None} | entry
    entry |= {name: entry.get(name) or {} for name in ("final", "baseline")}
    if entry["final"].get("absorption/valid") is None and (folder / "absorption.json").is_file():
        figures, beside = _evaluation(folder / "absorption.json")
        entry = entry | {"final": entry["final"] | figures, "baseline": entry["baseline"] | beside}
    return Candidate(folder, entry)


def _evaluation(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures under the names of metrics.jsonl, and baselines, of an absorption.json; none of another hierarchy."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("eval_type_id") != "absorption_first_letter":
        return {}, {}
    result = check_types(EvalFile, content, path).model_dump()
    rest, means = result["eval_result_unstructured"], result["eval_result_metrics"]["mean"]
    figures = {name: rest[name] for name in ("valid", "reason", "mean_f1")} | {
        "n_letters": len(result["eval_result_details"])
    }
    for ours, theirs in (
        ("mean_fraction", "mean_absorption_fraction_score"),
        ("mean_full", "mean_full_absorption_score"),
    ):
        low, high = rest["intervals"].get(ours, (None, None))
        figures |= {ours: means.get(theirs), f"{ours}_low": low, f"{ours}_high": high}
    return {f"absorption/{name}": value for name, value in figures.items()}, rest["baselines"]


def _origin(info: dict[str, Any], repo: str, license: str, base_model: str | None) -> Origin:
    """Where the SAEs came from, in names that mean something elsewhere: local paths keep their last part."""
    model, dataset = public_name(info["model"]), public_name(info["dataset"])
    from_text = info.get("settings") and not info.get("activations")
    # Those of before that are no settings any more are left out of the command.
    asked = {name: value for name, value in (info.get("settings") or {}).items() if name in leaves()}
    settings = flat(resolve(asked)) if from_text else {}
    if settings.get("init_from"):
        settings["init_from"] = public_name(settings["init_from"])
    return Origin(
        repo=repo, license=license, model=base_model or model, dataset=dataset, info=info,
        base_model=base_model or (model if _on_hub(info["model"]) else None),
        on_hub=dataset if _on_hub(info["dataset"]) else None,
        command=command(settings | {"model": base_model or model, "dataset": dataset}, info.get("stages") or ())
        if from_text
        else None,
    )  # fmt: skip


def public_name(name: str) -> str:
    """The last part alone of a local path, and any other name as it is."""
    return Path(name).name if Path(name).expanduser().exists() or name.startswith(("/", ".", "~")) else name


def _on_hub(name: str) -> bool:
    return is_hub_id(name) and name not in LOCAL_NAMES and not Path(name).exists()


def _stage(staged: Path, source: Source, origin: Origin) -> None:
    lacking = [name for candidate in source.candidates for name in _stage_sae(staged, candidate, source.info, origin)]
    if lacking:
        print(f"not in the release: {', '.join(lacking)}; sae-train eval writes them into an SAE's folder")
    entries = [candidate.entry for candidate in source.candidates]
    about = {"model": origin.model, "dataset": origin.dataset, "command": origin.command}
    kept = {key: source.info.get(key) for key in KEPT}
    hooks = {"hooks": source.info["hooks"]} if source.info.get("hooks") else {}
    write_json(staged / "results.json", about | kept | hooks | {"saes": entries})
    names = {entry["name"] for entry in entries}
    logged = read_metrics(source.run) if source.run else []
    rows = [row for row in logged if fits(MetricsRow, row) and row["sae"] in names]
    if rows:
        write_curves(rows, staged / "curves.png")
    write_registry(staged, entries, origin)
    write_text(staged / "README.md", card(origin, entries, with_curves=bool(rows)))


def _stage_sae(staged: Path, candidate: Candidate, info: dict[str, Any], origin: Origin) -> list[str]:
    """Stage one SAE and what its run measured; name what its folder lacks."""
    name, folder = candidate.entry["name"], candidate.folder
    sae = _rename(load_sae(folder), origin, training_metadata(candidate.entry, info))
    save_sae(sae, staged / name)
    _check_same(sae, load_sae(staged / name), name)
    has = {
        "how often its latents fire": stage_sparsity(folder, staged / name, sae.cfg.d_sae),
        "its result in sae-bench's layout": stage_result(folder, staged, sae, name, origin),
    }
    return [f"{what} ({name})" for what, is_there in has.items() if not is_there]


def _rename(sae: SAE, origin: Origin, known: dict[str, Any]) -> SAE:
    """The SAE with public names, what is known of its training, and decoder rows of norm 1.

    sae-bench wants these; they are kept where that would change what is selected.
    """
    norm = sae.W_dec.norm(dim=1)
    selects_by_size = sae.cfg.architecture == "topk" and (norm.max() - norm.min()) > UNIT * norm.max()
    out = sae if selects_by_size or (norm - 1).abs().max() <= UNIT else fold_decoder_norm(sae)
    metadata = out.cfg.metadata | {name: value for name, value in known.items() if name != "l0"}
    l0 = known.get("l0", out.cfg.l0)
    out.cfg = replace(out.cfg, model_name=origin.model, dataset_path=origin.dataset, l0=l0, metadata=metadata)
    return out


@torch.no_grad()
def _check_same(sae: SAE, again: SAE, name: str) -> None:
    """What is published computes what was trained."""
    x = sae.b_dec + torch.randn(8, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)).to(sae.b_dec)
    recon = sae(x)
    if not recon.isfinite().all():
        raise UserError(f"{name} gives values that are not finite: it is not published.")
    assert torch.equal(recon, again(x)), f"{name} was not staged as it is"


def _listing(staged: Path, origin: Origin) -> list[str]:
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = [f"  {path.relative_to(staged)}  {path.stat().st_size / 2**20:.2f} MiB" for path in files]
    return [f"{origin.repo}: base model {origin.base_model or 'none on the hub'}, licence {origin.license}", *sizes]
