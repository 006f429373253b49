"""SAELens' side of quality.py, for an environment with sae-lens: it trains the SAEs that a job file asks for.

Each SAE is trained by SAELens' SAETrainer on the batches in the job's file. relu and jumprelu have no L0 to ask for, so
coefficients are tried until two SAEs lie close to the wanted L0, one on either side. What is finished is not redone.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE, JumpReLUTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

CONFIGS = {"relu": StandardTrainingSAEConfig, "topk": TopKTrainingSAEConfig, "jumprelu": JumpReLUTrainingSAEConfig}
COEFFICIENTS = {"relu": "l1", "jumprelu": "l0"}
CLOSE = 1.15  # the SAEs on either side of the wanted L0 are at most 15 % away from it
AIM = 1.06  # where the next one is aimed at, on the side that has none so close
SCALE_BATCHES = 8  # of 2,048: 16,384 activations, as many as sae-train takes for its scale
CHECKED = 64


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    batches = np.load(job["batches"], mmap_mode="r")
    held_out = torch.from_numpy(np.load(job["held_out"]))
    for want in job["searches"]:
        if want["arch"] == "topk":
            train(job, want, None, batches, held_out)
        else:
            search(job, want, batches, held_out)


def search(job: dict[str, Any], want: dict[str, Any], batches: Any, held_out: torch.Tensor) -> None:
    """Train until L0 is bracketed closely, or as many SAEs are trained as may be."""
    points = [
        _point(want, json.loads(path.read_text())) for path in Path(job["out"]).glob(f"{_stem(want)}-*/trained.json")
    ]
    x, slope = math.log(want["start"]), -1.5
    while True:
        points.sort(key=lambda point: abs(point[1]))
        if len(points) > 1:
            slope = min((points[1][1] - points[0][1]) / (points[1][0] - points[0][0]), -0.2)
        missing = [side for side in (1, -1) if not any(0 <= side * off <= math.log(CLOSE) for _, off in points)]
        if not missing or len(points) >= want["tries"]:
            return
        if points:
            x = points[0][0] + max(-2.5, min(2.5, (missing[0] * math.log(AIM) - points[0][1]) / slope))
        points.append(_point(want, train(job, want, float(f"{math.exp(x):.4g}"), batches, held_out)))


def _point(want: dict[str, Any], trained: dict[str, Any]) -> tuple[float, float]:
    """Log coefficient, and log of L0 over the wanted one."""
    return math.log(trained["coefficient"]), math.log(max(trained["l0"], 0.01) / want["l0"])


def _stem(want: dict[str, Any]) -> str:
    return f"{want['name']}-seed_{want['seed']}"


def train(
    job: dict[str, Any], want: dict[str, Any], coefficient: float | None, batches: Any, held_out: Any
) -> dict[str, Any]:
    """Train and save one SAE, unless it exists; return what it is and its L0 on held-out activations."""
    folder = Path(job["out"]) / f"{_stem(want)}-{coefficient or 0:.4g}"
    done = folder / "trained.json"
    if not done.is_file():
        sae = _fit(job, want, coefficient, batches)
        sae.save_inference_model(folder)
        sae = SAE.load_from_disk(str(folder))
        with torch.no_grad():
            np.save(folder / "checked.npy", sae(held_out[:CHECKED]).numpy())
            l0 = (sae.encode(held_out) > 0).sum().item() / len(held_out)
        done.write_text(json.dumps(want | {"coefficient": coefficient, "l0": l0}))
    trained = json.loads(done.read_text())
    print(f"{folder.name}: L0 {trained['l0']:.2f}", flush=True)
    return trained


def _fit(job: dict[str, Any], want: dict[str, Any], coefficient: float | None, batches: Any) -> Any:
    options = dict(want["options"])
    if coefficient is None:
        options["k"] = round(want["l0"])
    else:
        name = COEFFICIENTS[want["arch"]]
        options |= {f"{name}_coefficient": coefficient}
        options.setdefault(f"{name}_warm_up_steps", job["warm_up"])
    config = CONFIGS[want["arch"]](
        d_in=job["d_in"], d_sae=job["width"], normalize_activations="expected_average_only_in", **options
    )
    torch.manual_seed(want["seed"])
    sae = get_sae_training_class(config.architecture())[0](config)
    n_steps, batch = len(batches), batches.shape[1]
    trainer = SAETrainerConfig(
        total_training_samples=n_steps * batch, train_batch_size_samples=batch, lr=want["lr"], lr_end=want["lr"] / 10,
        lr_warm_up_steps=job["warm_up"], lr_decay_steps=job["decay"], dead_feature_window=job["window"],
        n_batches_for_norm_estimate=SCALE_BATCHES,
    )  # fmt: skip
    stream = (torch.from_numpy(np.array(x)) for x in itertools.chain(batches[:SCALE_BATCHES], batches))
    return SAETrainer(trainer, sae, stream).fit()


if __name__ == "__main__":
    main()
