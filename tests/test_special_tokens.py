"""Special tokens, whatever a tokenizer calls them by, are left out of training, scale and figures alike."""

from pathlib import Path

import pytest
import torch
from tiny_gguf import byte_tokenizer, save_twins, write_gguf
from tiny_models import save_tiny_model, tiny_tokenizer
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from sae_train.config import resolve
from sae_train.data.harvest import dropped, is_seen
from sae_train.data.language_model import load_language_model
from sae_train.data.pretrained import tokenizer_of
from sae_train.data.text_source import open_text
from sae_train.evals import vocab
from sae_train.evals.fidelity import FidelityData
from sae_train.evals.hierarchy import FIRST_LETTER
from sae_train.runs.session import begin, open_session
from sae_train.training.ranks import Ranks

TURN, PLAIN = "<turn>", "plain"


def with_added_tokens(folder: Path) -> Path:
    """A tokenizer over words, to which two tokens were added: only the first is special, and none is named so."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(TURN, special=True, normalized=False), AddedToken(PLAIN, special=False)])
    return _with_tokenizer(save_tiny_model(folder, "llama"), tokenizer)


def with_extra_special_tokens(folder: Path) -> Path:
    """The same, but that the special one is named as an extra one, as chat models' are."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [TURN]})
    tokenizer.add_tokens([AddedToken(PLAIN, special=False)])
    return _with_tokenizer(save_tiny_model(folder, "gpt2"), tokenizer)


def as_bytes(folder: Path) -> Path:
    """Byte pairs, whose special token stands in the midst of a word's letters."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(TURN, special=True, normalized=False), AddedToken(PLAIN, special=False)])
    return _with_tokenizer(save_twins(folder)[1], tokenizer)


def _with_tokenizer(folder: Path, tokenizer) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


KINDS = {"words": with_added_tokens, "named": with_extra_special_tokens, "bytes": as_bytes}


@pytest.fixture(params=KINDS)
def model(request, tmp_path) -> Path:
    return KINDS[request.param](tmp_path / "model")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    lines = [f"{TURN} w{i % 60} w{i % 7} {PLAIN} w{i % 11} {TURN} w{i % 5}" for i in range(600)]
    path.write_text("\n".join(lines))
    return path


def settings_of(model: Path, text: Path):
    return resolve({
        "model": str(model), "dataset": str(text), "context": 16, "width": 32, "l0": 4, "tokens": 6400,
        "batch_tokens": 64, "buffer_tokens": 256, "held_out_tokens": 256, "absorption": False, "device": "cpu",
        "hook": "blocks.0.hook_resid_post", "outlier_norm": "none",
    })  # fmt: skip


def test_the_ids_are_those_of_all_special_tokens_and_of_no_others(model):
    tokenizer, lm = tokenizer_of(str(model)), load_language_model(str(model))
    turn, plain = tokenizer.convert_tokens_to_ids([TURN, PLAIN])
    assert lm.special_ids == {0, 1, 2, turn} and plain not in lm.special_ids
    words, counts = vocab.entries(tokenizer, lm.special_ids, FIRST_LETTER)
    assert plain in words.token_ids and turn not in words.token_ids and counts["dropped: special token"] == 4


def test_no_activation_of_a_special_token_is_trained_on_or_counted(model, text, monkeypatch):
    settings = settings_of(model, text)
    lm = load_language_model(str(model), settings.lm.hook)
    turn, plain = lm.tokenizer.convert_tokens_to_ids([TURN, PLAIN])

    def ids_as_activations(tokens):
        marked = tokens.float()[..., None] + torch.linspace(0, 0.5, lm.d_in)
        return torch.where((tokens == turn)[..., None], torch.inf, marked)

    source = open_text(lm, settings, Ranks())
    rows = source.stream.held_out
    assert turn in rows and plain in rows
    seen = is_seen(rows, dropped(lm), skip_first=False)
    assert not seen[rows == turn].any() and seen[rows == plain].all()
    monkeypatch.setattr(type(lm), "activations", lambda self, tokens: ids_as_activations(tokens))
    session = open_session(settings)
    begin(session)
    seen = session.first
    assert torch.tensor(seen.scale).isfinite() and seen.scale > 0
    parts = [seen.held_out, seen.calibration, *(next(seen.data) for _ in range(8))]
    found = {int(token) for part in parts for token in part[:, 0].round()}
    assert plain in found and not found & lm.special_ids


def test_a_special_token_keeps_its_activation_in_loss_recovered_and_is_not_predicted(model, text):
    lm = load_language_model(str(model), "blocks.0.hook_resid_post")
    turn, plain = lm.tokenizer.convert_tokens_to_ids([TURN, PLAIN])
    data = FidelityData.build(lm, open_text(lm, settings_of(model, text), Ranks()).stream.held_out[:4])
    for ids in (data.special_ids, data.kept_ids):
        assert turn in ids and plain not in ids


def test_control_tokens_of_a_gguf_file_are_special(tmp_path):
    import gguf

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    add, kinds = gguf.GGUFWriter.add_token_types, []

    def with_one_more(writer, types):
        types[5] = gguf.TokenType.CONTROL
        kinds.append(types)
        add(writer, types)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_token_types", with_one_more)
        path = write_gguf(tmp_path / "tiny.gguf", LlamaForCausalLM(config), byte_tokenizer(), {})
    assert kinds and load_language_model(str(path)).special_ids == {0, 1, 2, 5}
