"""A tiny language model and tokenizer for the evals' tests: what the code asks of the real ones, in a few lines."""

from __future__ import annotations

import torch

D_IN = 64


def word_tokenizer(words: list[str], extra: tuple[str, ...] = ("\n", ":", " has", " the", " first", " letter")):
    """A real fast tokenizer with one token per word, capital letters with a space, and <bos>, <unk>."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [f" {chr(65 + i)}" for i in range(26)]
    entries = dict.fromkeys(["<bos>", "<unk>", *extra, *letters, *words])
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<unk>"))
    pattern = Regex(r" ?[A-Za-z]+|\n|[^A-Za-z\s]")
    raw.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token="<unk>")


class FakeLM:
    """Activations are a letter direction, a word direction and a little of the token before; logits read the letter.

    `letter_scale` 0 makes first letters unreadable.
    """

    def __init__(self, tokenizer, letter_scale: float = 4.0, seed: int = 0, context: int = 128):
        g = torch.Generator().manual_seed(seed)
        self.name, self.tokenizer, self.hook_name = "fake", tokenizer, "blocks.0.hook_resid_post"
        self.d_in, self.device, self.context = D_IN, torch.device("cpu"), context
        self.dtype = torch.float32
        self.bos_id, self.special_ids = tokenizer.bos_token_id, set(tokenizer.all_special_ids)
        self.letters = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=g))[0][:26]
        self.table = torch.randn(len(tokenizer), D_IN, generator=g) * 0.1
        for word, token_id in tokenizer.get_vocab().items():
            core = word.strip()
            if core.isalpha() and core.isascii():
                self.table[token_id] += letter_scale * self.letters[ord(core[0].upper()) - 65]
        self.unembed = torch.randn(D_IN, len(tokenizer), generator=g)

    def activations(self, tokens):
        here = self.table[tokens]
        before = torch.nn.functional.pad(here, (0, 0, 1, 0))[:, :-1]
        return here + 0.05 * before

    def activations_after(self, prefix, tokens):
        return self.activations(torch.cat([prefix.expand(len(tokens), -1), tokens], 1))[:, len(prefix) :]

    def start(self, tokens):
        """Nothing comes before the hook."""

    def logits(self, tokens, edit=None, start=None):
        x = self.activations(tokens)
        return (x if edit is None else edit(x)) @ self.unembed

    def logits_after(self, prefix, tokens, added=None):
        whole = torch.cat([prefix.expand(len(tokens), -1), tokens], 1)
        more = None if added is None else torch.nn.functional.pad(added, (0, 0, len(prefix), 0))
        return self.logits(whole, None if more is None else lambda x: x + more)[:, len(prefix) :]

    def read_out(self, directions):
        return directions @ self.unembed


def fake_words(per_letter: int = 10) -> list[str]:
    """Distinct words, some with a leading space, some capitalised."""
    tails = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(3)) + chr(97 + i) for i in range(per_letter)]
    return [
        (" " if i % 2 else "") + (chr(65 + c) if i % 3 == 0 else chr(97 + c)) + tail
        for c in range(26)
        for i, tail in enumerate(tails)
    ]


class Decodes:
    """What every SAE has beside encode and W_dec, for stand-ins that only say what fires."""

    @property
    def W_enc(self):
        return self.W_dec.T

    @property
    def b_dec(self):
        return torch.zeros_like(self.W_dec[0])

    def decode(self, latents):
        return latents @ self.W_dec
