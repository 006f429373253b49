"""The architectures that can be trained, by the name that `--arch` takes; a new one is a file and a line here."""

from sae_train.architectures.base import Architecture, Forward
from sae_train.architectures.batchtopk import BatchTopK
from sae_train.architectures.gated import Gated
from sae_train.architectures.jumprelu import JumpReLU
from sae_train.architectures.matryoshka import Matryoshka
from sae_train.architectures.relu import ReLU
from sae_train.architectures.topk import TopK

TRAINED: dict[str, type[Architecture]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "gated": Gated,
}

__all__ = ["TRAINED", "Architecture", "Forward"]
