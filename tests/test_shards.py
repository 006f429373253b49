"""SAEs whose latents are split over processes (gloo, CPU): selection, losses and gradients against one process."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from processes import in_processes
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from sae_train.config import SAESpec, TrainSettings
from sae_train.kernels import ops
from sae_train.sae.model import SAE, SAEConfig
from sae_train.training import shards, start
from sae_train.training.architectures import TRAINED
from sae_train.training.learner import Learner
from sae_train.training.ranks import Mesh, arrange, current
from sae_train.training.selection import batch_topk, token_topk

D, WIDTH, BATCH, L0, SILENT = 12, 128, 64, 5, 40
STEPS = int(os.environ.get("SHARD_STEPS", "30"))  # with 200, four processes take minutes of two cores
SETTINGS = TrainSettings(tokens=STEPS * BATCH, batch_tokens=BATCH, dead_tokens=2 * BATCH)
MESHES = {"width over 2": (2, 2), "width over 4": (4, 4), "2 teams of 2": (4, 2)}
"""processes, and over how many of them the width is split"""
NAMES = ("losses/loss", "losses/aux_loss", "losses/sparsity_loss", "metrics/l0", "sparsity/dead_features")


@pytest.fixture
def in_float64(monkeypatch):
    """Rounding makes no difference then: in float32 a token in 100,000 has a tie, and what follows from it grows."""
    monkeypatch.setattr(start, "SAEConfig", partial(SAEConfig, dtype="float64"))


def data() -> torch.Tensor:
    return torch.randn(STEPS + 1, BATCH, D, generator=torch.Generator().manual_seed(0))


def learn(arch: str, mesh: Mesh) -> tuple[torch.Tensor, Learner]:
    """Train on this process's rows; latents that were silenced make the loss on dead latents work."""
    learner = Learner(SAESpec(arch=arch, width=WIDTH, l0=L0), SETTINGS, D, STEPS, mesh=mesh)
    learner.initialise(data()[:8].flatten(0, 1).to(learner.sae.W_dec))
    own = (torch.arange(WIDTH) < SILENT)[mesh.width.share(WIDTH)]
    with torch.no_grad():
        (learner.sae.b_gate if arch == "gated" else learner.sae.b_enc)[own] -= 50.0
    steps = [learner.step(x[mesh.data.share(BATCH)].to(learner.sae.W_dec)) for x in data()[:STEPS]]
    return torch.stack([torch.stack([step[name].double() for name in NAMES]) for step in steps]), learner


def bytes_of(learner: Learner) -> int:
    """Bytes of weights, of gradients, which have their shapes, and of moments."""
    moments = [value for p in learner.trained.values() for value in learner.optimiser.state[p].values() if value.ndim]
    return sum(tensor.nbytes for tensor in [*learner.trained.values(), *learner.leaves.values(), *moments])


def one_more(trained: Learner, mesh: Mesh) -> dict[str, torch.Tensor]:
    """What a step in float32 on a last batch selects, its loss and gradients, with the weights that it is made with."""
    x = data()[STEPS][mesh.data.share(BATCH)]
    learner = Learner(trained.spec, SETTINGS, D, STEPS, mesh=mesh)
    learner.load_state_dict(trained.state_dict())
    learner._set_dead((learner.idle_tokens >= learner.dead_tokens).nonzero().view(-1))
    coefficient = learner.control.coefficient if learner.control else torch.zeros(())
    run = learner.arch.forward(x)
    terms = learner._terms(x, run)
    sum(terms.values()).backward()
    learner._gradients()
    found = {
        "selected": mesh.collect(places(run.pattern, mesh)[run.values > 0]),
        "dead": mesh.width.collect(learner.dead + learner.first_latent),
        "coefficient": coefficient,
        "loss": mesh.data.mean(sum(terms.values()).detach()),
    }
    for name, p in learner.trained.items():
        whole = name == shards.WHOLE
        found[f"weights {name}"] = p.clone() if whole else mesh.width.collect(p)
        found[f"gradients {name}"] = p.grad.clone() if whole else mesh.width.collect(p.grad)
    return found | {f"state {name}": value for name, value in learner.arch.state.items()}


def of_integers(mesh: Mesh) -> dict[str, torch.Tensor]:
    """What is selected where most pre-activations have an equal: of the batch, and the values of each token."""
    g = torch.Generator().manual_seed(1)
    whole, own = (SAE(SAEConfig("topk", D, WIDTH // n)) for n in (1, mesh.width.size))
    for name, p in whole.named_parameters():
        p.data = torch.randint(-1, 2, p.shape, generator=g).float()
        getattr(own, name).data = shards.take(name, p, mesh.width)
    x = torch.randint(-1, 2, (BATCH, D), generator=g).float()[mesh.data.share(BATCH)]
    _, of_batch, smallest = batch_topk(x, own, BATCH * L0 + 1, torch.tensor(0.0), mesh)
    values, of_tokens = token_topk(x, own, L0, mesh.width)
    placed = torch.cat([places(of_tokens, mesh), values.detach()[:, None].long()], 1)
    return {"of batch": mesh.collect(places(of_batch, mesh)), "smallest": smallest, "of tokens": mesh.collect(placed)}


def places(pattern: ops.Pattern, mesh: Mesh) -> torch.Tensor:
    """Token and latent of each entry, counted over all processes."""
    tokens = pattern.tokens + mesh.data.rank * (pattern.offsets.numel() - 1)
    return torch.stack([tokens, pattern.latents + mesh.width.rank * pattern.d_sae], 1)


def work(rank: int, folder: str, n_processes: int, n_shards: int) -> None:
    """What each process does in the test below."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_processes)
    mesh = arrange(current(), n_shards)
    found = of_integers(mesh)
    assert (mesh.width.size, mesh.size) == (n_shards, n_processes)
    for arch in TRAINED:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(start, "SAEConfig", partial(SAEConfig, dtype="float64"))
            losses, learner = learn(arch, mesh)
        with learner.gathered():
            assert (learner.whole is not None) == mesh.width.is_first
            if mesh.width.is_first:
                found[f"{arch} W_enc"] = learner.whole.W_enc.detach().contiguous()
        found[f"{arch} bytes"] = torch.tensor(bytes_of(learner))
        step = one_more(learner, mesh)
        found |= {f"{arch} {name}": value.contiguous() for name, value in step.items()} | {f"{arch} losses": losses}
    save_file(found, Path(folder) / f"{rank}.safetensors")
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends by itself


def truth(arch: str, found: dict[str, torch.Tensor]) -> tuple[set, torch.Tensor, dict[str, torch.Tensor]]:
    """What one process selects in float64, the loss, and its gradients."""
    form = TRAINED[arch].form
    sae = SAE(SAEConfig(form, D, WIDTH, k=L0 if form == "topk" else None, dtype="float64"))
    kind = TRAINED[arch](sae, SAESpec(arch=arch, width=WIDTH, l0=L0), SETTINGS, Mesh())
    leaves = {"W_enc": sae.W_enc, "W_dec": sae.W_dec} | kind.leaves
    for name, leaf in leaves.items():
        value = found[f"weights {name}"].double()
        leaf.data = value.t() if name == "W_enc" else value
    kind.state = {name[6:]: value.double() for name, value in found.items() if name.startswith("state ")}
    kind.settle()
    x, kind.n_dead = data()[STEPS].double(), len(found["dead"])
    run = kind.forward(x)
    loss = run.error + kind.revival(run, x, run.recon, found["dead"]) + (0 if run.extra is None else run.extra)
    if run.sparsity is not None:
        loss = loss + found["coefficient"].double() * run.price * run.sparsity
    loss.backward()
    ops.remove_parallel(sae.W_dec.grad, sae.W_dec)
    active = run.values > 0
    selected = torch.stack([run.pattern.tokens[active], run.pattern.latents[active]], 1)
    gradients = {name: leaf.grad.t() if name == "W_enc" else leaf.grad for name, leaf in leaves.items()}
    return set(map(tuple, selected.tolist())), loss.detach(), gradients


@cache
def alone(arch: str) -> tuple[torch.Tensor, Learner]:
    """What one process learns."""
    return learn(arch, Mesh())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", MESHES)
def test_an_sae_in_shards_selects_loses_and_learns_what_a_whole_one_does(mesh, tmp_path, one_thread, in_float64):
    n_processes, n_shards = MESHES[mesh]
    in_processes(n_processes, work, str(tmp_path), n_processes, n_shards)
    files = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(n_processes)]
    check_ties(files[0])
    for arch in TRAINED:
        found = {name.removeprefix(f"{arch} "): v for name, v in files[0].items() if name.startswith(f"{arch} ")}
        for other in files[1:]:
            assert all(torch.equal(other[f"{arch} {name}"], found[name]) for name in ("losses", "gradients b_dec"))
        losses, learner = alone(arch)
        assert losses[-1, 4] > 0 and losses[:, 1].max() > 0, "no latent was dead: the test says too little"
        torch.testing.assert_close(found["losses"], losses, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["W_enc"], learner.sae.W_enc, rtol=1e-6, atol=1e-6)
        assert found["bytes"] < (1 / n_shards + 0.05) * bytes_of(learner)
        check_step(arch, found)


def check_ties(found: dict[str, torch.Tensor]) -> None:
    """Of equal pre-activations a batch keeps the same ones as in one process, and a token as many."""
    true = of_integers(Mesh())
    assert found["smallest"] == true["smallest"] > 0
    assert sorted(found["of batch"].tolist()) == true["of batch"].tolist()
    assert sorted(found["of tokens"][:, [0, 2]].tolist()) == sorted(true["of tokens"][:, [0, 2]].tolist())
    assert len(found["of tokens"].unique(dim=0)) == BATCH * L0


def check_step(arch: str, found: dict[str, torch.Tensor]) -> None:
    """Compare a step in float32 with float64: what is selected as a set, ties aside, the loss and each gradient."""
    selected, loss, gradients = truth(arch, found)
    rows = found["selected"].tolist()
    assert len(set(map(tuple, rows))) == len(rows) > BATCH
    different = selected ^ set(map(tuple, rows))
    assert not different, f"{arch}: {len(different)} of {len(selected)} selected latents are not the same"
    torch.testing.assert_close(found["loss"].double(), loss, rtol=1e-5, atol=0)
    for name, true in gradients.items():
        error = (found[f"gradients {name}"] - true).norm() / true.norm()
        assert error < 1e-5, f"{arch}: the gradient of {name} is off by {error:.1e} of its norm"
