"""The architecture and the tokenizer of the embedded model, as Hugging Face objects.

Two blocks with short-window attention build each token's state; the hook follows them; two blocks with
attention alone then read it. Nothing non-linear stands between the hook and the logits but normalisation
and attention weights, so what the model says about a word must be linearly present at the hook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_train.speller.corpus import CONTEXT
from sae_train.speller.language import BOS, UNK
from sae_train.speller.words import TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, SmolLM3ForCausalLM

HOOK_NAME = "blocks.1.hook_resid_post"
N_BEFORE, N_LAYERS, D_MODEL, D_MLP, N_HEADS, WINDOW = 2, 4, 256, 512, 4, 3


def build_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, the space before it included; decoding joins tokens as they are."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN.pattern), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        unk_token=UNK,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(n_vocabulary: int) -> SmolLM3ForCausalLM:
    """A SmolLM3 model whose last blocks' MLPs are zero and stay so.

    SmolLM3 is Llama with a window per block. (Qwen2 has that too, but AutoTokenizer replaces its tokenizer.)
    """
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        vocab_size=n_vocabulary,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        max_position_embeddings=CONTEXT,
        layer_types=["sliding_attention"] * N_BEFORE + ["full_attention"] * (N_LAYERS - N_BEFORE),
        use_sliding_window=True,
        sliding_window=WINDOW,
        no_rope_layers=[1] * N_LAYERS,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = SmolLM3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    for layer in model.model.layers[N_BEFORE:]:
        layer.mlp.requires_grad_(False)
        for weight in layer.mlp.parameters():
            weight.zero_()
    return model
