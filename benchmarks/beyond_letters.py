"""Which concepts beside the first letter absorb: SAEs on several hierarchies, with nulls and the causal rate, as CSV.

    python benchmarks/beyond_letters.py --model smollm2 --hook blocks.8.hook_resid_post --words 6000 SAE SAE

Every label above the probe's gate is in the means, however few there are ("needed" says how many the eval asks for).
Beside the scores by projection stand random SAEs (fitted on the words), random directions in the probe's place, and the
causal rate: the model is asked about words whose main latents are silent and whose label the k-sparse probe misses,
some --causal of them, with each of the --ablated largest latent vectors taken out. "Confirmed" are those of the asked
words absorbed by projection (full) that are so by cause. Rows are added to --out, a file for one model, --words and
--seed, and the scores label by label to OUT_labels.csv beside it; a task of an SAE that is there already, by its
folder's name, is skipped. `--table FILE` prints a file's rows; `--seeds FILE_labels.csv` the means of SAEs that differ
in their training seed, with 95 % intervals over labels and seeds.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent))
from csv_rows import append, cpu

from sae_train.data.language_model import load_language_model
from sae_train.evals import assets, baselines
from sae_train.evals.absorption import Evaluation
from sae_train.evals.intervals import letters_by_seeds
from sae_train.evals.presets import SAEBENCH
from sae_train.report.data import by_chance, carried_by_chance
from sae_train.runs.display import aside
from sae_train.sae.files import load_sae

if TYPE_CHECKING:
    from sae_train.evals.assets import Assets
    from sae_train.evals.contexts import Progress
    from sae_train.evals.result import AbsorptionResult

TASKS = "first-letter,last-letter,first-vowel,word-length,kind,number"
# The gate on the number of labels is reported instead of applied.
PRESET = replace(SAEBENCH, name="saebench, any number of labels", min_letters=1)
SCORES = ("fraction", "full")
COLUMNS = (
    "sae", "task", "words", "test_words", "labels", "needed", "counting", "probe_f1", "model_accuracy",
    "true_positives", "f1", "recall", *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")),
    "full_family", *(f"{null}_{score}" for null in ("random", "directions") for score in SCORES), "causal",
    "causal_low", "causal_high", "silent", "asked", "confirmed", "confirmed_of", "seconds", "cpu",
    "effect", "most_effect",
)  # fmt: skip
LABEL_COLUMNS = ("sae", "task", "label", "f1", "recall", "fraction", "full", "full_family", "full_by_chance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="*", metavar="SAE", help="folders of SAEs")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--hook", default="blocks.8.hook_resid_post")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--words", type=int, default=6000, help="of each task, a stratified sample")
    parser.add_argument("--causal", type=int, default=100, help="words that the model is asked about")
    parser.add_argument("--ablated", type=int, default=8, help="latents that are taken out of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder that keeps the words' activations")
    parser.add_argument("--out", type=Path, default=Path("beyond_letters.csv"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seeds", type=Path)
    options = parser.parse_args()
    if options.table or options.seeds:
        print(table(options.table) if options.table else by_seeds(pd.read_csv(options.seeds)))
        return
    names = [Path(sae).name for sae in options.saes]
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"several SAEs are named {', '.join(sorted(twice))}: give each its own --out")
    done = {(row["sae"], row["task"]) for row in rows_of(options.out)} if options.out.is_file() else set()
    tasks = {task: [sae for sae in map(Path, options.saes) if (sae.name, task) not in done]
             for task in options.tasks.split(",")}  # fmt: skip
    with aside() as display:
        display.interrupted = f"{options.out} has what was measured: the same command goes on"
        measure_all({task: saes for task, saes in tasks.items() if saes}, options, display)


def measure_all(tasks: dict[str, list[Path]], options: argparse.Namespace, tell: Progress) -> None:
    """Measure each task's SAEs, and write their rows one by one."""
    by_label = options.out.with_name(f"{options.out.stem}_labels.csv")
    lm = load_language_model(options.model, options.hook, dtype=options.dtype)
    n_done, n_all, doing = 0, sum(map(len, tasks.values())), "measuring SAEs, task by task"
    for task, saes in tasks.items():
        tell(doing, n_done, n_all)
        how = {"seed": options.seed, "n_words": options.words, "cache_dir": options.cache}
        built = assets.build(lm, hierarchy=task, preset=PRESET, **how)
        for folder in saes:
            figures, labels = measure(folder, built, lm, options)
            row = {"sae": folder.name, "task": task, "cpu": cpu()} | figures
            append(by_label, LABEL_COLUMNS, [{"sae": folder.name, "task": task} | label for label in labels])
            append(options.out, COLUMNS, [row])
            print(lines_of(row), flush=True)
            n_done += 1
            tell(doing, n_done, n_all)


@torch.no_grad()
def measure(
    folder: Path, built: Assets, lm: Any, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All figures of one SAE on one task, and its scores label by label."""
    start = time.perf_counter()
    sae, seed, n_labels = load_sae(folder), options.seed, len(built.label_names)
    evaluation = Evaluation(sae, built, PRESET, seed, lm)
    latents = evaluation.encode()
    result = evaluation.run(latents)
    random = baselines.random_score(sae, built.x, built, PRESET, seed)
    directions = baselines.random_directions_score(sae, built, result, latents)
    most = -(-options.causal // max(result.n_letters, 1))
    by_cause = replace(PRESET, attribution="ablation", n_ablated=options.ablated, max_candidates=most)
    can_ask = len(built.answer_ids) > 0
    caused = Evaluation(sae, built, by_cause, seed, lm).run(latents) if can_ask else None
    figures = {
        "words": len(built.words), "test_words": int(built.is_test.sum()), "labels": n_labels,
        "needed": built.n_needed(SAEBENCH), "counting": result.n_letters,
        "probe_f1": rounded(built.probe_figures[:, 0].nan_to_num().mean()),
        "model_accuracy": rounded(built.model_accuracy), "true_positives": len(built.tp_rows),
        **scores_of(result), "random_fraction": rounded(random.mean_fraction), "random_full": rounded(random.mean_full),
        "directions_fraction": rounded(directions.get("mean_fraction")),
        "directions_full": rounded(directions.get("mean_full")),
        **(causes_of(caused, result) if caused else {}), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    return figures, labels_of(result, random)


def scores_of(result: AbsorptionResult) -> dict[str, Any]:
    """The means over the labels that count, with intervals over words."""
    out = {"f1": rounded(result.mean_f1), "recall": rounded(result.mean_recall_main)}
    for score in SCORES:
        low, high = result.interval(f"mean_{score}")
        out |= {score: rounded(getattr(result, f"mean_{score}")), f"{score}_low": rounded(low)}
        out[f"{score}_high"] = rounded(high)
    return out | {"full_family": rounded(result.mean_full_family)}


def labels_of(result: AbsorptionResult, random: AbsorptionResult) -> list[dict[str, Any]]:
    """The scores of each label that counts, and the full absorption that chance gives (docs/study.md)."""
    share = carried_by_chance({"mean_full": random.mean_full, "mean_recall_main": random.mean_recall_main})
    counting = result.by_letter[result.by_letter["counts"]]
    return [
        {"label": row.letter, "f1": rounded(row.f1_k1), "recall": rounded(row.recall_main)}
        | {name: rounded(getattr(row, name)) for name in ("fraction", "full", "full_family")}
        | {"full_by_chance": rounded(by_chance({"recall_main": row.recall_main}, share))}
        for row in counting.itertuples()
    ]


def causes_of(caused: AbsorptionResult, result: AbsorptionResult) -> dict[str, Any]:
    """The causal rate, how many of the asked words that are absorbed by projection are so by cause, and what taking the
    latent out that matters most does to the answer's margin, in logits: the median of the words asked, and the most."""
    low, high = caused.interval("mean_full")
    counting = result.by_letter.loc[result.by_letter["counts"], "letter"]
    words = caused.words.assign(projected=result.words["full"])[caused.words["letter"].isin(counting)]
    silent = words["main_act"] < PRESET.silent_below
    both, effects = words[words["candidate"] & words["projected"]], words["effect"][words["candidate"]].abs()
    return {
        "causal": rounded(caused.mean_full), "causal_low": rounded(low), "causal_high": rounded(high),
        "silent": int(silent.sum()), "asked": int(words["candidate"].sum()),
        "confirmed": int((both["full"] > 0).sum()), "confirmed_of": len(both),
        "effect": rounded(effects.median()), "most_effect": rounded(effects.max()),
    }  # fmt: skip


def rounded(value: Any) -> Any:
    return "" if value is None else f"{float(value):.4f}"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines_of(row: dict[str, Any]) -> str:
    """A row as one of the page's table."""

    def figure(name: str) -> str:
        value = row.get(name)
        return "–" if value in (None, "", "nan") else f"{float(value):.3f}".replace("0.", ".", 1)

    def interval(name: str) -> str:
        return f"{figure(name)} [{figure(f'{name}_low')}, {figure(f'{name}_high')}]"

    cells = [
        row["task"], row["sae"], figure("probe_f1"), f"{row['counting']} of {row['labels']} ({row['needed']})",
        figure("f1"), interval("fraction"), figure("random_fraction"), figure("directions_fraction"), interval("full"),
        figure("full_family"), figure("random_full"), figure("directions_full"), interval("causal"),
        row.get("asked", "–"), f"{row.get('confirmed', '–')} of {row.get('confirmed_of', '–')}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def by_seeds(labels: pd.DataFrame) -> str:
    """Markdown: each task's means over the labels that count for all SAEs, and over training seeds."""
    # A task that was interrupted and made again has its labels twice.
    labels = labels.drop_duplicates(["sae", "task", "label"], keep="last")
    labels = labels.assign(
        of=[re.sub(r"-seed_\d+", "", name) for name in labels["sae"]],
        beyond=labels["full"] - labels["full_by_chance"],
    )
    scores = {"f1": "F1", "recall": "recall", "fraction": "fraction", "full": "full", "beyond": "beyond chance",
              "full_family": "family-corrected"}  # fmt: skip
    head = ("task", "SAEs", "training seeds", "labels", *scores.values())
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (task, name), own in labels.groupby(["task", "of"], sort=False):
        tables = {score: own.pivot(index="sae", columns="label", values=score).dropna(axis=1) for score in scores}
        found = [letters_by_seeds(torch.tensor(values.to_numpy(copy=True))) for values in tables.values()]
        cells = [f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]".replace("0.", ".") for one in found]
        lines.append(f"| {task} | {name} | {' | '.join(map(str, tables['full'].shape))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(path: Path) -> str:
    head = (
        "task", "SAE", "probe F1", "labels that count (needed)", "F1", "fraction", "random SAE", "random directions",
        "full", "family-corrected", "random SAE", "random directions", "causal", "asked", "confirmed",
    )  # fmt: skip
    rows = rows_of(path)
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *map(lines_of, rows)])


if __name__ == "__main__":
    main()
