"""The architectures that can be trained, by the name that `--arch` takes; a new one is a file and a line here."""

from sae_train.training.architectures.base import Architecture, Forward
from sae_train.training.architectures.batchtopk import BatchTopK
from sae_train.training.architectures.gated import Gated
from sae_train.training.architectures.jumprelu import JumpReLU
from sae_train.training.architectures.matryoshka import Matryoshka
from sae_train.training.architectures.relu import ReLU
from sae_train.training.architectures.topk import TopK

TRAINED: dict[str, type[Architecture]] = {
    "relu": ReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "gated": Gated,
}

__all__ = ["TRAINED", "Architecture", "Forward"]
