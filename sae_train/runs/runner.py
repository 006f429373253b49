"""A process at work on a run: it joins the session, its callbacks and the run's files until the folder is complete.

Of several processes the first alone writes and speaks for all, but for the SAEs' own files, which their owners write.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import flat
from sae_train.errors import first_line
from sae_train.evals import fidelity
from sae_train.evals.presets import get_preset
from sae_train.publishing.card import write_card
from sae_train.report import write_report
from sae_train.runs import callbacks, session
from sae_train.runs.display import Display
from sae_train.runs.finisher import Finisher
from sae_train.runs.folder import describe_saes
from sae_train.runs.log import RunLog, final_figures, provenance
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

N_LOGGED = 100
N_SAVED = 10


class Runner:
    """Lives as long as one process works on a run."""

    def __init__(
        self, opened: Session, folder: Path, assets: Assets | None, about: dict[str, Any], display: Display,
        own: Sequence[Callback] = (),
    ):  # fmt: skip
        """`about` is what run.json says at the start: notes, the command, and, where the run was interrupted, its SAEs.

        `own` are evals of a user's own.
        """
        known, self.own = about.get("saes") or [], [*opened.opened.callbacks, *map(callbacks.check_callback, own)]
        self.session, self.folder, self.settings, self.notes = opened, folder, opened.settings, about["notes"]
        self.ranks = opened.ranks
        wandb = self.settings.run.wandb if self.ranks.is_first else "disabled"
        self.files = RunLog(folder, open_mirror(wandb, self.settings, folder))
        self.display = display
        self.info: dict[str, Any] = {
            "settings": flat(self.settings),
            "dataset": self.settings.dataset,
            "weights": getattr(opened.source, "weights", None),
            "text_packages": getattr(opened.source, "packages", None),
            "made_from": getattr(opened.source, "made_from", {}),
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
        self.finisher = Finisher(opened, folder)
        self.assets = assets
        self.absorption: callbacks.Absorption | None = None
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
        loop.fit(opened, self._callbacks(), self)
        if opened.stop.agreed and opened.step < n_steps:
            raise loop.Stopped
        self.display.end()
        with opened.stop.breaking(self.ranks.size == 1):
            self._write_saes()
        if opened.opened.cache:
            self.display.say(f"activations on disk: {opened.opened.cache.said()}")

    def _save(self) -> None:
        """Write what a resumed run starts from."""
        session.save(self.session, self.folder)
        self.display.interrupted = f"go on with: sae-train resume {self.folder}"

    def doing(self, what: str, done: int = 0, of: int = 1) -> None:
        """Show what is being done."""
        self.display(what, done, of)

    def _callbacks(self) -> list[loop.Scheduled]:
        """Training figures often; held-out figures, loss recovered and absorption at the same, fewer steps."""
        opened, settings, n_steps = self.session, self.settings, self.settings.n_steps
        looks = loop.spread(settings.eval.absorption_evals, n_steps)
        often = loop.every(settings.run.log_every or -(-n_steps // N_LOGGED), n_steps)
        if not opened.owned:
            return [loop.Scheduled(lambda learner, step: (), often | looks)]
        figures = callbacks.TrainingFigures(opened.clock, settings.train.batch_tokens, opened.step)
        held_out = callbacks.HeldOut(opened.normalise(opened.held_out), opened.held_out * opened.scale)
        made = [
            loop.Scheduled(figures, often | looks),
            loop.Scheduled(held_out, looks),
            *(loop.Scheduled(look, looks) for look in self._evals()),
        ]
        if self.assets is not None:
            self.absorption = callbacks.Absorption(
                opened.language.lm, self.assets, settings.eval, opened.export, n_steps, self._keep_absorption,
                held_out.l0_of, self.display,
            )  # fmt: skip
            # Where too few letters can be read off the model itself, one look records that; more would say the same.
            readable = int(self.assets.letters_that_count.sum()) >= self.assets.n_needed(
                get_preset(settings.eval.preset)
            )
            made.append(loop.Scheduled(self.absorption, looks if readable else frozenset({n_steps})))
        return made

    def _evals(self) -> list[loop.Look]:
        """Loss recovered where there is a language model, what the source can be asked, and evals of a user's own."""
        opened = self.session
        asked: list[loop.Look] = [callbacks.Own(each, opened.export) for each in self.own]
        if opened.language:
            lm = opened.language.lm
            asked.insert(0, callbacks.Fidelity(lm, self._fidelity_data, opened.export, opened.own_learners))
        return asked

    @functools.cached_property
    def _fidelity_data(self) -> fidelity.FidelityData:
        """The passes of the language model that all SAEs share."""
        language = self.session.language
        rows = language.rows[: max(1, fidelity.FIDELITY_TOKENS // language.context)]
        return fidelity.FidelityData.build(language.lm, rows, language.drop_ids)

    def log(self, learner: Learner, step: int, values: dict[str, Any]) -> None:
        tokens = step * self.settings.train.batch_tokens
        row = {
            "sae": learner.name,
            "step": step,
            "tokens": tokens,
            "seconds": self.session.clock.training,
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
        finals = final_figures(self.folder)
        self.info |= {
            "status": status,
            "ended_by": ended_by,
            "notes": self.notes,
            "model": opened.source.name,
            "hook_name": opened.source.hook_name,
            "d_in": opened.source.d_in,
            "context": opened.language.context if opened.language else None,
            "dtype": str(opened.language.lm.dtype).removeprefix("torch.") if opened.language else None,
            "scale": opened.scale,
            "outliers": opened.outliers,
            "tokens": opened.step * self.settings.train.batch_tokens,
            "epochs": opened.data.epoch,
            "seconds": opened.clock.training,
            "eval_seconds": opened.clock.paused_for,
            "eval_assets": {} if self.assets is None else {"hash": self.assets.hash, **self.assets.settings},
            "saes": describe_saes(self.settings.specs, failed, finals, beside),
        }
        self.files.write_run(self.info)

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
        self._write_run("interrupted", reason, alone=not together)
        self.files.mirror.close()
        how = f"{'interrupted' if asked else 'ended'} at step {opened.step}{lost}"
        self.display.say(f"{how}; go on with: sae-train resume {self.folder}")
        self.display.interrupted = ""

    def _write_saes(self) -> None:
        """Write the SAEs in memory and measure their baselines.

        run.json notes each SAE once it is written, so that a run that ends here goes on with the others.
        """
        whole = loop.running(self.session.own_learners)
        finals = self.ranks.first(lambda: final_figures(self.folder))
        to_write = [learner for learner in whole if learner.name not in self.written]
        # Every process comes round as often as the one with the most to write: `_write_run` waits for all of them.
        for i in range(max(self.ranks.gather(len(to_write)))):
            for learner in to_write[i : i + 1]:
                self.display(f"writing {learner.name}")
                self.written[learner.name] = self.finisher.write(learner, finals[learner.name], self.absorption)
            self._write_run("running")

    def _finish(self) -> Path:
        """Close run.json, present the results, and remove activations that nobody asked to keep.

        A finished run without a report was ended while it wrote one: it can be resumed.
        """
        self.ranks.first(lambda: (self.folder / "report.html").unlink(missing_ok=True))
        epochs = self.session.data.epoch
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
                measured = measured_line(described["final"], described["baseline"].get("random"), hierarchy)
                write_card(self.folder / "saes" / described["name"], described, self.info, measured)
        self.display("writing the report")
        report = write_report(self.folder)
        self.files.mirror.show()
        self.files.mirror.close()
        for line in summary_lines(self.info):
            self.display.say(line)
        self.display.say(f"report: {report}")
