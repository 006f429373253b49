"""A process at work on a run: it joins the session, its callbacks and the run's files until the folder is complete.

Of several processes the first alone writes and speaks for all, but for the SAEs' own files, which their owners write.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import flat
from sae_train.config.record import at_hook
from sae_train.errors import first_line
from sae_train.publishing.card import write_card
from sae_train.report import write_report
from sae_train.runs import session
from sae_train.runs.display import Display
from sae_train.runs.finisher import Finisher
from sae_train.runs.folder import describe_saes
from sae_train.runs.log import RunLog, final_figures, provenance
from sae_train.runs.looks import Looks
from sae_train.runs.process import give_back_memory
from sae_train.runs.summary import epochs_note, measured_line, summary_lines
from sae_train.runs.wandb_mirror import open_mirror
from sae_train.training import loop

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from sae_train.evals.assets import Assets
    from sae_train.protocols import Callback
    from sae_train.runs.session import Session
    from sae_train.training.learner import Learner

N_SAVED = 10


class Runner:
    """Lives as long as one process works on a run."""

    def __init__(
        self, opened: Session, folder: Path, assets: dict[str, Assets], about: dict[str, Any], display: Display,
        own: Sequence[Callback] = (),
    ):  # fmt: skip
        """`about` is what run.json says at the start: notes, the command, and, where the run was interrupted, its SAEs.

        `assets` are those of the hooks where the absorption eval is run; `own` are evals of a user's own.
        """
        known = about.get("saes") or []
        self.session, self.folder, self.settings, self.notes = opened, folder, opened.settings, about["notes"]
        self.ranks = opened.ranks
        wandb = self.settings.run.wandb if self.ranks.is_first else "disabled"
        self.files = RunLog(folder, open_mirror(wandb, self.settings, folder))
        self.display = display
        for stream in opened.streams.values():
            if stream.opened.cache:
                stream.opened.cache.say = display.say
        self.info: dict[str, Any] = {
            "settings": flat(self.settings),
            "dataset": self.settings.dataset,
            "weights": getattr(opened.first.source, "weights", None),
            "text_packages": getattr(opened.first.source, "packages", None),
            "made_from": getattr(opened.first.source, "made_from", {}),
            "command": about["command"],
            "working_folder": about.get("working_folder"),
            "activations": about.get("activations"),
            "init_from": about.get("init_from"),
            "stages": about.get("stages") or [],
            "processes": self.ranks.size,
            "passes": [[spec.name for spec in specs] for specs in opened.passes],
        } | provenance()
        self.failed = {sae["name"]: sae.get("failed") for sae in known}
        # The baselines of the SAEs that are written: those are not measured and written again.
        self.written = {sae["name"]: sae.get("baseline") or {} for sae in known if sae.get("written")}
        self.finishers = {hook: Finisher(stream, folder) for hook, stream in opened.streams.items()}
        self.assets, self.looks = assets, Looks(opened, assets, own, self._keep_absorption, display)
        self.rows: list[dict[str, Any]] = []
        self.tables: list[tuple[pd.DataFrame, pd.DataFrame]] = []

    def go(self) -> Path:
        """Train to the end, or until Ctrl-C; whatever ends the run early is raised with everything saved."""
        try:
            with self.session.stop:
                self._train()
            return self._finish()
        except BaseException as error:
            self._break_off(error)
            raise

    def _train(self) -> None:
        """Train and write the SAEs, pass by pass."""
        opened = self.session
        self.ranks.first(lambda: self.files.rewind(opened.last_steps()))
        self._write_run("running")
        for note in self.notes:
            self.display.say(note)
        self._pass()
        for number in range(opened.number + 1, len(opened.passes)):
            session.enter(opened, number)
            session.begin(opened)
            self._pass()

    def _pass(self) -> None:
        """Train the SAEs that are in memory to the end, and write them."""
        opened, n_steps = self.session, self.settings.n_steps
        targets = {spec.name: spec.l0 for spec in opened.passes[opened.number]}
        if len(opened.passes) > 1:
            self.display.say(f"pass {opened.number + 1} of {len(opened.passes)}: {', '.join(targets)}")
        self.display.begin(targets, n_steps, self.settings.train.batch_tokens)
        opened.save = self._save
        opened.save_steps = loop.every(self.settings.run.save_every or -(-n_steps // N_SAVED), n_steps)
        loop.fit(opened, self.looks.schedule(), self)
        if opened.stop.agreed and opened.step < n_steps:
            raise loop.Stopped
        self.display.end()
        with opened.stop.breaking(self.ranks.size == 1):
            self._write_saes()
        for hook, stream in opened.streams.items():
            if stream.opened.cache:
                of_hook = f" of {hook}" if hook else ""
                self.display.say(f"activations{of_hook} on disk: {stream.opened.cache.said()}")

    def _save(self) -> None:
        """Write what a resumed run starts from."""
        session.save(self.session, self.folder)
        give_back_memory()
        self.display.interrupted = f"go on with: sae-train resume {self.folder}"

    def doing(self, what: str, done: int = 0, of: int = 1) -> None:
        """Show what is being done."""
        self.display(what, done, of)

    def log(self, learner: Learner, step: int, values: dict[str, Any]) -> None:
        tokens = step * self.settings.train.batch_tokens
        row = {
            "sae": learner.name,
            "step": step,
            "tokens": tokens,
            "seconds": self.session.clock.training,
            **({"hook_name": learner.spec.hook} if learner.spec.hook else {}),
        } | values
        self.rows.append(row)
        if self.ranks.size == 1:
            self._hand_in_rows([self.rows])

    def _keep_absorption(self, *tables: pd.DataFrame) -> None:
        step = self.settings.train.batch_tokens
        self.tables.append(tuple(table.assign(tokens=table["step"] * step) for table in tables))

    def hand_in(self) -> None:
        """Bring what all processes logged at one look to the first one's files and display."""
        handed = self.ranks.gather((self.rows, self.tables))
        self.tables = []
        if not self.ranks.is_first:
            self.rows = []
            return
        kept = [tables for _, theirs in handed for tables in theirs]
        self.files.absorption.add([letters for letters, _ in kept])
        self.files.trajectory.add([words for _, words in kept])
        self._hand_in_rows([rows for rows, _ in handed])

    def _hand_in_rows(self, handed: list[list[dict[str, Any]]]) -> None:
        """Log and show rows in the grid's order."""
        self.rows = []
        order = [spec.name for spec in self.settings.specs]
        for row in sorted((row for rows in handed for row in rows), key=lambda row: order.index(row["sae"])):
            self.files.log(row)
            self.display.row(row)

    def _write_run(self, status: str, ended_by: str | None = None, alone: bool = False) -> None:
        """Write run.json; `alone` where the other processes do not come here."""
        opened = self.session
        failed, beside = dict(self.failed), {}
        own = {learner.name: learner.failed for learner in opened.own_learners}
        for theirs in [(own, self.written)] if alone else self.ranks.gather((own, self.written)):
            failed |= theirs[0]
            beside |= theirs[1]
        self.failed = failed
        if not self.ranks.is_first:
            return
        finals, language = final_figures(self.folder), opened.first.language
        self.info |= {
            "status": status,
            "ended_by": ended_by,
            "notes": self.notes,
            "model": opened.first.source.name,
            "context": language.context if language else None,
            "dtype": str(language.lm.dtype).removeprefix("torch.") if language else None,
            **self._describe_hooks(),
            "tokens": opened.step * self.settings.train.batch_tokens,
            "epochs": self._epochs,
            "seconds": opened.clock.training,
            "eval_seconds": opened.clock.paused_for,
            "saes": describe_saes(self.settings.specs, failed, finals, beside),
        }
        self.files.write_run(self.info)

    @property
    def _epochs(self) -> int:
        """How often the data began anew, at the hook that needed the most of it."""
        return max(stream.data.epoch for stream in self.session.streams.values())

    def _describe_hooks(self) -> dict[str, Any]:
        """What run.json says of the hook; of several each by its name in `hooks`, and the first in its place."""
        described = {}
        for hook, stream in self.session.streams.items():
            assets = self.assets.get(hook)
            described[stream.source.hook_name] = {
                "hook_name": stream.source.hook_name,
                "d_in": stream.source.d_in,
                "scale": stream.scale,
                "outliers": stream.outliers,
                "eval_assets": {} if assets is None else {"hash": assets.hash, **assets.settings},
            }
        first = next(iter(described.values()))
        return first if len(described) == 1 else {**first, "hook_name": ",".join(described), "hooks": described}

    def _break_off(self, error: BaseException) -> None:
        """Save what there is and say how to go on, whatever ended the run.

        Of several processes all come here together only where they were asked to stop: else the last saved state has
        to do.
        """
        opened, together = self.session, isinstance(error, loop.Stopped) or self.ranks.size == 1
        asked, lost = isinstance(error, KeyboardInterrupt), ""
        if opened.whole and together:
            try:
                self._save()
            except Exception as fault:  # a full disk, say: the state before is still there
                lost = f" (this step could not be saved: {first_line(fault)})"
        reason = "interrupted" if asked else f"{type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(OSError):  # a full disk: run.json then says what it says after a kill
            self._write_run("interrupted", reason, alone=not together)
        self.files.mirror.close()
        how = f"{'interrupted' if asked else 'ended'} at step {opened.step}{lost}"
        self.display.say(f"{how}; go on with: sae-train resume {self.folder}")
        self.display.interrupted = ""

    def _write_saes(self) -> None:
        """Write the SAEs in memory and measure their baselines.

        run.json notes each SAE once it is written, so that a run that ends here goes on with the others.
        """
        whole = loop.running(self.session.team_learners)
        finals = self.ranks.first(lambda: final_figures(self.folder))
        to_write = [learner for learner in whole if learner.name not in self.written]
        # Every process comes round as often as the one with the most to write: `_write_run` waits for all of them.
        for i in range(max(self.ranks.gather(len(to_write)))):
            for learner in to_write[i : i + 1]:
                with learner.gathered():
                    if learner.leads:
                        self._write_sae(learner, finals[learner.name])
            self._write_run("running")

    def _write_sae(self, learner: Learner, final: dict[str, Any]) -> None:
        self.display(f"writing {learner.name}")
        finisher, absorption = self.finishers[learner.spec.hook], self.looks.absorption.get(learner.spec.hook)
        self.written[learner.name] = finisher.write(learner, final, absorption)

    def _finish(self) -> Path:
        """Close run.json, present the results, and remove activations that nobody asked to keep.

        A finished run without a report was ended while it wrote one: it can be resumed.
        """
        self.ranks.first(lambda: (self.folder / "report.html").unlink(missing_ok=True))
        epochs = self._epochs
        if epochs and epochs_note(epochs) not in self.notes:
            self.notes = [*self.notes, epochs_note(epochs)]
            self.display.say(epochs_note(epochs))
        self._write_run("finished" if any(self.ranks.any(bool(self.written))) else "failed")
        self.ranks.first(self._present)
        self.ranks.first(lambda: shutil.rmtree(session.run_cache(self.folder), ignore_errors=True))
        return self.folder

    def _present(self) -> None:
        """Write the cards and the report; print the results."""
        for described in self.info["saes"]:
            if described["failed"] is None:
                hierarchy = self.info["settings"]["hierarchy"]
                measured = measured_line(described["final"], described["baseline"], hierarchy)
                info = at_hook(self.info, described.get("hook_name"))
                write_card(self.folder / "saes" / described["name"], described, info, measured)
        self.display("writing the report")
        report = write_report(self.folder)
        self.files.mirror.show()
        self.files.mirror.close()
        for line in summary_lines(self.info):
            self.display.say(line)
        self.display.say(f"report: {report}")
