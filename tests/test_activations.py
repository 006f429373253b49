"""The harvested tensor is the one that TransformerLens gives under the same name; bad input is one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny_model, tiny_tokenizer

from sae_train.data import forward, hooks
from sae_train.data.dtypes import DTYPES
from sae_train.data.hooks import KINDS, find_blocks, hook_points, residual_point, resolve_hook, width_at
from sae_train.data.language_model import LanguageModel, load_language_model
from sae_train.errors import UserError

TOKENS = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))


def bridge_cache(folder: Path, names: list[str], tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    """What the TransformerBridge itself caches under these names."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    with torch.no_grad():
        return bridge.run_with_cache(tokens, names_filter=names)[1]


def seen_from(lm: LanguageModel, point) -> LanguageModel:
    """The same model at another hook, without loading it again."""
    return LanguageModel(lm.name, lm._model, lm.tokenizer, point, lm.context)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_hook_equals_the_bridge(family: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path, family))
    points = hook_points(lm._model, family)
    cache = bridge_cache(tmp_path, list(points))
    assert {f"blocks.{i}.hook_resid_{end}" for i in (0, 1) for end in ("pre", "post")} <= set(points)
    for name, point in points.items():
        ours = seen_from(lm, point).activations(TOKENS)
        assert width_at(lm._model, point) == ours.shape[-1], name
        theirs = cache[name].reshape(ours.shape)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_that_start_late_have_the_bits_of_a_whole_pass(family: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path, family))
    for name, point in hook_points(lm._model, family).items():
        there = seen_from(lm, point)
        start = there.start(TOKENS)
        assert (start is None) == (name.startswith("blocks.0.") and not name.endswith("resid_post")), name
        torch.testing.assert_close(
            there.logits(TOKENS, torch.sin, start), there.logits(TOKENS, torch.sin), rtol=0, atol=0, msg=name
        )


@pytest.mark.parametrize(("hook", "layers"), [("blocks.1.hook_resid_post", (0, 1)), ("blocks.1.hook_mlp_out", (0,))])
def test_what_comes_before_the_hook_is_not_computed_again(hook: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path), hook)
    start, computed = lm.start(TOKENS), []
    for layer in layers:
        lm._model.transformer.h[layer].mlp.register_forward_hook(lambda *_: computed.append(1))
    lm.logits(TOKENS, start=start)
    assert not computed
    lm.logits(TOKENS)
    assert computed  # the block is whole again


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_where_transformer_lens_says_it_is(family: str, tmp_path: Path) -> None:
    model = load_language_model(save_tiny_model(tmp_path, family))._model
    points, blocks = hook_points(model, family), find_blocks(model)
    for name in (f"blocks.{i}.hook_resid_{end}" for i in (0, 1) for end in ("pre", "post")):
        assert residual_point(model, blocks, name) == points[name]


def test_transformer_lens_is_asked_for_other_hooks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_language_model(save_tiny_model(tmp_path))._model
    monkeypatch.setattr(hooks, "hook_points", lambda *_: pytest.fail("TransformerLens was asked"))
    assert resolve_hook(model, None, "tiny").name == "blocks.0.hook_resid_post"
    assert resolve_hook(model, "blocks.1.hook_resid_pre", "tiny").module == "transformer.h.1"
    for other in ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post", "blocks.0.hook_resid"):
        with pytest.raises(pytest.fail.Exception, match="was asked"):
            resolve_hook(model, other, "tiny")


@pytest.mark.parametrize("unclear", ["two lists", "blocks of two kinds", "an encoder", "too few"])
def test_blocks_are_left_to_transformer_lens_where_the_structure_is_not_plain(unclear: str, tmp_path: Path) -> None:
    model = load_language_model(save_tiny_model(tmp_path))._model
    assert find_blocks(model) == "transformer.h"
    if unclear == "two lists":
        model.vision = torch.nn.ModuleList(model.transformer.h)
    elif unclear == "blocks of two kinds":
        model.transformer.h[1] = torch.nn.Identity()
    elif unclear == "an encoder":
        model.config.is_encoder_decoder = True
    else:
        del model.transformer.h[1]
    assert find_blocks(model) is None


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("gpt-neox", "hook_resid_mid"),
        ("granite", "hook_mlp_out"),
        ("phi3", "mlp.hook_pre"),  # gate and up are one module
        ("mixtral", "mlp.hook_post"),  # every expert has its own
        ("gpt2", "attn.hook_q"),
    ],
)
def test_a_hook_that_the_architecture_lacks_is_refused(family: str, missing: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family)
    with pytest.raises(UserError, match=f"no hook 'blocks.0.{missing}'"):
        load_language_model(tmp_path, f"blocks.0.{missing}")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_models_and_edits_reach_them(kind: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path, "llama"), f"blocks.1.{kind}")
    clean = lm.logits(TOKENS)
    torch.testing.assert_close(clean, lm._model(TOKENS).logits, rtol=0, atol=0)
    torch.testing.assert_close(lm.logits(TOKENS, lambda x: x), clean, rtol=0, atol=0)
    assert not torch.allclose(lm.logits(TOKENS, torch.zeros_like), clean)
    torch.testing.assert_close(lm.logits(TOKENS), clean, rtol=0, atol=0)  # the edit is gone


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-neox", "gemma3", "olmo2"])
def test_read_out_is_what_the_model_says_of_a_direction_alone_after_its_last_block(family: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path, family), "blocks.1.hook_resid_post")
    directions = torch.randn(2, lm.d_in, generator=torch.Generator().manual_seed(1))
    ours = lm.read_out(directions)
    nothing = lm.logits(TOKENS[:1], torch.zeros_like)[0, -1]
    for direction, found in zip(directions, ours, strict=True):
        alone = lm.logits(TOKENS[:1], lambda x, d=direction: d.expand_as(x))[0, -1] - nothing
        torch.testing.assert_close(found, alone - alone.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["attn.hook_z", "mlp.hook_post"])
def test_directions_outside_the_residual_stream_have_no_read_out(kind: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path), f"blocks.1.{kind}")
    assert lm.read_out(torch.eye(lm.d_in)) is None


def test_gradients_flow_through_an_edit_and_not_into_the_model(tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path), "blocks.0.hook_resid_post")
    shift = torch.zeros(lm.d_in, requires_grad=True)
    lm.logits(TOKENS, lambda x: x + shift).square().sum().backward()
    assert shift.grad is not None and float(shift.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in lm._model.parameters())
    assert not lm.activations(TOKENS).requires_grad


def test_the_forward_stops_after_the_hook(tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path), "blocks.0.hook_resid_post")
    later = []
    lm._model.transformer.h[1].register_forward_hook(lambda *_: later.append(1))
    lm.activations(TOKENS)
    assert not later


def test_attributes_come_from_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path))
    assert (lm.hook_name, lm.d_in, lm.context) == ("blocks.0.hook_resid_post", 16, 32)
    assert (lm.bos_id, lm.special_ids) == (0, {0, 1, 2})
    assert lm.name == str(tmp_path)
    no_bos = load_language_model(save_tiny_model(tmp_path / "no_bos", bos=False))
    assert no_bos.bos_id is None and no_bos.special_ids == {1, 2}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "phi3", "gemma2"])
def test_the_tokenizer_is_the_one_in_the_folder(family: str, tmp_path: Path) -> None:
    tokenizer = load_language_model(save_tiny_model(tmp_path, family)).tokenizer
    assert tokenizer("w0 w59 nothing", add_special_tokens=False)["input_ids"] == [3, 62, 2]
    assert len(tokenizer) == 63


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_float32_whatever_the_model_runs_in(dtype: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path), dtype=dtype)
    assert lm._model.dtype is DTYPES[dtype]
    assert lm.activations(TOKENS).dtype is lm.logits(TOKENS).dtype is torch.float32


def test_an_unknown_hook_lists_the_near_ones(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    with pytest.raises(UserError, match=r"near ones are blocks\.1\.hook_resid_post.*2 blocks"):
        load_language_model(tmp_path, "blocks.1.hook_resid_pst")
    with pytest.raises(UserError, match=r"blocks\.\d\.hook_resid_post"):
        load_language_model(tmp_path, "blocks.7.hook_resid_post")


def test_bad_models_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_language_model(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no model folder"):
        load_language_model(tmp_path / "nowhere")
    broken = save_tiny_model(tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_language_model(broken)
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        load_language_model(broken, dtype="int8")


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    config = T5Config(vocab_size=72, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="causal language model"):
        load_language_model(tmp_path)


def test_missing_weights_are_not_filled_with_random_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_tiny_model(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack transformer\.h\.0\.mlp\.c_fc\.weight"):
        load_language_model(tmp_path)


def test_a_hub_id_offline_fails_at_once() -> None:
    with pytest.raises(UserError, match="cannot load 'someone/some-model-that-is-not-cached'"):
        load_language_model("someone/some-model-that-is-not-cached")


def test_a_hub_id_without_network_fails_at_once() -> None:
    """In a fresh process, as huggingface_hub reads its settings at import; port 9 refuses connections."""
    code = (
        "import time\nfrom sae_train.errors import UserError\n"
        "from sae_train.data.language_model import load_language_model\nimport transformers\n"
        "start = time.time()\ntry: load_language_model('someone/some-model-that-is-not-cached')\n"
        "except UserError as error: print(time.time() - start, error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, timeout=120
    )
    seconds, _, sentence = done.stdout.partition(" ")
    assert "cannot load 'someone/some-model-that-is-not-cached'" in sentence, done.stderr
    assert float(seconds) < 10  # the client's own retries take 23 s


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path))
    with pytest.raises(UserError, match="33 tokens do not fit the 32 positions"):
        lm.activations(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize(("model", "bos", "context"), [("craftgpt-5m", 0, 64), ("tiny1m", 1, 256)])
def test_real_models_equal_the_bridge(model: str, bos: int, context: int, shared_data: Path) -> None:
    folder = shared_data / "models" / model
    lm = load_language_model(folder, "blocks.3.hook_resid_post")
    tokens = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(1))
    cache = bridge_cache(folder, [lm.hook_name], tokens)
    torch.testing.assert_close(lm.activations(tokens), cache[lm.hook_name], rtol=1e-4, atol=1e-4)
    assert (lm.bos_id, lm.context) == (bos, context)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_behind_a_shared_prefix_has_the_activation_of_its_whole_prompt(family: str, tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path, family))
    prefix, words = TOKENS[0], torch.arange(3, 40)[:, None]
    for name, point in hook_points(lm._model, family).items():
        there = seen_from(lm, point)
        whole = there.activations(torch.cat([prefix.expand(len(words), -1), words], 1))[:, -1:]
        behind = there.activations_after(prefix, words)
        if name == "blocks.0.hook_resid_pre":  # nothing has looked back yet, so nothing of the prefix is kept
            assert behind is None
            continue
        assert float((behind - whole).norm() / whole.norm()) < 1e-5, name


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt", "bloom"])
def test_what_a_model_says_behind_a_shared_prefix_is_what_it_says_of_the_whole(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_language_model(save_tiny_model(tmp_path, family), "blocks.0.hook_resid_post")
    whole = torch.cat([TOKENS[0].expand(12, -1), torch.arange(3, 39).reshape(12, 3)], 1)
    expected, there = lm.logits(whole)[:, -3:], lm.activations(whole)[:, -3:]
    added = 3 * torch.randn(there.shape, generator=torch.Generator().manual_seed(0))
    edited = lm.logits(whole, lambda x: torch.cat([x[:, :-3], x[:, -3:] + added], 1))[:, -3:]
    assert float((edited - expected).abs().max()) > 0.01
    for elements in (forward.CACHE_ELEMENTS, 5 * 2 * 20 * 16):  # all rows at once, and a few at a time
        monkeypatch.setattr(forward, "CACHE_ELEMENTS", elements)
        torch.testing.assert_close(lm.logits_after(TOKENS[0], whole[:, -3:]), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(lm.logits_after(TOKENS[0], whole[:, -3:], added), edited, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(lm.activations_after(TOKENS[0], whole[:, -3:]), there, rtol=1e-5, atol=1e-4)


def test_a_prefix_and_what_stands_behind_it_must_fit_the_context(tmp_path: Path) -> None:
    lm = load_language_model(save_tiny_model(tmp_path), "blocks.0.hook_resid_post")
    with pytest.raises(UserError, match="33 tokens do not fit the 32"):
        lm.activations_after(torch.arange(3, 33), TOKENS[:, :3])


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_a_model_that_keeps_other_states_than_keys_and_values_reads_no_prefix(family: str, tmp_path: Path) -> None:
    import transformers as t

    sizes = {"vocab_size": 72, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
    heads = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    mixed = {**heads, "layer_types": ["conv", "full_attention"]}
    config = t.MambaConfig(**sizes, state_size=4) if family == "mamba" else t.Lfm2Config(**sizes, **mixed)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load_language_model(tmp_path, "blocks.1.hook_resid_post")
    assert lm.activations_after(TOKENS[0], TOKENS[:, :1]) is None
    assert lm.logits_after(TOKENS[0], TOKENS[:, :1]) is None
    assert lm.activations(TOKENS).shape == (*TOKENS.shape, 16)
