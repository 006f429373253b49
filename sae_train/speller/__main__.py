"""Command line of the embedded model: `python -m sae_train.speller [train|prove|miniature] [options]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sae_train.errors import UserError
from sae_train.files import write_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "checkpoints" / "speller"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if all went well, 1 if a proof failed, 2 for a mistake the user can mend."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command's options; defaults that concern training stand in `train.Settings`."""
    out = argparse.ArgumentParser(prog="python -m sae_train.speller", description=__doc__)
    out.add_argument("command", nargs="?", choices=tuple(COMMANDS), default="train")
    out.add_argument("--stories", type=Path, help="folder of .txt files with simple English stories")
    out.add_argument("--words", type=Path, nargs="*", default=[], help="word lists, a word a line, best first")
    out.add_argument("--folder", type=Path, default=FOLDER, help="where the model is or will be")
    out.add_argument("--steps", type=int, help="optimiser steps")
    out.add_argument("--seed", type=int, default=0, help="of the language, the weights and the text")
    out.add_argument("--overwrite", action="store_true", help="replace the model that is in the folder")
    return out


def run_train(options: argparse.Namespace) -> int:
    """Train a model, write its folder, and prove it."""
    if options.stories is None or not options.stories.is_dir():
        raise UserError("Training needs --stories FOLDER, a folder of .txt files such as TinyStories.")
    if missing := [str(path) for path in options.words if not path.is_file()]:
        raise UserError(f"No such word list: {', '.join(missing)}.")
    if (options.folder / "config.json").exists() and not options.overwrite:
        raise UserError(f"{options.folder} already holds a model; give --overwrite or another --folder.")
    from sae_train.speller.train import Settings, train

    steps = {} if options.steps is None else {"n_steps": positive(options.steps)}
    train(options.stories, options.words, options.folder, Settings(seed=options.seed, **steps))
    return run_prove(options)


def run_prove(options: argparse.Namespace) -> int:
    """Print the table of proofs; 1 if one fails."""
    from sae_train.speller.proofs import prove, table

    proofs = prove(options.folder)
    print(table(proofs))
    return 0 if all(proof.holds for proof in proofs) else 1


def run_miniature(options: argparse.Namespace) -> int:
    """Train SAEs of several widths and L0s, write table and figure; 1 if absorption does not move as it must."""
    from sae_train.speller.miniature import draw, measure, slopes

    table = measure(ROOT / "checkpoints")
    folder = ROOT / "docs"
    write_text(folder / "miniature.csv", table.to_csv(index=False, float_format="%.4f"))
    draw(table, folder / "miniature.svg")
    print(table.to_string(index=False, float_format="%.3f"))
    measured = slopes(table)
    for slope in measured:
        changes = ", ".join(f"{change:+.3f}" for change in slope.by_seed)
        print(f"{slope.name}: {changes} by seed: {'holds' if slope.holds else 'FAILS'}")
    return 0 if all(slope.holds for slope in measured) else 1


def positive(steps: int) -> int:
    if steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}.")
    return steps


COMMANDS = {"train": run_train, "prove": run_prove, "miniature": run_miniature}

if __name__ == "__main__":
    sys.exit(main())
