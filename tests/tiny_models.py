"""Random models of real architectures, small enough to make in a test, saved as Hugging Face folders."""

from pathlib import Path

import torch

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<bos>", "<eos>", "<unk>"]


def tiny_tokenizer(bos: bool = True, eos: bool = True):
    """Whitespace tokenizer over WORDS; ids 0, 1, 2 are <bos>, <eos>, <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    names = {"bos_token": "<bos>"} if bos else {}
    names |= {"eos_token": "<eos>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **names)


def _configs() -> dict:
    import transformers as t

    v = 72  # more than the tokenizer needs, as real models have
    llama_like = {
        "vocab_size": v,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    grouped = {**llama_like, "num_key_value_heads": 1}
    return {
        "gpt2": lambda: t.GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "llama": lambda: t.LlamaConfig(**grouped),
        "gpt-neox": lambda: t.GPTNeoXConfig(**llama_like),
        "gpt-neox-sequential": lambda: t.GPTNeoXConfig(**llama_like, use_parallel_residual=False),
        "gemma2": lambda: t.Gemma2Config(**grouped, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
        "gemma3": lambda: t.Gemma3TextConfig(**grouped, head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
        "qwen2": lambda: t.Qwen2Config(**grouped),
        "qwen3": lambda: t.Qwen3Config(**grouped, head_dim=8),
        "mistral": lambda: t.MistralConfig(**grouped),
        "olmo2": lambda: t.Olmo2Config(**grouped),
        "phi": lambda: t.PhiConfig(**llama_like),
        "phi3": lambda: t.Phi3Config(**grouped, pad_token_id=0),
        "granite": lambda: t.GraniteConfig(**grouped, residual_multiplier=0.5),
        "mixtral": lambda: t.MixtralConfig(**grouped, num_local_experts=2),
        "gptj": lambda: t.GPTJConfig(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4),
        "gpt-neo": lambda: t.GPTNeoConfig(
            vocab_size=v,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=32,
            window_size=8,
        ),
        "opt": lambda: t.OPTConfig(
            vocab_size=v,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        ),
        "bloom": lambda: t.BloomConfig(vocab_size=v, hidden_size=16, n_layer=2, n_head=2),
        "falcon": lambda: t.FalconConfig(vocab_size=v, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    }


FAMILIES = tuple(_configs())


def save_tiny_model(folder: Path, family: str = "gpt2", seed: int = 0, **tokenizer_options) -> Path:
    """Write a random model of the family with the tiny tokenizer, and return the folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = _configs()[family]()
    config.bos_token_id, config.eos_token_id = 0, 1
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # The default initialisation (0.02) leaves every block next to the identity: no test would see a wrong hook.
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer(**tokenizer_options).save_pretrained(folder)
    return folder
