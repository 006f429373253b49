"""Models that are not as their family usually is: they work, or one sentence says why not."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_tokenizer

from sae_train.data.hooks import hook_points
from sae_train.data.language_model import describe_language_model, load_language_model
from sae_train.errors import UserError

SIZES = {"vocab_size": 72, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0,
         "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
TOKENS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def save(folder: Path, config, tokenizer=None) -> Path:
    """Write a random model of a configuration, with weights large enough to see every block."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def opt(**changes):
    from transformers import OPTConfig

    return OPTConfig(**SIZES, ffn_dim=32, max_position_embeddings=32, **{"word_embed_proj_dim": 16} | changes)


LACKING = {
    "no last norm": {"do_layer_norm_before": False},
    "no last norm by name": {"_remove_final_layer_norm": True},
    "a projection": {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
}


@pytest.mark.parametrize("changes", LACKING.values(), ids=LACKING)
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_a_module_of_the_familys_map_may_be_missing(changes, hook, tmp_path: Path) -> None:
    lm = load_language_model(save(tmp_path, opt(**changes)), hook)
    assert lm.activations(TOKENS).shape == (3, 12, 16) and hook_points(lm._model, "opt")[hook].norm is None
    torch.testing.assert_close(lm.logits(TOKENS, torch.sin, lm.start(TOKENS)), lm.logits(TOKENS, torch.sin))
    lm.read_out(torch.eye(16)[:2])


def larger_tokenizer(*tokens: str, special: bool = False):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(
    ("extra", "special"), [(["<extra>"], True), (["xylophone", "yes"], False), ([f"<{i}>" for i in range(40)], True)]
)
def test_ids_that_are_not_embedded_matter_only_where_they_occur(extra, special, tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=63, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    lm = load_language_model(save(tmp_path, config, larger_tokenizer(*extra, special=special)))
    assert len(lm.tokenizer) == 63 + len(extra) and set(range(63, 63 + len(extra))) <= lm.special_ids
    assert lm.activations(TOKENS).isfinite().all()
    tokens = torch.tensor(lm.tokenizer(f"w1 {extra[-1]} w2", add_special_tokens=False)["input_ids"])[None]
    for action in (lm.activations, lm.logits, lambda tokens: lm.logits_after(tokens[0], TOKENS[:, :1])):
        with pytest.raises(UserError, match=rf"{extra[-1]!r}, id {62 + len(extra)} .* embeds only 63 ids"):
            action(tokens)


@pytest.mark.parametrize("family", ["BertConfig", "RobertaConfig", "ElectraConfig"])
def test_a_model_that_sees_the_tokens_to_come_is_refused(family: str, tmp_path: Path) -> None:
    import transformers

    sizes = SIZES | {"intermediate_size": 32, "max_position_embeddings": 40, "embedding_size": 16}
    with pytest.raises(UserError, match="is no causal language model: its activations at a token change"):
        load_language_model(save(tmp_path / "both ways", getattr(transformers, family)(**sizes)))
    causal = save(tmp_path / "causal", getattr(transformers, family)(**sizes, is_decoder=True))
    assert load_language_model(causal).activations(TOKENS).shape == (3, 12, 16)


def streams():
    from transformers import CONFIG_MAPPING

    sizes = {"moe_intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8,
             "qk_rope_head_dim": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "index_n_heads": 2,
             "index_head_dim": 8, "index_topk": 2, "max_position_embeddings": 32}  # fmt: skip
    return CONFIG_MAPPING["deepseek_v4"](**SIZES | sizes)


def two_streams():
    from transformers import ReformerConfig

    return ReformerConfig(
        vocab_size=72, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=32,
        is_decoder=True, axial_pos_embds=False, max_position_embeddings=64, attn_layers=["local", "local"],
    )  # fmt: skip


def several_texts():
    from transformers import MusicgenConfig, MusicgenDecoderConfig, T5Config

    parts = (T5Config(d_model=16), MusicgenDecoderConfig(hidden_size=16))
    return MusicgenConfig(text_encoder=parts[0].to_dict(), decoder=parts[1].to_dict(),
                          audio_encoder={"model_type": "encodec"})  # fmt: skip


def test_a_residual_stream_of_several_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 64 values a token, not 16: its residual stream is more than one"):
        load_language_model(save(tmp_path / "wide", streams()))
    with pytest.raises(UserError, match="pass on several streams"):
        load_language_model(save(tmp_path / "two", two_streams()))


def test_a_model_of_several_texts_is_one_sentence(tmp_path: Path) -> None:
    several_texts().save_pretrained(tmp_path)
    for action in (describe_language_model, load_language_model):
        with pytest.raises(UserError, match=r"cannot load the model in .*ultiple valid text configs"):
            action(str(tmp_path))


def test_a_model_that_cannot_run_as_it_is_configured_is_one_sentence(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 72, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
    with pytest.raises(UserError, match=r"cannot run: shape .* is invalid"):  # its weights are split in four
        load_language_model(save(tmp_path / "codegen", transformers.CodeGenConfig(**sizes, n_embd=16)))
    sizes = SIZES | {"intermediate_size": 32, "languages": ["en", "de"], "default_language": None, "is_decoder": True}
    with pytest.raises(UserError, match="cannot run: Input language unknown"):
        load_language_model(save(tmp_path / "xmod", transformers.XmodConfig(**sizes)))


def returning_lists():
    from transformers import OpenAIGPTConfig

    return OpenAIGPTConfig(vocab_size=72, n_embd=16, n_layer=3, n_head=2, n_positions=32)


def returning_states():
    from transformers import RwkvConfig

    return RwkvConfig(vocab_size=72, hidden_size=16, num_hidden_layers=3, attention_hidden_size=16, context_length=32)


def returning_routers():
    from transformers import CONFIG_MAPPING

    sizes = {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
             "moe_intermediate_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip
    return CONFIG_MAPPING["zaya"](**SIZES | sizes | {"num_hidden_layers": 3})


@pytest.mark.parametrize("make", [returning_lists, returning_states, returning_routers], ids=lambda make: make.__name__)
@pytest.mark.parametrize("side", ["pre", "post"])
def test_blocks_that_return_more_than_one_value_start_late_or_not_at_all(make, side: str, tmp_path: Path) -> None:
    lm = load_language_model(save(tmp_path, make()), f"blocks.2.hook_resid_{side}")
    whole = lm.logits(TOKENS, torch.sin)
    torch.testing.assert_close(lm.logits(TOKENS, torch.sin, lm.start(TOKENS)), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, lm.logits(TOKENS))


@pytest.mark.parametrize(("family", "changes"), [("llama", {"max_position_embeddings": -1}), ("bloom", {})])
def test_a_model_without_a_largest_length_reads_as_usual(family: str, changes: dict, tmp_path: Path) -> None:
    file = save_tiny_model(tmp_path, family) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert describe_language_model(str(tmp_path)).context == load_language_model(tmp_path).context == 2048
