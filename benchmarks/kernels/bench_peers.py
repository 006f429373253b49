"""The peers' sides of the benchmark: their own trainers' steps on our weights and batches, in their own environment.

As shipped means their defaults; equalised means fused Adam, TF32 and bfloat16 autocast where the device gains from
them, and SAELens' sparse option (which needs its decoder-norm rescaling off).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.bench_problem import BANDWIDTH, LR, Problem, on_gpu

MANY = 10**6


def _fuse(optimiser: torch.optim.Optimizer) -> None:
    """Turn an Adam that has not yet stepped into the fused one."""
    for group in optimiser.param_groups:
        group["fused"], group["foreach"] = True, False


class SAELens:
    """SAETrainer.step of sae_lens."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        sae = self._sae(sae_lens, p, level, equalised)
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.t())
            if p.arch == "relu":
                sae.b_enc.fill_(-level)
        config = SAETrainerConfig(
            total_training_samples=MANY * p.batch, train_batch_size_samples=p.batch, lr=LR, lr_end=LR,
            device=p.device, autocast=on_gpu(p, equalised), dead_feature_window=MANY, feature_sampling_window=MANY,
        )  # fmt: skip
        self.trainer = SAETrainer(config, sae, iter(()))
        if equalised:
            _fuse(self.trainer.optimizer)

    @staticmethod
    def _sae(sae_lens: Any, p: Problem, level: float, equalised: bool) -> Any:
        common = {"d_in": p.d_in, "d_sae": p.d_sae, "device": p.device, "decoder_init_norm": 1.0}
        if p.arch == "topk":
            sparse = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
            options = sparse if equalised and p.device == "cpu" else {}
            cfg = sae_lens.TopKTrainingSAEConfig(**common, k=p.k, **options)
            return sae_lens.TopKTrainingSAE(cfg).to(p.device)
        if p.arch == "relu":
            return sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(**common)).to(p.device)
        levels = {"jumprelu_init_threshold": level, "jumprelu_bandwidth": BANDWIDTH}
        return sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(**common, **levels)).to(p.device)

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae(x)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.trainer.optimizer]


class Sparsify:
    """The fit loop of eai-sparsify around SparseCoder, whose trainer cannot be had without a language model.

    As shipped it trains with Signum (schedule-free), which keeps one moment; `adam` is its option for Adam.
    """

    adam = True

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae = SparseCoder(p.d_in, SparseCoderConfig(num_latents=p.d_sae, k=p.k), device=p.device)
        with torch.no_grad():
            self.sae.W_dec.copy_(rows)
            self.sae.encoder.weight.copy_(rows)
        self.idle = torch.zeros(p.d_sae, dtype=torch.long, device=p.device)
        self.fired = torch.zeros(p.d_sae, dtype=torch.bool, device=p.device)
        torch.set_float32_matmul_precision("high")  # as its fit does
        self.optimiser = self._optimiser()
        if equalised and self.adam:
            _fuse(self.optimiser)

    def _optimiser(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.Adam(self.sae.parameters(), lr=LR)
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimiser = ScheduleFreeWrapper(SignSGD([{"params": self.sae.parameters(), "lr": LR}]), momentum=0.95)
        optimiser.train()
        return optimiser

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = self.sae(x, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.idle += len(x)
        self.idle[self.fired] = 0
        self.fired.zero_()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae(x).sae_out

    def optimisers(self) -> list[Any]:
        return [self.optimiser]


class SparsifyDefault(Sparsify):
    """The same with its default optimiser."""

    adam = False


class DictionaryLearning:
    """update() of dictionary_learning's trainers."""

    def __init__(self, p: Problem, rows: Tensor, level: float, equalised: bool):
        from dictionary_learning.trainers import jumprelu, standard, top_k

        common = {"steps": MANY, "activation_dim": p.d_in, "dict_size": p.d_sae, "layer": 0, "lm_name": "", "lr": LR}
        self.p, self.bf16 = p, on_gpu(p, equalised)
        if p.arch == "topk":
            self.trainer = top_k.TopKTrainer(**common, k=p.k, device=p.device)
        elif p.arch == "relu":
            self.trainer = standard.StandardTrainer(**common, device=p.device)
        else:
            extra = {"bandwidth": BANDWIDTH, "target_l0": float(p.k)}
            self.trainer = jumprelu.JumpReluTrainer(**common, **extra, device=p.device)
        self._load(rows, level)
        if equalised:
            _fuse(self.trainer.optimizer)
        self.n_steps = 1  # step 0 sets b_dec

    @torch.no_grad()
    def _load(self, rows: Tensor, level: float) -> None:
        ae = self.trainer.ae
        if self.p.arch == "jumprelu":
            ae.W_dec.copy_(rows)
            ae.W_enc.copy_(rows.t())
            ae.threshold.fill_(level)
            return
        ae.decoder.weight.copy_(rows.t())
        ae.encoder.weight.copy_(rows)
        ae.encoder.bias.fill_(-level if self.p.arch == "relu" else 0.0)

    def step(self, x: Tensor) -> None:
        with torch.autocast(self.p.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
            self.trainer.update(self.n_steps, x)
        self.n_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        return [self.trainer.optimizer]


PEERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "SAELens": (SAELens, ("topk", "relu", "jumprelu")),
    "sparsify + Adam": (Sparsify, ("topk",)),
    "sparsify + Signum": (SparsifyDefault, ("topk",)),
    "dictionary_learning": (DictionaryLearning, ("topk", "relu", "jumprelu")),
}
PACKAGES = {"SAELens": "sae-lens", "sparsify + Adam": "eai-sparsify", "sparsify + Signum": "eai-sparsify",
            "dictionary_learning": "dictionary-learning"}  # fmt: skip
