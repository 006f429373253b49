"""A tiny llama twice, as a GGUF file and as a Hugging Face folder with the same weights and tokenizer."""

from pathlib import Path

import gguf
import numpy as np
import torch

TEXT = [
    "the snake smiled at a small stone",
    "a brave bird brought bread in 1987",
    "we saw 12 old houses  34 times",
] * 50
PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
Q8 = gguf.GGMLQuantizationType.Q8_0


def byte_tokenizer():
    """Byte-level pairs that split numbers digit by digit, as SmolLM2's; ids 0, 1, 2 are <unk>, <bos>, <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<unk>", "<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def save_twins(folder: Path, **changes: object) -> tuple[Path, Path]:
    """Write folder/tiny.gguf and folder/hf; `changes` are metadata of the GGUF file, such as general.architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if parameter.ndim == 2:  # what eight bits hold of it, so that both twins hold the same
                parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(parameter.numpy(), Q8), Q8)))
    model.save_pretrained(folder / "hf")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "hf")
    return write_gguf(folder / "tiny.gguf", model, tokenizer, changes), folder / "hf"


def write_gguf(path: Path, model: torch.nn.Module, tokenizer, changes: dict[str, object]) -> Path:
    """Write a llama in eight bits."""
    config = model.config
    writer = gguf.GGUFWriter(path, str(changes.get("architecture", "llama")))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp has the two halves of a head's rows take turns
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = np.ascontiguousarray(halves.reshape(values.shape))
        if values.ndim == 2:
            writer.add_tensor(_gguf_name(name), gguf.quantize(values, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer, size: int) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    for token, i in model["vocab"].items():
        tokens[i] = token
    kinds = [gguf.TokenType.NORMAL] * size
    kinds[:3] = [gguf.TokenType.CONTROL] * 3
    kinds[len(model["vocab"]) :] = [gguf.TokenType.UNUSED] * (size - len(model["vocab"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in OTHERS:
        return f"{OTHERS[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"
