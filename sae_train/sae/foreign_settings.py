"""What settings files of other libraries' SAEs may say: types, and which values change what an SAE computes.

Each file has one model here. A setting that changes the function is acted on by its reader (layouts.py) or refused by
its name; the bookkeeping of a training run is let through; a setting that is not known is refused unless it is off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_train.config.record import Number, Whole
from sae_train.errors import UserError
from sae_train.files import check_types

OFF = (None, False, 0, "", "none", "None", "NOT_IN_USE", [], {})
# SAELens' settings of a training run, which say nothing of what its SAE computes; by their names or how these begin.
OF_TRAINING = re.compile(
    r"(?:adam|autocast|aux_loss|b_dec_init|checkpoint|compile|dataset_|dead_feature|decoder_|eval_|feature_|"
    r"ghost_|hook_eval|hook_layer|hook_point_layer|init_|is_dataset|jumprelu_|l0_|l1_|llm_|log_|lr|matryoshka_|"
    r"model_class_name|model_kwargs|mse_loss|n_|noise_|normalize_sae_decoder|output_path|pre_act_loss|prefetch_|"
    r"resample_|resume_|run_|sae_lens_|save_|scale_sparsity|sparsity_|store_|streaming|tokens_|topk_threshold|train_|"
    r"training_|total_training|use_|wandb_)\w*|act_store_device|activations_mixing_fraction|cached_activations_path|"
    r"device|disable_concat_sequences|dtype|expansion_factor|finetuning_(?:method|tokens)|from_pretrained_path|logger|"
    r"lp_norm|neuronpedia_id|seed|sequence_separator_token|verbose|exclude_bos_and_eos|k|hf_hook_name"
)
# Keyword arguments of TransformerLens' from_pretrained: those that change no activation, and those that change
# activations inside attention and after norms alone.
HARMLESS = {
    "attn_implementation", "cache_dir", "center_unembed", "default_padding_side", "default_prepend_bos", "device",
    "device_map", "dtype", "first_n_layers", "local_files_only", "low_cpu_mem_usage", "move_to_device", "n_devices",
    "tokenizer", "torch_dtype", "trust_remote_code",
}  # fmt: skip
INSIDE_BLOCKS = {"fold_ln", "fold_value_biases", "refactor_factored_attn_matrices"}
BLOCK_SUMS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
Checked = TypeVar("Checked", bound=BaseModel)


Size = Annotated[Whole, Field(gt=0)]


class SettingsFile(BaseModel):
    """A file's settings; those without a type of their own are kept as they are."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def others(self) -> dict[str, Any]:
        return self.__pydantic_extra__ or {}


class Origin(SettingsFile):
    """Where activations come from, as SAELens says it: at the top before version 6, in `metadata` since."""

    model_name: str | None = None
    hook_name: str | None = None
    context_size: Size | None = None
    prepend_bos: bool | None = None
    dataset_path: str | None = None
    l0: Number | None = None
    hook_name_out: str | None = None
    hook_head_index: Any = None
    seqpos_slice: list[int | None] | None = None
    exclude_special_tokens: bool | list[int] | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    randomize_llm_weights: bool | None = None

    def refused(self) -> list[str]:
        """Settings that make other activations than those the model gives here, as sentences."""
        found = []
        if self.hook_head_index is not None:
            found.append(f"hook_head_index {self.hook_head_index!r}: SAEs of a single attention head are not read")
        if self.hook_name_out not in (None, self.hook_name):
            found.append(f"hook_name_out {self.hook_name_out!r}: transcoders are not read")
        # The first position alone may be left out: no word of an evaluation stands there.
        if [part for part in self.seqpos_slice or [] if part not in (None, 0)] not in ([], [1]):
            found.append(f"seqpos_slice {self.seqpos_slice}: SAEs of some positions alone are not read")
        if self.randomize_llm_weights:
            found.append("randomize_llm_weights: SAEs of a model with random weights are not read")
        for name, value in (self.model_from_pretrained_kwargs or {}).items():
            harmless = name in HARMLESS or (name in INSIDE_BLOCKS and (self.hook_name or "").endswith(BLOCK_SUMS))
            if not harmless and value not in (None, False):
                found.append(
                    f"model_from_pretrained_kwargs {name} {value!r}: it was trained on activations of a model that was "
                    "changed so, which the models here are not"
                )
        return found


class SAELensFile(Origin):
    """cfg.json of SAELens."""

    architecture: str = "standard"
    activation_fn: str | None = None
    activation_fn_str: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    d_in: Size | None = None
    d_sae: Size | None = None
    dtype: str | None = None
    k: Number | None = None
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    normalize_activations: str | bool | None = None
    reshape_activations: str | bool | None = None
    finetuning_scaling_factor: bool | None = None
    metadata: Origin | None = None

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, content: Any) -> Any:
        """Names from before version 3."""
        if not isinstance(content, dict):
            return content
        new = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
        return {new.get(name, name): value for name, value in content.items()}

    def refused(self) -> list[str]:
        """What makes it compute something else than is computed here, as sentences."""
        found = [*super().refused(), *(self.metadata.refused() if self.metadata else [])]
        for name in ("normalize_activations", "reshape_activations", "finetuning_scaling_factor"):
            if (value := getattr(self, name)) not in OFF:
                found.append(f"{name} {value!r} is not supported; fold it into the weights first ('none')")
        for name, value in self.others.items():
            if not OF_TRAINING.fullmatch(name) and value not in OFF:
                found.append(f"{name} {value!r} is not known, so what it computes is not either")
        return found


class SparsifyFile(SettingsFile):
    """cfg.json of sparsify."""

    activation: str = "topk"
    k: Number | None = None
    d_in: Size | None = None
    num_latents: int = 0
    signed: bool = False
    transcode: bool = False
    skip_connection: bool = False
    embed_skip: bool = False
    gram_lookup: bool = False

    def refused(self) -> list[str]:
        """What makes it another thing than a topk autoencoder."""
        known = {"expansion_factor", "normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash"}
        on = [name for name in ("signed", "transcode", "skip_connection", "embed_skip", "gram_lookup")
              if getattr(self, name)]  # fmt: skip
        on += [f"activation {self.activation!r}"] if self.activation != "topk" else []
        on += [name for name, value in self.others.items() if name not in known and value not in OFF]
        only = "of sparsify's models only topk autoencoders are read, no groupmax, no transcoders"
        return [f"{', '.join(on)}: {only}"] if on else []


class SparsifyRun(SettingsFile):
    """config.json of a run of sparsify, above the SAEs' folders."""

    sae: SparsifyFile = SparsifyFile()
    model: str | None = None
    dataset: str | None = None
    ctx_len: Size | None = None
    transcode: bool = False


class Trainer(SettingsFile):
    """What dictionary_learning says of how a dictionary was trained."""

    dict_class: str | None = None
    k: Number | None = None
    lm_name: str | None = None
    submodule_name: str | None = None
    layer: Any = None
    activation_dim: Size | None = None
    dict_size: Size | None = None


class Buffer(SettingsFile):
    """What dictionary_learning says of its activations."""

    ctx_len: Size | None = None
    io: str = "out"


class DictionaryFile(SettingsFile):
    """config.json of dictionary_learning."""

    trainer: Trainer = Trainer()
    buffer: Buffer | None = None

    def refused(self) -> list[str]:
        """What makes it another thing than an autoencoder."""
        both = self.buffer is not None and self.buffer.io == "in_and_out"
        return ["buffer.io 'in_and_out': transcoders are not read"] if both else []


class GemmaScopeFile(SettingsFile):
    """config.json beside Gemma Scope 2's weights; Gemma Scope has none."""

    architecture: str | None = None
    model_name: str | None = None
    hf_hook_point_in: str | None = None
    hf_hook_point_out: str | None = None
    affine_connection: Any = None
    type: str | None = None

    def refused(self) -> list[str]:
        """What makes it another thing than a JumpReLU autoencoder."""
        found = []
        if self.architecture not in (None, "jump_relu", "jumprelu"):
            found.append(f"architecture {self.architecture!r} is not read; of Gemma Scope jump_relu is")
        if self.type not in (None, "sae"):
            found.append(f"type {self.type!r} is not read; of Gemma Scope SAEs are")
        if self.affine_connection:
            found.append("affine_connection: transcoders are not read")
        if self.hf_hook_point_out not in (None, self.hf_hook_point_in):
            found.append(f"hf_hook_point_out {self.hf_hook_point_out!r}: what writes elsewhere than it reads is no SAE")
        return found


class AverageNorms(SettingsFile):
    """The mean norm of what goes into a module of Llama Scope's and of what comes out."""

    into: Annotated[Number, Field(gt=0, alias="in")]
    out: Annotated[Number, Field(gt=0)]


class LlamaScopeFile(SettingsFile):
    """hyperparams.json of Llama Scope, as OpenMOSS's lm-saes wrote it then."""

    d_model: Size
    d_sae: Size
    hook_point_in: str
    hook_point_out: str
    act_fn: str
    jump_relu_threshold: Number
    norm_activation: str
    dataset_average_activation_norm: AverageNorms | None = None
    use_decoder_bias: bool = True
    apply_decoder_bias_to_pre_encoder: bool = False
    sparsity_include_decoder_norm: bool = True
    use_glu_encoder: bool = False

    @property
    def scale(self) -> float:
        """The factor that activations were multiplied by in training, to a mean norm of √d_model."""
        norms = self.dataset_average_activation_norm
        return self.d_model**0.5 / norms.into if norms and self.norm_activation == "dataset-wise" else 1.0

    def refused(self) -> list[str]:
        """What makes it another thing than a JumpReLU autoencoder of activations as they are."""
        found, norms = [], self.dataset_average_activation_norm
        if self.hook_point_out != self.hook_point_in:
            found.append(f"hook_point_out {self.hook_point_out!r}: transcoders are not read")
        if self.act_fn.lower() != "jumprelu":
            found.append(f"act_fn {self.act_fn!r} is not read; of Llama Scope jumprelu is")
        if self.norm_activation not in ("dataset-wise", "inference"):
            found.append(f"norm_activation {self.norm_activation!r}: SAEs of inputs of equal norms are not read")
        elif self.norm_activation == "dataset-wise" and not norms:
            found.append("norm_activation 'dataset-wise' needs dataset_average_activation_norm, which is missing")
        elif norms and norms.into != norms.out:
            found.append("dataset_average_activation_norm differs between in and out: transcoders are not read")
        if self.use_glu_encoder:
            found.append("use_glu_encoder: encoders with a second gate are not read")
        return found


def checked(model: type[Checked], content: Any, path: Path) -> Checked:
    """Return a file's settings by their types; UserError names those that are of another, or that are refused."""
    settings = check_types(model, content, path)
    problems = settings.refused() if hasattr(settings, "refused") else []
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}.")
    return settings
