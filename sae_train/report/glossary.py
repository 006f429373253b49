"""The report's words explained to somebody who meets them for the first time."""

from __future__ import annotations

from sae_train.report.text import escape

TERMS = {
    "SAE": "sparse autoencoder: it writes each activation of the language model as a sum of few of its <b>latents</b>, "
    "each a direction with a strength",
    "L0": "how many latents are active on a token, on average; fewer is easier to read, more reconstructs better",
    "explained variance (EV)": "how much of the activations’ variance the SAE’s reconstruction has; 1 is perfect",
    "CE loss recovered": "how well the language model predicts when it runs on the reconstruction: 1 as well as "
    "without the SAE, 0 as badly as without the activation",
    "dead latents": "latents that have not fired for many tokens: unused width",
    "probe": "a linear read-out of the {noun} from the language model’s activations, fitted without the SAE; a {noun} "
    "counts if its probe is good enough on test words",
    "main latents": "the latents that best tell the {noun} by themselves; several where the SAE splits it",
    "absorption, full": "share of the words on which all main latents are silent and one other latent carries "
    "the {noun}",
    "absorption, fraction": "how much of the {noun} other latents carry on a word, also where the main latents fire",
    "family-corrected": "the same after all latents that mostly fire on one {noun} count as its own: what this takes "
    "away was splitting, not absorption",
    "random SAE": "random directions of the same width and L0, scored alike: what the metric says of nothing",
    "95 % interval": "from drawing the evaluated words anew; “not distinguishable” where it holds the value beside it",
}


def glossary(noun: str, with_family: bool) -> str:
    """Terms under a line that opens them; `noun` is what one label of the hierarchy is called."""
    kept = {term: text for term, text in TERMS.items() if with_family or not term.startswith("family")}
    texts = {term: text.replace("{noun}", escape(noun)) for term, text in kept.items()}
    terms = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in texts.items())
    return f'<details class="glossary"><summary>What the words mean</summary><dl>{terms}</dl></details>'
