"""The shapes in the signatures of the seams are checked in tests (tests/conftest.py), and in tests alone."""

import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from sae_train.evals.scoring import score_words
from sae_train.kernels import ops
from sae_train.sae.model import SAE, SAEConfig
from sae_train.training.losses import mse

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.encode_topk(torch.ones(2, 3), torch.ones(4, 5), torch.ones(5), torch.ones(3), 1),
        lambda: ops.decode(torch.ones(2, 1), torch.zeros(2, 1), torch.ones(5, 3), torch.ones(3)),  # indices are floats
        lambda: SAE(SAEConfig("relu", d_in=3, d_sae=5)).encode(torch.ones(2, 3, dtype=torch.int64)),
        lambda: mse(torch.ones(2, 3), torch.ones(1, 3)),
        lambda: score_words(torch.ones(2, 5), torch.ones(3, 5), torch.ones(3), torch.ones(2, 3), [0]),
    ],
)
def test_a_wrong_shape_or_kind_is_refused(call) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_users_need_no_jaxtyping() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('jaxtyping', 'beartype'))\n"
        "import sae_train.kernels.ops, sae_train.sae.model, sae_train.training.losses, sae_train.evals.scoring"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
