"""The reader of Qwen-Scope's SAEs: files layerN.sae.pt, each a pickle of four tensors, W_enc (d_sae, d_in) among them.

latents = the k largest of x·W_encᵀ + b_enc, x̂ = latents·W_decᵀ + b_dec. The repository's name, such as
SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, tells the language model, the width and k.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_train.errors import UserError
from sae_train.sae.parts import Parts, repository_of
from sae_train.sae.tensor_files import read_pickled

FILE = re.compile(r"layer(\d+)\.sae\.pt")
REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")


def read_qwen_scope(folder: Path, weights: str) -> Parts:
    """Read one layer's file; UserError where its folder does not have the repository's name, without which k is not
    known."""
    repository, _ = repository_of(folder) or (folder.absolute().name, [])
    named = REPOSITORY.fullmatch(repository)
    if named is None:
        raise UserError(
            f"{folder / weights}: how many latents are active stands in the name of Qwen-Scope's repository alone: "
            "let the folder have that name, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50."
        )
    tensors = read_pickled(folder / weights)
    turned = {name: tensors[name].t() for name in ("W_enc", "W_dec") if name in tensors and tensors[name].ndim == 2}
    known = {
        "k": int(named["k"]), "apply_b_dec_to_input": False, "model_name": f"Qwen/{named['model']}",
        "hook_name": f"blocks.{FILE.fullmatch(weights)[1]}.hook_resid_post",
    }  # fmt: skip
    sizes = {"d_in": None, "width": 1024 * int(named["width"])}
    return Parts("topk", tensors | turned, known, sizes=sizes)
