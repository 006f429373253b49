"""`sae-train eval`: the absorption eval of a finished SAE, whoever made it, with its baselines and its page."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import Settings, resolve
from sae_train.errors import UserError
from sae_train.files import write_json, write_parquet
from sae_train.interrupts import interrupts_wait
from sae_train.runs.folder import find_model

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sae_train.data.language_model import LanguageModel
    from sae_train.evals.absorption import AbsorptionResult
    from sae_train.evals.assets import Assets
    from sae_train.runs.display import Display
    from sae_train.runs.suite import Suite
    from sae_train.sae.model import SAE


def evaluate_checkpoint(
    checkpoint: Path, given: dict[str, Any], out: Path | None = None, folder: str | None = None,
    allow_pickle: bool = False, suite: Suite | None = None,
) -> AbsorptionResult:  # fmt: skip
    """Run the absorption eval on a saved SAE with its baselines and interventions; print and write what it says.

    The SAE is a local folder's or, with a repo's name and a `folder` in it, the hub's, which needs `out`.
    `given` holds settings by flag name; the model and the hook default to what the checkpoint says. Written are
    absorption.json (SAEBench's layout), absorption.parquet, interventions.parquet and absorption.html. `suite` names
    evals of sae-bench that follow.
    """
    with interrupts_wait():
        from sae_train.runs.display import Display
        from sae_train.runs.process import prepare_process
        from sae_train.sae.files import load_sae
        from sae_train.training.ranks import current

    prepare_process()
    if current().size > 1:
        raise UserError("sae-train eval is the work of one process: start it without torchrun")
    with Display() as display:
        display(f"reading the SAE of {checkpoint}")
        sae = load_sae(checkpoint, folder, allow_pickle=allow_pickle)
        checkpoint = Path(checkpoint, folder or "")
        if out is None and not checkpoint.is_dir():
            raise UserError(f"{checkpoint} is on the hub: name by --out a folder for what is written")
        settings = resolve(_add_origin(given, sae, checkpoint))
        return _evaluate(sae, checkpoint, settings, given, Path(out or checkpoint), display, suite)


def _evaluate(
    sae: SAE, checkpoint: Path, settings: Settings, given: dict[str, Any], out: Path, display: Display,
    suite: Suite | None,
) -> AbsorptionResult:  # fmt: skip
    with interrupts_wait():
        from sae_train.data.sources import kind_of
        from sae_train.evals import absorption, baselines
        from sae_train.evals.interventions import interventions
        from sae_train.evals.latents import encode
        from sae_train.runs.callbacks import build_assets
        from sae_train.runs.corpus import check_asked, corpus_activations
        from sae_train.runs.suite import run_suite
        from sae_train.runs.summary import absorption_line
        from sae_train.sae.files import SPARSITY, save_sparsity
        from sae_train.training.ranks import choose_device

    check_asked(settings, given)
    display(f"loading {settings.lm.model}")
    lm = kind_of(settings).language_model(settings, choose_device(settings.lm.device))
    own_notes = _fit_model(lm, sae, checkpoint)
    built, notes = build_assets(lm, settings.eval, display)
    if built is None:
        raise UserError(" ".join(notes))
    sae, built = sae.to(lm.device), built.to(lm.device)
    how = settings.eval
    result = absorption.evaluate(sae, built, preset=how.preset, seed=how.eval_seed, lm=lm, progress=display)
    write = functools.partial(_write_evaluation, result, sae, built, lm, checkpoint, out)
    written, beside = write({}, None), {}  # before what may fail yet
    if result.valid:
        display("reading text for the random SAEs")
        text, source = corpus_activations(lm, sae, checkpoint, settings, given)
        own_notes.append(_fitted_note(text, source))
        if text is not None and not (out / SPARSITY).exists():  # the SAE's maker may have counted on more text
            own_notes.append(f"written: {save_sparsity(encode(sae, text).frequency(), out)}")
        beside = baselines.all_scores(sae, text, built, result, lm, display)
    for line in [*own_notes, *notes, absorption_line(result.metrics(), beside, how.hierarchy)]:
        display.say(line)
    changes = None
    if result.valid:
        display("trying interventions")
        changes = interventions(sae, lm, built, result, seed=result.seed)
        written = write(beside, changes)
    if suite:
        try:
            run_suite(suite, sae, lm, checkpoint, settings, given, out, display)
        finally:
            written = write(beside, changes)  # what was done stands on the page
    display.say(f"written: {', '.join(map(str, written))}")
    return result


def _fitted_note(text: Tensor | None, source: str) -> str:
    """Say what the random SAEs are fitted on: `source` names the text, or says why there is none."""
    if text is None:
        return f"the random SAEs are fitted on the eval's words ({source}): --dataset names a text to fit them on"
    return f"the random SAEs are fitted on {len(text):,} held-out activations of {source}"


def _fit_model(lm: LanguageModel, sae: SAE, checkpoint: Path) -> list[str]:
    """Let the model begin its prompts as the SAE's texts began; UserError if the two are of different widths."""
    if lm.d_in != sae.cfg.d_in:
        raise UserError(
            f"the SAE in {str(checkpoint)!r} takes {sae.cfg.d_in} values a token and {lm.hook_name} of {lm.name} "
            f"has {lm.d_in}: name the --model and --hook that it was trained on"
        )
    if sae.cfg.prepend_bos or lm.bos_id is None:
        return []
    lm.bos_id = None
    return ["the eval's prompts have no BOS token, as the texts that the SAE was trained on had none"]


def _write_evaluation(
    result: AbsorptionResult, sae: SAE, built: Assets, lm: LanguageModel, checkpoint: Path, out: Path,
    beside: dict[str, dict], changes: pd.DataFrame | None,
) -> list[Path]:  # fmt: skip
    from sae_train.report import write_eval_page
    from sae_train.report.suite import read_record, suite_tables
    from sae_train.runs.suite import identity_of

    out.mkdir(parents=True, exist_ok=True)
    about = {
        "SAE": str(checkpoint), "model": lm.name, "hook": lm.hook_name, "preset": result.preset,
        "hierarchy": built.settings["hierarchy"], "seed": str(result.seed), "assets": result.asset_hash,
    }  # fmt: skip
    paths = [out / name for name in ("absorption.json", "absorption.parquet", "interventions.parquet")]
    write_json(paths[0], result.to_saebench_json(beside, sae_cfg_dict=asdict(sae.cfg)))
    write_parquet(paths[1], result.table(checkpoint.name, step=-1, with_words=True))
    if changes is not None and len(changes):
        write_parquet(paths[2], changes)
    else:
        paths[2].unlink(missing_ok=True)
    suite = suite_tables(out, identity_of(sae)) if read_record(out) else []
    paths.append(write_eval_page(result, beside, changes, about, out / "absorption.html", suite))
    return [path for path in paths if path.exists()]


def _add_origin(given: dict[str, Any], sae: SAE, checkpoint: Path) -> dict[str, Any]:
    """Fill in model and hook from the checkpoint; UserError if neither it nor the caller names them."""
    known = {"model": find_model(sae.cfg.model_name, checkpoint) or None, "hook": sae.cfg.hook_name or None}
    merged = known | {key: value for key, value in given.items() if value is not None}
    missing = [f"--{key}" for key in known if not merged[key]]
    if missing:
        raise UserError(
            f"the checkpoint {str(checkpoint)!r} does not say what it was trained on: give {', '.join(missing)}"
        )
    return merged
