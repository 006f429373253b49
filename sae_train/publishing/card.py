"""Model cards: the README.md of a saved SAE and that of a published repo, from entries of run.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_train.config.record import at_hook
from sae_train.files import write_text
from sae_train.publishing.hub import Origin, front_matter
from sae_train.report.text import leaves_out, left_out, number

SAE_CARD = """---
library_name: saelens
tags: [saelens, sparse-autoencoder, mechanistic-interpretability]
---
# {name}

A {arch} sparse autoencoder with {width:,} latents for `{hook_name}` of `{model}`, trained by sae-train on
{tokens:,} tokens of `{dataset}`.{started}{weights}{outliers}

| | |
|---|---|
| L0 on held-out text (asked) | {l0_reached} ({l0:g}) |
| explained variance, held out | {ev} |
| loss recovered | {recovered} |
| dead latents | {dead} |

{absorption}

```python
from sae_train import load_sae

sae = load_sae("path/to/{name}")
latents = sae.encode(x)  # x: activations (n, {d_in}) of {hook_name}, raw
```

SAELens loads the same folder: `SAE.load_from_disk("path/to/{name}")`.
"""

NAN = "not measured"


def card(origin: Origin, saes: list[dict[str, Any]], with_curves: bool) -> str:
    """Return the whole README.md."""
    parts = [
        f"---\n{front_matter(origin, saes)}\n---",
        f"# {origin.repo.split('/')[-1]}",
        _opening(origin, saes),
        "## Load",
        _loading(origin, saes),
        "## Measured",
        _table(saes),
        _reading(saes),
        *(["![Curves over training tokens](curves.png)"] if with_curves else []),
        *(["## Reproduce", _reproduce(origin)] if origin.command else []),
        "## Licence",
        _licence(origin),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(origin: Origin, saes: list[dict[str, Any]]) -> str:
    info = origin.info
    noun = "A sparse autoencoder" if len(saes) == 1 else f"{len(saes)} sparse autoencoders"
    model = f"`{origin.model}`" if origin.model else "a model that its configuration does not name"
    hooks = " and ".join(f"`{hook}`" for hook in (info.get("hook_name") or "").split(",") if hook)
    where = f"{hooks} of {model}" if hooks else model
    trained = f", trained by sae-train on {info['tokens']:,} tokens of `{origin.dataset}`" if info.get("tokens") else ""
    takes = f"{'It' if len(saes) == 1 else 'Each'} takes raw activations."
    sentences = started_sentence(info), weights_sentence(info.get("weights")), outliers_sentence(info)
    return f"{noun} for {where}{trained}. {takes}{''.join(sentences)}"


def _loading(origin: Origin, saes: list[dict[str, Any]]) -> str:
    name, d_in = saes[0]["name"], at_hook(origin.info, saes[0].get("hook_name"))["d_in"]
    return (
        "```python\nfrom sae_train import load_sae\n\n"
        f'sae = load_sae("{origin.repo}", "{name}")\nlatents = sae.encode(x)  # x: activations (n, {d_in})\n```\n\n'
        f'SAELens reads the same folders: `SAE.from_pretrained("{origin.repo}", "{name}")`.'
    )


def _table(saes: list[dict[str, Any]]) -> str:
    if any("toy/mcc" in sae["final"] for sae in saes):
        head, row = ["MCC", "recovered", "absorption, by the truth"], _toy_row
    else:
        head, row = ["loss recovered", "absorption, fraction", "full absorption", "F1"], _text_row
    head = ["SAE", "width", "L0 asked", "L0", "EV", "dead", *head]
    lines = [head, ["---"] * len(head), *(_common_row(sae) + row(sae) for sae in saes)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _common_row(sae: dict[str, Any]) -> list[str]:
    final = sae["final"]
    figures = [("metrics/l0", ".2f"), ("metrics/explained_variance", ".4f"), ("sparsity/dead_fraction", ".1%")]
    asked = NAN if sae["l0"] is None else f"{sae['l0']:g}"
    return [f"`{sae['name']}`", f"{sae['width']:,}", asked, *(_number(final.get(key), form) for key, form in figures)]


def _text_row(sae: dict[str, Any]) -> list[str]:
    random, on_words = (sae["baseline"].get(name) or {} for name in ("random", "random_words"))
    cells = [_number(sae["final"].get("metrics/ce_loss_score"), ".4f")]
    for name in ("mean_fraction", "mean_full"):
        said = [f"{random[name]:.4f}"] if number(random.get(name)) is not None else []
        said += [f"on the words {on_words[name]:.4f}"] if number(on_words.get(name)) is not None else []
        beside = f" (random SAE {', '.join(said)})" if said else ""
        cells.append(_estimate(sae["final"], f"absorption/{name}") + beside)
    return [*cells, _number(sae["final"].get("absorption/mean_f1"), ".2f")]


def _toy_row(sae: dict[str, Any]) -> list[str]:
    return [_number(sae["final"].get(f"toy/{name}"), ".4f") for name in ("mcc", "recovered", "absorption")]


def _reading(saes: list[dict[str, Any]]) -> str:
    finals = [sae["final"] for sae in saes]
    text = "Every figure is taken on held-out data; EV is explained variance."
    if any(final.get("absorption/valid") for final in finals):
        text += (
            " Absorption is the first-letter eval of Chanin et al. 2024 in SAEBench's form. In brackets are 95 % "
            "bootstrap intervals over its words: another training seed may lie outside them. The random SAE has the "
            f"same width and L0{_fitted(saes)}.{_on_words(saes)} F1 is the letter latents' mean: where it is low, "
            "absorption is low for no merit."
        )
    reasons = dict.fromkeys(f["absorption/reason"] for f in finals if f.get("absorption/valid") is False)
    return text + "".join(
        f" The absorption eval gives no valid result: {str(reason).rstrip('.')}." for reason in reasons
    )


def _fitted(saes: list[dict[str, Any]]) -> str:
    """Say, after a comma, what the random SAEs are fitted on, of each SAE where that differs."""
    random = {sae["name"]: (sae["baseline"].get("random") or {}).get("fitted_on") for sae in saes}
    what = {on for on in random.values() if on}
    if len(what) > 1:
        return ", fitted on " + ", ".join(f"{on} (beside `{name}`)" for name, on in random.items() if on)
    return "".join(f", fitted on {on}" for on in what)


def _on_words(saes: list[dict[str, Any]]) -> str:
    beside = any(sae["baseline"].get("random_words") for sae in saes)
    return " *On the words*: one that is fitted on the eval's words, and as sparse there." if beside else ""


def _reproduce(origin: Origin) -> str:
    info = origin.info
    versions = ", ".join(f"{name} {value}" for name, value in info["versions"].items() if value)
    commit = f", commit {info['git_commit']}" if info.get("git_commit") else ""
    hardware = info.get("hardware") or {}
    machine = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cores')} CPU cores"
    return f"```\n{origin.command}\n```\n\nMade with {versions}{commit}, on {machine}. All figures: `results.json`."


def _licence(origin: Origin) -> str:
    base = f"; the language model, `{origin.base_model}`, has a licence of its own" if origin.base_model else ""
    return f"These weights: {origin.license}{base}."


def _estimate(values: dict[str, Any], key: str) -> str:
    low, high = (number(values.get(f"{key}_{end}")) for end in ("low", "high"))
    interval = f" [{low:.4f}, {high:.4f}]" if low is not None and high is not None else ""
    return _number(values.get(key), ".4f") + interval


def _number(value: float | None, form: str) -> str:
    return NAN if number(value) is None else format(value, form)


def weights_sentence(weights: dict[str, Any] | None) -> str:
    """Say, after a space, which weights the language model had; nothing where that is not known."""
    if not weights:
        return ""
    if weights.get("hub"):
        revision = weights.get("revision") or "unknown"
        return f" The model's weights: revision {revision} of `{weights['hub']}` on the hub."
    files = ", ".join(
        f"`{file['name']}` ({file['bytes']:,} bytes, sha256 {file['sha256'] or 'not taken'})"
        for file in weights.get("files", ())
    )
    package = f" of the package {weights['package']}" if weights.get("package") else ""
    return f" The model's weights: {files}{package}." if files else ""


def started_sentence(info: dict[str, Any]) -> str:
    """Say, after a space, which SAE training started from, a local one by the last part of its path, and where a
    finished run went on; nothing of a run in one piece from random directions."""
    start, stages, said = info.get("init_from"), info.get("stages") or [], ""
    if start:
        name = Path(start["name"]).name if start.get("path") else start["name"]
        revision = f", revision {start['revision']}" if start.get("revision") else ""
        said = f" Training started from the SAE `{name}`{revision} (its weights: sha256 {start.get('sha256')})."
    if stages:
        after = " and ".join(f"{tokens:,}" for tokens in stages)
        said += f" After {after} tokens the learning rate, which had fallen to 0, rose and fell once more."
    return said


def outliers_sentence(info: dict[str, Any]) -> str:
    """Say, after a space, what was left out of training and figures; nothing where nothing was."""
    return f" Left out of training and of all figures but loss recovered: {left_out(info)}." if leaves_out(info) else ""


def write_card(folder: Path, sae: dict[str, Any], info: dict[str, Any], measured: str) -> None:
    """Write README.md into an SAE's folder; `measured` is the line on its absorption."""
    final = sae["final"]
    text = SAE_CARD.format(
        name=sae["name"],
        arch=sae["arch"],
        width=sae["width"],
        l0=sae["l0"],
        l0_reached=_number(final.get("metrics/l0"), ".2f"),
        ev=_number(final.get("metrics/explained_variance"), ".4f"),
        recovered=_number(final.get("metrics/ce_loss_score"), ".4f"),
        dead=_number(final.get("sparsity/dead_fraction"), ".1%"),
        absorption=measured,
        model=info["model"],
        hook_name=info["hook_name"],
        tokens=info["tokens"],
        dataset=info["dataset"],
        d_in=info["d_in"],
        started=started_sentence(info),
        weights=weights_sentence(info.get("weights")),
        outliers=outliers_sentence(info),
    )
    write_text(folder / "README.md", text)
