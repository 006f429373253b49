"""A study at work: its parts are ordinary runs, of which the finished ones are skipped and the others gone on with."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sae_train.config import flat
from sae_train.config.record import ResumedRun, read_run
from sae_train.config.study import read_design
from sae_train.data.origin import check_unchanged
from sae_train.data.sources import kind_of
from sae_train.errors import UserError
from sae_train.publishing.reproduce import command
from sae_train.report.study_files import write_study
from sae_train.report.text import plural
from sae_train.runs.disk import disk_of, is_one_disk
from sae_train.runs.display import aside
from sae_train.runs.plan import GIB, HEADROOM, Plan, make_plan, roughly
from sae_train.runs.run import resume, start
from sae_train.runs.study_folder import (
    PLACES,
    beside,
    check_nothing_again,
    check_same,
    folder_of,
    has_ended,
    status_of,
)

if TYPE_CHECKING:
    from sae_train.config import Settings

NOTHING_LEFT = "nothing is left to train"
PAGE = 0.3  # seconds an SAE, to read its run and compare it, each time that the page is written


def plan_study(file: Path, out: Path) -> str:
    """Every part with its time, and the whole of what is left; UserError for what cannot work."""
    parts = read_design(file, out)
    plans = _check(parts, parts)
    status = {part.run.name: status_of(part) for part in parts}
    left = [part for part in parts if not has_ended(part)]
    seconds = functools.cache(lambda shape, after: sum(plans[shape].seconds(after_another=after).values()))
    times = {part.run.name: seconds(_shape(part), part is not left[0]) for part in left}
    first, n_saes = plans[_shape(parts[0])], sum(len(part.specs) for part in parts)
    others = beside(parts)
    lines = [
        f"study      {n_saes} SAEs in {len(parts)} parts, each a run in {out}",
        *next(iter(first.facts.values())).lines,  # a study is of one hook
        *first.kept(),
        *_files(plans, left),
    ]
    for part in parts:
        time, begun = times.get(part.run.name), status[part.run.name] == "begun"
        said = status[part.run.name] if time is None else f"{'begun, at most ' * begun}about {roughly(time)}"
        lines.append(f"part       {part.run.name}: {len(part.specs)} SAEs, {said}")
    lines += [f"beside     {folder.name}: finished, of another design; it is on the page" for folder in others]
    pages = PAGE * _saes_on_pages(parts, left, others)
    whole = f"about {roughly(sum(times.values()) + pages)} for {plural(len(left), 'part')} and the page after each"
    return "\n".join(
        [*lines, f"time       {f'{whole} (from the speed of matrix products just now)' if left else NOTHING_LEFT}"]
    )


def _saes_on_pages(parts: Sequence[Settings], left: Sequence[Settings], others: Sequence[Path]) -> int:
    """How many SAEs are read in all, where the page is written after every part that is left."""
    n_left = [len(part.specs) for part in left]
    there = sum(len(part.specs) for part in parts) - sum(n_left)
    there += sum(len(read_run(folder, ResumedRun).get("saes") or []) for folder in others)
    return sum(there + sum(n_left[: i + 1]) for i in range(len(n_left)))


def _files(plans: dict[tuple, Plan], left: Sequence[Settings]) -> list[str]:
    """The room that states and SAEs of the parts that are left take; UserError where it is not there."""
    if not left:
        return []
    own = [plans[_shape(part)] for part in left]
    files = sum(plan.files_bytes() - plan.state_bytes() for plan in own) + max(plan.state_bytes() for plan in own)
    cache, (where, _) = own[0].cache_bytes() - own[0].there_bytes(), disk_of(left[0])
    out, room = disk_of(left[0], cache=False)
    beside = f" beside {cache / GIB:.1f} GiB of activations" if cache and is_one_disk(where, out) else ""
    if files + (cache if beside else 0.0) > HEADROOM * room:
        raise UserError(
            f"saved states and SAEs of {plural(len(left), 'part')} take up to {files / GIB:.1f} GiB on disk{beside}, "
            f"and {str(out)!r} has {room / GIB:.1f} GiB free: name a larger disk by --out, or train fewer SAEs"
        )
    return [f"disk       {files / GIB:6.2f} GiB at most of saved states and SAEs in {out}; {room / GIB:.1f} GiB free"]


def run_study(file: Path, out: Path) -> tuple[Path, list[str], list[str]]:
    """Train what is left of a design, and write the study's page and tables, those so far after every part.

    Returns the page, its main claims as sentences, and the names of SAEs that failed. Ctrl-C ends the part at hand with
    its state saved; called again, the study goes on there.
    """
    parts = read_design(file, out)
    with aside() as display:
        display("looking at the model and its text")
        left = [part for part in parts if not has_ended(part)]
        _files(_check(parts, left), left)
    out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts, start=1):
        status = status_of(part) if has_ended(part) else "training"
        print(f"part {number} of {len(parts)}, {part.run.name}: {status}", flush=True)
        if status == "training":
            _train(part, file, others=[*(folder_of(other) for other in parts if other is not part), *beside(parts)])
            _write_so_far(parts, out)
    with aside() as display:
        display.interrupted = "all SAEs are trained: the same command writes it"
        display("comparing SAEs and writing the page")
        page, claims = write_study([*map(folder_of, parts), *beside(parts)], out)
    return page, claims, list(_failed(parts))


def _write_so_far(parts: Sequence[Settings], out: Path) -> None:
    """Write the page of the parts that have ended, unless that is all of them or nothing can be compared yet."""
    there = [has_ended(part) for part in parts]
    if not all(there):
        with suppress(UserError), aside() as display:
            display.interrupted = "all that was trained is kept: the same command goes on"
            display(f"writing the page of the {sum(there)} parts so far")
            ended = [folder_of(part) for part, is_there in zip(parts, there, strict=True) if is_there]
            missing = [part.run.name for part, is_there in zip(parts, there, strict=True) if not is_there]
            write_study([*ended, *beside(parts)], out, missing)


def _check(parts: Sequence[Settings], to_plan: Sequence[Settings]) -> dict[tuple, Plan]:
    """A plan of each shape of part; UserError for one that cannot work, and for a part begun as something else."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study runs in one process: start it without torchrun or accelerate")
    for part in parts:
        check_same(part)
    check_nothing_again(parts)
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


def _train(part: Settings, file: Path, others: Sequence[Path]) -> None:
    """Begin a part, or go on with it; where none of its SAEs can be finished the study goes on without them.

    UserError where the model or the text is not the one that the runs in the folders `others` were trained on.
    """
    folder = folder_of(part)
    begun = [other for other in others if other.exists()]

    def as_the_others(made_from: dict[str, Any]) -> None:
        for other in begun:
            info, said = read_run(other, ResumedRun), f"{other.name} was trained, and a study is of one text and model"
            check_unchanged(info, made_from, since=said, instead="give the study another --out")

    try:
        if folder.exists():
            settings = flat(part)  # of which a part that was begun takes up what says where
            where = {name: settings[name] for name in (*PLACES, "save_every") if settings[name] is not None}
            resume(folder, trust_remote_code=part.lm.trust_remote_code, where=where)
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
        for sae in read_run(folder_of(part), ResumedRun).get("saes") or []:
            if sae.get("failed"):
                yield f"{sae['name']} ({sae['failed']})"
