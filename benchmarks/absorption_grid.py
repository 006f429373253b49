"""The table of a run of many SAEs: L0, EV, loss recovered, dead latents, absorption beside the random SAE, both
definitions of the fraction, and words that a reader can look at.

    sae-train --config configs/smollm2.yaml --dataset TEXT --arch topk,jumprelu,relu --width 4k,16k --l0 25,50,100 \\
        --tokens 1M --absorption-evals 1 --out checkpoints/grid
    python benchmarks/absorption_grid.py checkpoints/grid --words topk-16k-l0_50

Figures are those of the run; the fraction that SAEBench had before 0.4.1 is computed here from the same words, as the
language model is read again. It prints Markdown and writes rows to benchmarks/results/absorption_grid.csv.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csv_rows import append, machine

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results" / "absorption_grid.csv"
SCORES = ("fraction", "full")
LIMITS = ("", "_low", "_high")
COLUMNS = (
    "date", "machine", "model", "hook", "text", "tokens", "words", "sae", "arch", "width", "l0_asked", "seed", "l0",
    "ev", "loss_recovered", "dead", "letters", "mean_f1", *(score + limit for score in SCORES for limit in LIMITS),
    *(f"random_{score}{limit}" for score in SCORES for limit in LIMITS), "old_fraction",
)  # fmt: skip
N_WORDS, MIN_LETTERS = 5, 4


def main() -> None:
    args = _arguments()
    run = json.loads((args.run / "run.json").read_text())
    done = [sae for sae in run["saes"] if sae["written"] and not sae["failed"]]
    old = old_fractions(args.run, run, [sae["name"] for sae in done]) if args.old_fraction else {}
    rows = [row(sae, run, old.get(sae["name"])) for sae in done]
    print(table(rows))
    if args.words:
        print()
        print(words(args.run, args.words))
    if args.out:
        append(args.out, COLUMNS, rows)


def row(sae: dict[str, Any], run: dict[str, Any], old: float | None) -> dict[str, Any]:
    """One SAE's figures, flat."""
    final, random = sae["final"], sae["baseline"].get("random") or {}
    scores = {
        where + score + limit: source.get(f"{prefix}mean_{score}{limit}")
        for where, source, prefix in (("", final, "absorption/"), ("random_", random, ""))
        for score in SCORES
        for limit in LIMITS
    }
    return scores | {
        "date": dt.date.today().isoformat(), "machine": machine("cpu"),
        "model": run["model"], "hook": run["hook_name"], "text": Path(run["dataset"]).name, "tokens": run["tokens"],
        "words": run["eval_assets"]["n_words"] or "all", "sae": sae["name"], "arch": sae["arch"], "width": sae["width"],
        "l0_asked": sae["l0"], "seed": sae["seed"], "l0": final["metrics/l0"],
        "ev": final["metrics/explained_variance"], "loss_recovered": final.get("metrics/ce_loss_score"),
        "dead": final["sparsity/dead_fraction"], "letters": final.get("absorption/n_letters"),
        "mean_f1": final.get("absorption/mean_f1"), "old_fraction": old,
    }  # fmt: skip


def old_fractions(folder: Path, run: dict[str, Any], names: list[str]) -> dict[str, float | None]:
    """The mean fraction as SAEBench defined it before 0.4.1, by SAE, on the words of the run."""
    from sae_train.config import resolve
    from sae_train.data.sources import kind_of
    from sae_train.evals import absorption
    from sae_train.runs.callbacks import build_assets
    from sae_train.sae.files import load_sae
    from sae_train.training.ranks import choose_device

    settings = resolve(run["settings"])
    lm = kind_of(settings).language_model(settings, choose_device(settings.lm.device))
    assets, notes = build_assets(lm, settings.eval, print)
    if assets is None:
        raise SystemExit(" ".join(notes))
    found = {}
    for name in names:
        sae = load_sae(folder / "saes" / name)
        result = absorption.evaluate(sae, assets, preset="saebench-0.3", seed=settings.eval.eval_seed)
        found[name] = result.metrics().get("absorption/mean_fraction")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line an SAE; the older fraction is left out where it was not computed."""
    lines = []
    for it in rows:
        cells = {
            "": f"{it['arch']}, {it['width'] // 1024}k",
            "L0 asked, reached": f"{it['l0_asked']:g}, {it['l0']:.2f}",
            "EV": _share(it["ev"], 3),
            "loss recovered": _share(it["loss_recovered"], 3),
            "dead": f"{it['dead']:.0%}".replace("%", " %"),
            "letters": "–" if it["letters"] is None else f"{it['letters']:.0f}",
            "F1": _share(it["mean_f1"], 2),
            "fraction": _interval(it, "fraction"),
            "random SAE's": _share(it["random_fraction"], 2),
            "older fraction": _share(it["old_fraction"], 3),
            "full": _interval(it, "full"),
            "random SAE's ": _share(it["random_full"], 2),
        }
        if all(row["old_fraction"] is None for row in rows):
            del cells["older fraction"]
        lines.append(cells)
    body = [f"| {' | '.join(cells.values())} |" for cells in lines]
    return "\n".join([f"| {' | '.join(lines[0])} |", "|" + "---|" * len(lines[0]), *body])


def words(folder: Path, name: str) -> str:
    """The clearest absorbed words of an SAE, one a letter: those whose absorber has the largest projection."""
    import pandas as pd

    data = pd.read_parquet(folder / "absorption.parquet")
    data = data[(data["sae"] == name) & (data["level"] == "word") & (data["outcome"] == "carried")]
    data = data[data["step"] == data["step"].max()]
    data = data[(data["word"].str.strip().str.len() >= MIN_LETTERS) & (data["absorbers"].map(len) > 0)]
    data = data.assign(carried=[projections[0] for projections in data["absorber_proj"]])
    clearest = data.sort_values("carried", ascending=False).drop_duplicates("letter").head(N_WORDS)
    lines = [
        "| word | silent main latents | absorber | its cosine | its share of the letter |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_word(word) for _, word in clearest.iterrows()])


def _word(word: pd.Series) -> str:
    mains = ", ".join(map(str, word["main_latents"]))
    return (
        f"| {word['word']} | {mains} ({word['letter']}) | {word['absorbers'][0]} | {word['absorber_cos'][0]:.2f} | "
        f"{word['carried'] / word['a']:.2f} |"
    )


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1)


def _interval(it: dict[str, Any], score: str) -> str:
    if it[score] is None:
        return "–"
    low, high = (_share(it[score + limit], 3) for limit in LIMITS[1:])
    return f"{_share(it[score], 3)} [{low}, {high}]"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--words", metavar="SAE", help="also print words that this SAE absorbs")
    parser.add_argument(
        "--no-old-fraction", dest="old_fraction", action="store_false", help="do not read the model again"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
