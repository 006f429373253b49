"""Is the absorption metric right? Its scores on a language model, held against exact ablation, word by word.

    python benchmarks/metric_ablation.py --each 16 checkpoints/miniature-width checkpoints/miniature-l0
    python benchmarks/metric_ablation.py --eval-words 3000 --rows 300 --name smollm2 RUN/saes/topk-4k-l0_50

An SAE or a whole run is named by its folder; all must be of one model and hook. On a sample of true positives, the same
for all SAEs, the model's answer is asked again with the word's activation changed: without the latent that carries most
of the letter by projection, without a random latent of that size, without the main latents, and with the letter erased
(all that varies with the probe's readings). What a latent's removal takes, as a share of what erasing the letter takes,
is the truth here. --each also takes out every latent alone, so many a word at most, which gives the causal score.

It prints Markdown and writes benchmarks/results/metric_ablation_NAME.csv, the words on which projection and ablation
disagree most to metric_ablation_NAME_words.csv.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import agreement as ag
import pandas as pd
import torch
from ablation_tables import (
    COUNTS,
    OWED,
    OWED_CURVE,
    disagreements,
    markdown,
    mean_nulls,
    summary,
    thresholds,
    words_table,
)

from sae_train.config import resolve
from sae_train.config.record import read_run
from sae_train.errors import UserError
from sae_train.evals import causal
from sae_train.evals.absorption import Evaluation
from sae_train.evals.causal_rate import prompts_of
from sae_train.evals.contexts import show_nothing
from sae_train.evals.presets import SAEBENCH
from sae_train.evals.ranking import rank_latents
from sae_train.evals.scoring import score_entries, unit
from sae_train.runs.display import aside
from sae_train.runs.folder import run_of
from sae_train.sae.files import load_sae
from sae_train.speller.proofs import eraser

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_train.evals.assets import Assets
    from sae_train.evals.contexts import Progress
    from sae_train.protocols import SAE, LanguageModel

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_EFFECT = 1.0  # logits that erasing the letter takes, for a word to say anything
CURVES = {
    "full_cos": ("full", (0.0, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4)),
    "absorbed_share": ("full", (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)),
    "absorber_cos": ("fraction", (0.0, 0.025, 0.05, 0.1, 0.2, 0.3)),
}


@dataclass(frozen=True)
class Bench:
    """The model, its words, and the sample of true positives that is asked about."""

    lm: LanguageModel
    assets: Assets
    rows: Int[Tensor, " n"]
    clean: Float[Tensor, " n"]
    erased: Float[Tensor, " n"]
    """change of the margin when the letter is erased"""

    @property
    def prompts(self) -> causal.Prompts:
        return prompts_of(self.assets).subset(self.rows)

    def changes(self, deltas: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
        """Change of the margin when something is added to the word; words to which nothing is added are not asked."""
        asked = (deltas.norm(dim=1) > 0).nonzero().squeeze(1)
        out = torch.zeros(len(deltas))
        if len(asked):
            out[asked] = causal.margins(self.lm, self.prompts, asked, deltas[asked]).float() - self.clean[asked]
        return out


def main() -> None:
    args = _arguments()
    folders = [sae for path in args.saes for sae in find_saes(path)]
    with aside() as display:
        display.interrupted = "the SAEs before are written"
        words, table = ask_of_all(folders, args, display)
    print(f"\n{markdown(table)}\n\n{words_table(disagreements(words))}")


def ask_of_all(folders: list[Path], args: argparse.Namespace, tell: Progress) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ask about each SAE, and write the files anew after it; return its words and the table of figures."""
    tell("setting up the sample")
    bench = make_bench(folders[0], args.eval_words, args.rows, tell)
    words, curves, nulls = [], [], []
    for n_done, folder in enumerate(folders):
        tell("asking about SAEs", n_done, len(folders))
        asked = Asked(bench, load_sae(folder), args.each)
        about = {"sae": f"{folder.parent.parent.name}/{folder.name}"}
        words.append(asked.words().assign(**about))
        curves.append(asked.curves().assign(**about))
        nulls.append(recorded_nulls(folder) | asked.random_directions())
        table = write(args.out, args.name, pd.concat(words, ignore_index=True), pd.concat(curves), nulls)
    return pd.concat(words, ignore_index=True), table


def write(
    out: Path, name: str, words: pd.DataFrame, curves: pd.DataFrame, nulls: list[dict[str, float]]
) -> pd.DataFrame:
    """Write both files, after each SAE anew, so that what was asked is kept; return the table of figures."""
    table = pd.DataFrame([*summary(words), *thresholds(curves), *mean_nulls(nulls)])
    table.insert(0, "saes", words["sae"].nunique())
    table.insert(1, "words", len(words))
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / f"metric_ablation_{name}.csv", index=False, float_format="%.4f")
    disagreements(words).to_csv(out / f"metric_ablation_{name}_words.csv", index=False, float_format="%.3f")
    return table


def find_saes(path: Path) -> list[Path]:
    """The SAE in a folder, or all of a run."""
    found = [path] if (path / "cfg.json").is_file() else sorted(f.parent for f in path.glob("saes/*/cfg.json"))
    if not found:
        raise UserError(f"{str(path)!r} is neither an SAE's folder nor a run's")
    return found


def make_bench(
    folder: Path, eval_words: int | None, n_rows: int, tell: Progress = show_nothing, seed: int = 0
) -> Bench:
    from sae_train.data.sources import kind_of
    from sae_train.runs.callbacks import build_assets
    from sae_train.training.ranks import choose_device

    run = run_of(folder)
    if run is None:
        raise UserError(f"{str(folder)!r} does not lie in its run's folder, which says of which model it is")
    settings = resolve(read_run(run)["settings"] | ({"eval_words": eval_words} if eval_words else {}))
    lm = kind_of(settings).language_model(settings, choose_device("cpu"))
    assets, notes = build_assets(lm, settings.eval, tell)
    if assets is None or not len(assets.answer_ids):
        raise UserError(f"the model cannot be asked for letters: {' '.join(notes)}")
    counted = assets.letters_that_count[assets.tp_labels].nonzero().squeeze(1)
    drawn = torch.randperm(len(counted), generator=torch.Generator().manual_seed(seed))[:n_rows].sort().values
    rows = counted[drawn]
    erase = eraser(assets.probe_weight.T.float(), assets.x[~assets.is_test].float())
    x = assets.tp_x[rows].float()
    prompts = prompts_of(assets).subset(rows)
    clean = causal.margins(lm, prompts, torch.arange(len(rows)), None).float()
    without = causal.margins(lm, prompts, torch.arange(len(rows)), erase(x) - x).float()
    return Bench(lm, assets, rows, clean, without - clean)


class Asked:
    """One SAE's scores on the sample, and what the model's answer owes to its latents."""

    def __init__(self, bench: Bench, sae: SAE, each: int, seed: int = 0):
        self.bench, self.each, a = bench, each, bench.assets
        self.sae, self.e = sae, Evaluation(sae, a, SAEBENCH, seed, None)
        self.latents = self.e.encode()
        ranking, _ = rank_latents(self.latents.train, a.labels[~a.is_test], self.e.n_labels, SAEBENCH, seed)
        self.chosen = self.e.probe_latents(self.latents, ranking)
        s = self.scored = self.e.score(self.latents, self.chosen.is_main(self.latents.tp.d_sae))
        rows = bench.rows
        self.acts, self.columns, self.cos, self.is_main = s.acts[rows], s.columns[rows], s.cos[rows], s.is_main[rows]
        self.proj = self.acts * self.cos * self.e.W_dec.norm(dim=1)[self.columns]
        other = torch.where(self.is_main | (self.acts <= 0), -torch.inf, self.proj)
        self.best, self.entry = other.max(1)
        self.share = self.best.clamp(min=0) / s.a[rows]
        self.ask(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def ask(self, generator: torch.Generator) -> None:
        """Shares of the letter's effect: of the absorber, of a random latent at its size, of all main latents, and of
        the other latent that has most."""
        W_dec, entry = self.e.W_dec, self.entry[:, None]
        there = (self.best > 0)[:, None]
        absorber = self.columns.gather(1, entry)
        removed = torch.where(there, self.acts.gather(1, entry) * W_dec[absorber.squeeze(1)], 0.0)
        exclude = self.is_main | (self.columns == absorber)
        control = causal.matched_controls(self.acts, self.columns, W_dec, exclude, removed, generator)
        mains = (torch.where(self.is_main, self.acts, 0.0)[..., None] * W_dec[self.columns]).sum(1)
        self.effect, self.control, self.mains = (
            self.bench.changes(-delta) / self.bench.erased for delta in (removed, control, mains)
        )
        self.most, self.effects = self.effect, None
        if self.each:
            acts, columns = self.acts, self.columns
            self.effects = causal.exact_attributions(
                self.bench.lm, self.bench.prompts, acts, columns, W_dec, self.each
            ).float()
            shares = torch.where(self.is_main | (acts <= 0), -torch.inf, self.effects / self.bench.erased[:, None])
            self.most = torch.maximum(shares.max(1).values, self.effect)

    @property
    def counted(self) -> Bool[Tensor, " n"]:
        """Words on which erasing the letter takes enough from the answer."""
        return self.bench.erased <= -LEAST_EFFECT

    def absorbed(self, owed: float = OWED) -> Bool[Tensor, " n"]:
        """The answer owes its share to one other latent, and less to the main latents together."""
        return (self.most >= owed) & (self.mains < self.most)

    def causal_flags(self) -> Bool[Tensor, " n"]:
        """As arXiv 2409.14507 decides, by the exact effect of each latent."""
        if self.effects is None:
            return torch.zeros_like(self.counted)
        a, rows = self.bench.assets, self.bench.rows
        flag, *_ = causal.absorbed(self.effects, self.cos, SAEBENCH.min_margin, SAEBENCH.full_cos)
        place = (a.is_test.cumsum(0) - 1)[a.tp_rows[rows]]
        missed = self.chosen.logits[place, a.tp_labels[rows]] <= 0
        return flag & missed & (self.scored.scores.main_act[rows] < SAEBENCH.silent_below)

    def words(self) -> pd.DataFrame:
        """One row a word that says something."""
        a, rows, s = self.bench.assets, self.bench.rows, self.scored
        columns = {
            "full": s.scores.full[rows], "fraction": s.scores.fraction[rows], "full_family": s.family.full[rows],
            "fraction_family": s.family.fraction[rows], "causal": self.causal_flags(),
            "silent": ~(self.is_main & (self.acts > 0)).any(1), "label": a.tp_labels[rows],
            "absorber": self.columns.gather(1, self.entry[:, None]).squeeze(1),
            "cos": self.cos.gather(1, self.entry[:, None]).squeeze(1), "share": self.share, "effect": self.effect,
            "control": self.control, "mains": self.mains, "most": self.most, "letter": -self.bench.erased,
            "gap": torch.minimum(self.most.clamp(0, 1), 1 - self.mains.clamp(0, 1)),
            **{f"absorbed_{owed}": self.absorbed(owed) for owed in OWED_CURVE},
        }  # fmt: skip
        table = pd.DataFrame({name: value.double().numpy() for name, value in columns.items()})
        return table.assign(word=[a.words[r] for r in a.tp_rows[rows].tolist()])[self.counted.numpy()]

    def curves(self) -> pd.DataFrame:
        """Alarms against the truth by label, as each threshold moves alone."""
        rows, found = self.bench.rows, []
        labels, truth, kept = self.bench.assets.tp_labels[rows], self.absorbed(), self.counted
        for name, (score, values) in CURVES.items():
            for value in values:
                preset = replace(SAEBENCH, **{name: value})
                s = score_entries(self.acts, self.proj, self.cos, self.is_main, self.scored.a[rows], preset)
                flag = s.full if score == "full" else s.fraction >= 0.5
                sums = ag.cluster_sums(ag.hits(flag, truth)[kept], torch.zeros_like(labels[kept]), labels[kept])[0]
                found += [(name, value, label, *counts) for label, counts in enumerate(sums.tolist())]
        return pd.DataFrame(found, columns=["threshold", "value", "label", *COUNTS])

    @torch.no_grad()
    def random_directions(self) -> dict[str, float]:
        """How often a random direction in the probe's place calls a word full, and how often the answer owes its letter
        to the latent that it then names."""
        bench, g = self.bench, torch.Generator().manual_seed(1)
        labels = bench.assets.tp_labels[bench.rows]
        directions = unit(torch.randn(bench.assets.probe_weight.T.shape, generator=g))[labels]
        cos = (unit(self.e.W_dec)[self.columns] * directions[:, None]).sum(-1)
        proj = self.acts * cos * self.e.W_dec.norm(dim=1)[self.columns]
        a = (bench.assets.tp_x[bench.rows].float() * directions).sum(1)
        full = score_entries(self.acts, proj, cos, self.is_main, a, SAEBENCH).full & self.counted
        entry = proj.argmax(1, keepdim=True)
        removed = self.acts.gather(1, entry) * self.e.W_dec[self.columns.gather(1, entry).squeeze(1)]
        owed = bench.changes(torch.where(full[:, None], -removed, 0.0)) / bench.erased
        return {
            "full by random directions, these words": float(full[self.counted].double().mean()),
            "of those, the latent that is named owed the letter": float((owed[full] >= OWED).double().mean()),
        }


def recorded_nulls(folder: Path) -> dict[str, float]:
    """Scores that the SAE's run measured at its end, on all words: its own, and those of every null."""
    run = run_of(folder)
    sae = next(sae for sae in read_run(run)["saes"] if sae["name"] == folder.name) if run else {}
    found = {"own": {k.removeprefix("absorption/"): v for k, v in sae.get("final", {}).items()}, **sae["baseline"]}
    return {
        f"{score}, {name.replace('_', ' ')}": found[name].get(f"mean_{score}")
        for name in ("own", "random", "shuffled_labels", "random_directions")
        for score in ("full", "fraction")
        if found.get(name)
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="+", type=Path, metavar="SAE", help="folders of SAEs or of runs")
    parser.add_argument("--rows", type=int, default=300, help="true positives that are asked about")
    parser.add_argument("--each", type=int, default=0, help="latents a word that are taken out one by one")
    parser.add_argument("--eval-words", type=int, help="words of the eval; default: as the run had")
    parser.add_argument("--name", default="speller", help="of the results' files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
