"""A study at work: its parts are ordinary runs, of which the finished ones are skipped and the others gone on with."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sae_train.config import flat, leaves
from sae_train.config.record import ResumedRun, read_run
from sae_train.config.study import read_design
from sae_train.data.origin import check_unchanged
from sae_train.data.sources import kind_of
from sae_train.errors import UserError
from sae_train.publishing.reproduce import command
from sae_train.report.study_files import write_study
from sae_train.runs.display import aside
from sae_train.runs.plan import Plan, make_plan, roughly
from sae_train.runs.run import resume, start

if TYPE_CHECKING:
    from sae_train.config import Settings

ENDED = ("finished", "failed")
FREE = ("device", "activation_cache", "eval_cache", "trust_remote_code")  # where and how, not what


def plan_study(file: Path, out: Path) -> str:
    """Every part with its time, and the whole of what is left; UserError for what cannot work."""
    parts = read_design(file, out)
    plans = _check(parts, parts)
    left = [part for part in parts if not _ended(part)]
    seconds = functools.cache(lambda shape, after: sum(plans[shape].seconds(after_another=after).values()))
    times = {part.run.name: seconds(_shape(part), part is not parts[0]) for part in left}
    first, n_saes = plans[_shape(parts[0])], sum(len(part.specs) for part in parts)
    lines = [
        f"study      {n_saes} SAEs in {len(parts)} parts, each a run in {out}",
        *next(iter(first.facts.values())).lines,  # a study is of one hook
        *first.kept(),
    ]
    for part in parts:
        time = times.get(part.run.name)
        said = "finished" if time is None else f"about {roughly(time)}"
        lines.append(f"part       {part.run.name}: {len(part.specs)} SAEs, {said}")
    whole = f"about {roughly(sum(times.values()))} for {len(left)} parts (from the speed of matrix products just now)"
    return "\n".join([*lines, f"time       {whole if left else 'nothing is left to train'}"])


def run_study(file: Path, out: Path) -> tuple[Path, list[str], list[str]]:
    """Train what is left of a design, and write the study's page and tables, those so far after every part.

    Returns the page, its main claims as sentences, and the names of SAEs that failed. Ctrl-C ends the part at hand with
    its state saved; called again, the study goes on there.
    """
    parts = read_design(file, out)
    with aside() as display:
        display("looking at the model and its text")
        _check(parts, [part for part in parts if not _ended(part)])
    out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, start=1):
        ended = _ended(part)
        print(f"part {number} of {len(parts)}, {part.run.name}: {'finished' if ended else 'training'}", flush=True)
        if not ended:
            _train(part, file, others=[other for other in parts if other is not part])
            _write_so_far(parts, out)
    print("comparing SAEs and writing the page", flush=True)
    page, claims = write_study([_folder(part) for part in parts], out)
    return page, claims, list(_failed(parts))


def _write_so_far(parts: Sequence[Settings], out: Path) -> None:
    """Write the page of the parts that have ended, unless that is all of them or nothing can be compared yet."""
    there = [_ended(part) for part in parts]
    if not all(there):
        print(f"writing the page of the {sum(there)} parts so far", flush=True)
        with suppress(UserError):
            ended = [_folder(part) for part, has_ended in zip(parts, there, strict=True) if has_ended]
            missing = [part.run.name for part, has_ended in zip(parts, there, strict=True) if not has_ended]
            write_study(ended, out, missing)


def _check(parts: Sequence[Settings], to_plan: Sequence[Settings]) -> dict[tuple, Plan]:
    """A plan of each shape of part; UserError for one that cannot work, and for a part begun as something else."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study runs in one process: start it without torchrun or accelerate")
    for part in parts:
        _check_same(part)
    kind = kind_of(parts[0])
    facts = functools.cache(lambda device: kind.describe(parts[0], device))  # model and text are looked up once for all
    shared = SimpleNamespace(problems=kind.problems, describe=lambda _, device: facts(device))
    plans = {shape: make_plan(part, shared) for shape, part in {_shape(part): part for part in to_plan}.items()}
    for plan in plans.values():
        plan.check()
    return plans


def _shape(part: Settings) -> tuple:
    """What parts have in common that take the same time."""
    return part.sae.arch, part.sae.width, part.sae.l0


def _folder(part: Settings) -> Path:
    return Path(part.run.out, part.run.name or "")


def _ended(part: Settings) -> bool:
    folder = _folder(part)
    if not folder.exists():
        return False
    status = read_run(folder, ResumedRun).get("status")
    return status == "failed" or (status == "finished" and (folder / "report.html").exists())


def _check_same(part: Settings) -> None:
    """UserError where a part's folder holds a run with other settings."""
    folder = _folder(part)
    if not folder.exists():
        return
    begun, group_of = read_run(folder, ResumedRun)["settings"], leaves()
    free = {*FREE, *(name for name in group_of if group_of[name] == "run")}
    if part.lm.dtype == "auto":
        free.add("dtype")
    other = [name for name, value in flat(part).items() if name not in free and begun.get(name) != value]
    if other:
        raise UserError(
            f"{str(folder)!r} was made with other settings ({', '.join(other)}): give the study another --out, or "
            "remove that folder"
        )


def _train(part: Settings, file: Path, others: Sequence[Settings]) -> None:
    """Begin a part, or go on with it; where none of its SAEs can be finished the study goes on without them.

    UserError where the model or the text is not the one that an `other` part was trained on.
    """
    folder = _folder(part)
    begun = [other for other in map(_folder, others) if other.exists()]

    def as_the_others(made_from: dict[str, Any]) -> None:
        for other in begun:
            info, said = read_run(other, ResumedRun), f"{other.name} was trained, and a study is of one text and model"
            check_unchanged(info, made_from, since=said, instead="give the study another --out")

    try:
        if folder.exists():
            resume(folder, trust_remote_code=part.lm.trust_remote_code)
        else:
            start(part, command=command(flat(part)), check=as_the_others)
    except UserError:
        if not folder.exists() or read_run(folder, ResumedRun).get("status") != "failed":
            raise
    except KeyboardInterrupt:
        print(f"the study stops here; go on with: sae-train study --config {file} --out {part.run.out}", flush=True)
        raise


def _failed(parts: Sequence[Settings]) -> Iterator[str]:
    """SAEs of finished parts that ended early, with the reason."""
    for part in parts:
        for sae in read_run(_folder(part), ResumedRun).get("saes") or []:
            if sae.get("failed"):
                yield f"{sae['name']} ({sae['failed']})"
