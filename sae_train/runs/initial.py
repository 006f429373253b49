"""The SAE that a run starts from (`--init-from`): where it is, whether it fits, and what run.json keeps of it."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_train.config import LOCAL_NAMES, read_yaml
from sae_train.config.units import ARCHITECTURES
from sae_train.errors import UserError
from sae_train.runs.display import aside
from sae_train.runs.folder import find_model

if TYPE_CHECKING:
    from sae_train.config import Settings
    from sae_train.data.sources import Facts
    from sae_train.sae.model import SAE

# A repo with its owner, a revision and a folder in it, as huggingface_hub writes them in hf:// addresses.
ON_HUB = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+))?")
IN_A_BLOCK = re.compile(r"blocks\.\d+\.\S+")  # hooks by TransformerLens' names: others are other libraries' own
SAME_NORM = 0.01  # how far the norms of a topk SAE's decoder rows may be apart


class InitialSAE:
    """An SAE by its name; it is read when it is first needed, since a resumed run may not need it."""

    def __init__(self, name: str, allow_pickle: bool = False, before: dict[str, Any] | None = None):
        """`before` is the record of a run that began with it: the same weights must be there again."""
        self.name, self.allow_pickle, self.before = name, allow_pickle, before or {}

    @functools.cached_property
    def place(self) -> Path:
        """Where it is on this disk; UserError where it cannot be had."""
        from sae_train.sae.files import find_sae

        if Path(self.name).expanduser().exists() or not (named := ON_HUB.fullmatch(self.name)):
            return find_sae(self.name, allow_pickle=self.allow_pickle)
        revision = self.before.get("revision") or named["revision"]
        return find_sae(named["repo"], named["folder"], revision, self.allow_pickle)

    @functools.cached_property
    def sae(self) -> SAE:
        """The SAE for raw activations; UserError for one that cannot be read or has changed."""
        from sae_train.sae.layouts import read_sae

        sae = read_sae(self.place, "cpu", self.allow_pickle)
        if self.before.get("sha256") not in (None, self.sha256):
            raise UserError(
                f"the SAE {self.name!r} changed since the run began with it: put back what it was, or start a new run"
            )
        return sae

    def forget(self) -> None:
        """Give its memory back; it is read again where it is needed again."""
        self.__dict__.pop("sae", None)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of its file of weights."""
        from sae_train.sae.layouts import find_weights

        with find_weights(self.place).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def arch(self) -> str:
        """The architecture that trained it, as far as it says so, else its form."""
        trained_as = self.sae.cfg.metadata.get("trained_as")
        return trained_as if trained_as in ARCHITECTURES else self.sae.cfg.architecture

    @property
    def l0(self) -> float | None:
        """Its L0, where that is known."""
        return self.sae.cfg.k or self.sae.cfg.l0

    @property
    def record(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        from sae_train.sae.parts import revision_of

        local = Path(self.name).expanduser().exists()
        return {
            "name": self.name,
            "path": str(self.place.absolute()) if local else None,
            "revision": None if local else revision_of(self.place),
            "sha256": self.sha256,
            "arch": self.arch,
            "l0": self.l0,
        }

    @property
    def note(self) -> str:
        cfg, l0 = self.sae.cfg, f", L0 {self.l0:.4g}" if self.l0 else ""
        of = " of ".join(filter(None, (cfg.hook_name, cfg.model_name)))
        return f"training starts from the SAE {self.name} ({self.arch}, {cfg.d_sae:,} latents{l0}{of and f', of {of}'})"

    def defaults(self) -> dict[str, Any]:
        """The settings that it has an answer to."""
        cfg, model = self.sae.cfg, find_model(self.sae.cfg.model_name, self.place)
        known = {
            "width": cfg.d_sae,
            "arch": self.arch,
            "l0": max(1, round(self.l0)) if self.l0 else None,
            "model": model,
            "hook": cfg.hook_name if IN_A_BLOCK.fullmatch(cfg.hook_name) else None,
        }
        return {name: value for name, value in known.items() if value}

    def check(self, settings: Settings, facts: Facts) -> None:
        """UserError, a sentence for each fault, where the run's SAEs cannot start from it."""
        from sae_train.training.architectures import TRAINED

        cfg, name = self.sae.cfg, f"the SAE {self.name!r}"
        problems = [
            f"width {width} is not that of {name}, which has {cfg.d_sae} latents: leave --width out"
            for width in settings.sae.width
            if width != cfg.d_sae
        ]
        allowed = ", ".join(arch for arch, trained in TRAINED.items() if trained.form == cfg.architecture)
        problems += [
            f"{arch} cannot start from {name}, which is a {cfg.architecture} SAE: choose from {allowed}"
            for arch in settings.sae.arch
            if TRAINED[arch].form != cfg.architecture
        ]
        if facts.d_in != cfg.d_in:
            where = facts.hook_name or "the source"
            problems.append(f"{name} takes {cfg.d_in} values a token and {where} has {facts.d_in}")
        if IN_A_BLOCK.fullmatch(cfg.hook_name) and facts.hook_name not in ("", cfg.hook_name):
            problems.append(f"{name} is of {cfg.hook_name}, not of {facts.hook_name}: leave --hook out")
        if len(settings.sae.seed) > 1:
            problems.append(f"several seeds make no difference where all SAEs start from {name}: give one")
        problems += self._unequal_rows()
        if problems:
            raise UserError("\n".join(problems))

    def _unequal_rows(self) -> list[str]:
        """Why a topk SAE cannot be trained on: its selection depends on the norms of decoder rows, which become 1."""
        norms = self.sae.W_dec.detach().norm(dim=1)
        used = norms[norms > 0]
        if self.sae.cfg.architecture != "topk" or not len(used) or used.max() <= (1 + SAME_NORM) * used.min():
            return []
        return [
            f"decoder rows of the SAE {self.name!r} have norms of {used.min():.3g} to {used.max():.3g}: topk SAEs are "
            "trained with rows of one norm, with which it would choose other latents"
        ]


def with_initial(given: dict[str, Any], file: str | Path | None = None, of_text: bool = True) -> dict[str, Any]:
    """The settings that were given and, where they name an SAE to start from, what that says of the others.

    What the settings file or the user says wins. The toy has one hook, and activations of a user's own (not `of_text`)
    have none that could be chosen.
    """
    said = {name: value for name, value in given.items() if value is not None}
    asked = (read_yaml(file) if file else {}) | said
    if not asked.get("init_from"):
        return given
    initial = InitialSAE(str(asked["init_from"]), asked.get("allow_pickle") is True)
    with aside() as display:
        display(f"reading the SAE {initial.name}")
        known = initial.defaults()
    if "l0" not in known and "l0" not in asked:
        raise UserError(f"the SAE {initial.name!r} does not say what L0 it has: give --l0")
    if not of_text or asked.get("model", known.get("model")) in LOCAL_NAMES - {"speller", "smollm2"}:
        known.pop("hook", None)
    if not of_text:
        known.pop("model", None)
    return {name: value for name, value in known.items() if name not in asked} | said


def initial_of(settings: Settings, before: dict[str, Any] | None = None) -> InitialSAE | None:
    """The SAE that a run starts from, None where it starts from random directions."""
    train = settings.train
    return InitialSAE(train.init_from, train.allow_pickle, before) if train.init_from else None
