"""Try every family of causal language models that transformers can build: tiny, random, loaded by sae-train.

    python tests/crosscheck/families.py [FAMILY…]

Each must give activations and logits at the default hook and at every other hook that it offers, or one sentence. A
line a family, then the counts; docs/hooks.md names the families that do not work.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {
    1: "num_key_value_heads num_kv_heads multi_query_group_num num_shared_experts n_shared_experts n_group topk_group "
    "num_nextn_predict_layers kv_heads mamba_n_groups n_groups first_k_dense_replace ",
    2: "num_hidden_layers n_layer num_layers n_layers num_attention_heads n_head num_heads n_heads num_experts_per_tok "
    "moe_topk moe_k num_local_experts num_experts n_routed_experts moe_num_experts encoder_layers decoder_layers "
    "encoder_attention_heads decoder_attention_heads linear_num_key_heads linear_num_value_heads num_blocks "
    "encoder_num_hidden_layers zero_expert_num mamba_num_heads index_n_heads index_topk",
    8: "head_dim d_head attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank "
    "linear_key_head_dim linear_value_head_dim rotary_dim conv_size mamba_d_state state_size mamba_d_head "
    "query_pre_attn_scalar sliding_window index_head_dim chunk_size mamba_chunk_size ssm_state_size mamba_head_dim",
    16: "hidden_size n_embd d_model embedding_size dim word_embed_proj_dim model_dim embed_dim attention_hidden_size "
    "hidden_size_per_layer_input input_embedding_size",
    32: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size moe_intermediate_size mlp_hidden_size d_inner "
    "shared_expert_intermediate_size encoder_ffn_dim decoder_ffn_dim mamba_intermediate_size n_positions "
    "max_position_embeddings max_seq_len max_seq_length context_length moe_shared_expert_intermediate_size "
    "moe_shared_intermediate_size shared_intermediate_size mamba_d_ssm expert_ffn_hidden_size",
    72: "vocab_size vocab_size_per_layer_input",
}
VALUES = {name: value for value, names in SIZES.items() for name in names.split()}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LATENT = {"num_key_value_heads": 2}  # multi-head latent attention
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8}
OWN = {  # what a family needs beside
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), LATENT),
    "bamba": MAMBA,
    "codegen": {"n_head": 4, "num_attention_heads": 4, "n_embd": 32, "hidden_size": 32},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
    "diffllama": {"num_key_value_heads": 2},
    "falcon_h1": MAMBA,
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": MAMBA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 8], "axial_pos_shape": [4, 8]},
    "xlnet": {"max_position_embeddings": None},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "mamba_headdim": 8, "n_mamba_heads": 4, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
MOST_PARAMETERS = 20_000_000
TOKENS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


class NotTiny(Exception):
    """transformers does not build or run this family with the sizes above."""


def tiny_config(family: str):
    """A configuration of two blocks and sixteen dimensions."""
    from transformers import CONFIG_MAPPING

    text = CONFIG_MAPPING[family]().get_text_config()
    asked = {name: value for name, value in (VALUES | IDS).items() if name in IDS or is_number(text, name)}
    own = OWN.get(family, {})
    left_out = {name for name, value in own.items() if value is None}
    return type(text)(**{name: value for name, value in (asked | own).items() if name not in left_out})


def is_number(config, name: str) -> bool:
    try:
        value = getattr(config, name)
    except Exception as error:  # one that may differ from layer to layer may be set for all
        return not isinstance(error, AttributeError | NotImplementedError)
    settable = not isinstance(getattr(type(config), name, None), property) or type(config).__dict__[name].fset
    return bool(settable) and not isinstance(value, bool) and (value is None or isinstance(value, int | float))


def build(family: str, folder: Path) -> None:
    """Save a random model of a family with the tests' tokenizer."""
    from tiny_models import tiny_tokenizer
    from transformers import AutoModelForCausalLM

    try:
        config = tiny_config(family)
        with torch.device("meta"):
            n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if n > MOST_PARAMETERS:
            raise NotTiny(f"{n:,} parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # at their start blocks are next to the identity
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.eval()(TOKENS, use_cache=False)
        model.save_pretrained(folder)
    except Exception as error:
        raise NotTiny(f"{type(error).__name__}: {str(error).splitlines()[0][:150]}") from error
    tiny_tokenizer().save_pretrained(folder)


def check(family: str, folder: Path) -> str:
    """Load it and look at every hook that it offers; return how many those are."""
    from sae_train.data.hooks import hook_points, width_at
    from sae_train.data.language_model import LanguageModel, describe_language_model, load_language_model
    from sae_train.errors import UserError

    facts = describe_language_model(str(folder))
    lm = load_language_model(folder)
    assert (facts.hook_name, facts.d_in) == (lm.hook_name, lm.d_in)
    look_at(lm)
    try:
        points = hook_points(lm._model, family)
    except UserError:
        return "hook_resid_pre and hook_resid_post"
    for point in points.values():
        there = LanguageModel(lm.name, lm._model, lm.tokenizer, point, lm.context)
        assert there.d_in == width_at(lm._model, point), point
        look_at(there)
    return f"{len({name.split('.', 2)[2] for name in points})} kinds of hooks"


def look_at(lm) -> None:
    """Activations, logits and edits at one hook must be finite and fit together."""
    x, clean = lm.activations(TOKENS), lm.logits(TOKENS)
    assert x.shape == (*TOKENS.shape, lm.d_in) and bool(x.isfinite().all()), "activations"
    torch.testing.assert_close(lm.logits(TOKENS, lambda x: x, lm.start(TOKENS)), clean, rtol=1e-4, atol=1e-5)
    assert not torch.equal(lm.logits(TOKENS, lambda x: x + 9 * x.flip(-1)), clean), f"{lm.hook_name}: no edit arrives"
    changed = TOKENS.clone()
    changed[:, -1] += 1
    before = lm.activations(changed)[:, :-1]
    assert torch.allclose(before, x[:, :-1], rtol=1e-3, atol=1e-5), "not causal: a token changes what comes before it"
    for behind in (lm.activations_after(TOKENS[0], TOKENS[:, :1]), lm.logits_after(TOKENS[0], TOKENS[:, :1])):
        assert behind is None or bool(behind.isfinite().all()), "behind a prefix"
    lm.read_out(torch.eye(lm.d_in)[:2])


def try_family(family: str) -> tuple[str, str]:
    """Return "works", "refused", "not built" or "FAILS", and what there is to say."""
    from sae_train.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        try:
            build(family, Path(folder))
            return "works", check(family, Path(folder))
        except NotTiny as error:
            return "not built", str(error)
        except UserError as error:
            return "refused", str(error).replace(folder, "it")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = (str(error).splitlines() or [""])[0][:200]
            return "FAILS", f"{type(error).__name__}: {said} ({Path(last.filename).name}:{last.lineno})"


def main(families: list[str]) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    results: dict[str, list[str]] = {}
    for family in families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        outcome, said = try_family(family)
        results.setdefault(outcome, []).append(family)
        print(f"{outcome:9} {family:28} {said}", flush=True)
    for outcome, names in results.items():
        print(f"{len(names)} {outcome}: {', '.join(names)}")
    raise SystemExit("FAILS" in results)


if __name__ == "__main__":
    main(sys.argv[1:])
