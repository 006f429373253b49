"""The sae-bench side of the cross-check and of the speed comparison; it runs in an environment with sae-bench 0.6.0.

    python tests/crosscheck/saebench_peer.py JOB.json

The job names a folder of inputs (words, split, activations, probe), SAE folders in SAELens layout, and runs; out go, as
JSON, main latents per letter, fraction and full flag per word, means and seconds per stage. sae-bench's own `run_eval`
does everything but the language model: a stand-in answers from the stored activations.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

PACKAGES = ("sae-bench", "sae-lens", "transformer-lens", "torch", "scikit-learn", "numpy", "pandas")
QUESTION = " has the first letter:"


def main(job_file: Path) -> None:
    """Carry out the job and write its answer."""
    import torch

    job = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    inputs = _inputs(Path(job["folder"]))
    out: dict[str, Any] = {"versions": {p: version(p) for p in PACKAGES}, "threads": torch.get_num_threads()}
    if job.get("time_probe"):
        out["probe_seconds"] = _probe_seconds(inputs)
    if job.get("model_sizes"):
        out["model_seconds"] = _model_seconds(inputs, job["model_sizes"])
    _store_probe(inputs, Path(job["folder"]) / "probes")
    os.chdir(job["folder"])  # run_eval writes artifacts beside it
    out["saes"] = {path: _one_sae(path, inputs, job) for path in job["saes"]}
    out["schema_errors"] = {path: _schema_error(Path(path)) for path in job.get("validate", [])}
    Path(job["output"]).write_text(json.dumps(out))


def _inputs(folder: Path) -> SimpleNamespace:
    from safetensors.torch import load_file

    return SimpleNamespace(
        **load_file(folder / "inputs.safetensors"), **json.loads((folder / "words.json").read_text())
    )


def _one_sae(path: str, inputs: SimpleNamespace, job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from sae_lens import SAE
    from safetensors.torch import load_file, save_file

    sae = SAE.load_from_disk(path)
    with torch.no_grad():
        ours = load_file(Path(job["folder"]) / f"latents-{Path(path).name}.safetensors")["latents"]
        difference = float((sae.encode(inputs.tp_x) - ours).abs().max() / ours.abs().max())
    runs = {}
    for run in job["runs"]:
        runs[run["name"]], weights = _one_run(sae, Path(path).name, inputs, run, Path(job["folder"]))
        if run.get("keep_weights"):
            save_file(weights, Path(job["folder"]) / f"weights-{Path(path).name}.safetensors")
    return {"latents_difference": difference, "runs": runs}


def _one_run(sae: Any, name: str, inputs: SimpleNamespace, run: dict, folder: Path) -> tuple[dict, dict]:
    """One whole evaluation by sae-bench's run_eval."""
    import torch
    from sae_bench.evals.absorption import eval_config, k_sparse_probing, main

    torch.manual_seed(run["seed"])
    random.seed(run["seed"])
    config = eval_config.AbsorptionEvalConfig(
        model_name=inputs.model_name, random_seed=run["seed"], llm_batch_size=run.get("llm_batch", 10),
        k_sparse_probe_batch_size=run["batch"], k_sparse_probe_num_epochs=run["epochs"],
        eval_k_sparse_probe_batch_size=run.get("eval_batch", 24),
        precalc_k_sparse_probe_sae_acts=run.get("precalc", True),
    )  # fmt: skip
    seconds, seen = {}, {}
    shutil.rmtree(folder / "work", ignore_errors=True)
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        put(mock.patch.object(main, "HookedTransformer", _stand_in(inputs)))
        rates = {name: run[name] for name in ("lr", "end_lr") if name in run}
        put(_timed(k_sparse_probing, "train_sparse_multi_probe", seconds, seen, **rates))
        for stage in ("train_k_sparse_probes", "eval_probe_and_sae_k_sparse_raw_scores"):
            put(_timed(k_sparse_probing, stage, seconds, seen))
        folders = {"probes_dir": folder / "probes"}
        ranked, absorbed = folder / "work" / "k_sparse_probing", folder / "work" / "feature_absorption"
        put(_timed(main, "run_k_sparse_probing_experiment", seconds, seen, experiment_dir=ranked, **folders))
        put(_timed(main, "run_feature_absortion_experiment", seconds, seen, experiment_dir=absorbed,
                   sparse_probing_experiment_dir=ranked, **folders))  # fmt: skip
        put(_inject(run))
        start = time.perf_counter()
        result = main.run_eval(config, [(name, sae)], "cpu", str(_made(folder / "work" / "results")), force_rerun=True)
        seconds["total"] = time.perf_counter() - start
    table, probe = seen["run_feature_absortion_experiment"], seen["train_sparse_multi_probe"]
    weights = {"weight": probe.weights.detach().contiguous(), "bias": probe.biases.detach().contiguous()}
    return _answer(table, next(iter(result.values())), seconds), weights


def _answer(table: Any, result: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    means = result["eval_result_metrics"]["mean"]
    scores = zip(table["token"], table["absorption_fraction"].astype(float), table["is_full_absorption"], strict=True)
    return {
        "main": {letter: [int(i) for i in group.iloc[0]] for letter, group in table.groupby("letter")["split_feats"]},
        "words": {word: [fraction, bool(full)] for word, fraction, full in scores},
        "letters": [detail["first_letter"] for detail in result["eval_result_details"]],
        "mean_fraction": means["mean_absorption_fraction_score"],
        "mean_full": means["mean_full_absorption_score"],
        "seconds": seconds,
    }


def _stand_in(inputs: SimpleNamespace) -> SimpleNamespace:
    """What sae-bench asks of a language model, answered from the stored activations; loading it costs nothing."""
    row = {word: i for i, word in enumerate(inputs.tp_words)}

    def run_with_cache(prompts: list[str], names_filter: list[str]) -> tuple[None, dict]:
        rows = [row[p.rsplit("\n", 1)[-1].removesuffix(QUESTION)] for p in prompts]
        return None, {names_filter[0]: inputs.tp_x[rows][:, None].expand(-1, 6, -1)}

    tokenizer = SimpleNamespace(
        vocab={w: i for i, w in enumerate(inputs.train_words + inputs.test_words)}, convert_tokens_to_string="".join
    )
    model = SimpleNamespace(
        cfg=SimpleNamespace(model_name=inputs.model_name, d_model=inputs.tp_x.shape[1]), tokenizer=tokenizer,
        run_with_cache=run_with_cache, to_tokens=lambda text: [[0]],
    )  # fmt: skip
    return SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)


@contextlib.contextmanager
def _timed(module: Any, name: str, seconds: dict, seen: dict, **extra: Any) -> Iterator[None]:
    original = getattr(module, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        seen[name] = original(*args, **{**kwargs, **extra})
        seconds[name] = time.perf_counter() - start
        return seen[name]

    with mock.patch.object(module, name, wrapper):
        yield


@contextlib.contextmanager
def _inject(run: dict[str, Any]) -> Iterator[None]:
    """Give sae-bench's probe training a start at zero and a row order of ours, and its logistic regressions another
    tolerance, if the run asks for it."""
    import torch
    from sae_bench.evals.absorption import k_sparse_probing, probing

    with contextlib.ExitStack() as stack:
        if run.get("start") == "zero":
            stack.enter_context(mock.patch.object(torch.nn.Linear, "reset_parameters", _zero))
        if run.get("order"):
            loader = functools.partial(_Rows, order=run["order"], seed=run["seed"])
            stack.enter_context(mock.patch.object(probing, "DataLoader", loader))
        if run.get("tolerance"):
            solver = functools.partial(_regression, k_sparse_probing.LogisticRegression, run["tolerance"])
            stack.enter_context(mock.patch.object(k_sparse_probing, "LogisticRegression", solver))
        yield


def _regression(original: Any, tolerance: float, max_iter: int, **options: Any) -> Any:
    return original(tol=tolerance, max_iter=100 * max_iter, **options)


def _zero(layer: Any) -> None:
    import torch

    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)


class _Rows:
    """In place of a DataLoader: batches of a permutation per epoch (order "ours"), or all rows at once ("full")."""

    def __init__(self, dataset: Any, batch_size: int, shuffle: bool, order: str, seed: int):
        import torch

        self.tensors, self.batch, self.order = dataset.tensors, batch_size, order
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return 1 if self.order == "full" else -(-len(self.tensors[0]) // self.batch)

    def __iter__(self) -> Iterator[list]:
        import torch

        if self.order == "full":
            yield list(self.tensors)
            return
        for rows in torch.randperm(len(self.tensors[0]), generator=self.generator).split(self.batch):
            yield [t[rows] for t in self.tensors]


def _store_probe(inputs: SimpleNamespace, folder: Path) -> None:
    """Write words, activations and probe where and as sae-bench keeps its own."""
    import numpy as np
    import pandas as pd
    import torch
    from sae_bench.evals.absorption.probing import LinearProbe, save_probe_and_data

    place = folder / inputs.model_name / f"layer_{inputs.layer}"
    probe = LinearProbe(inputs.probe_weight.shape[1], len(inputs.probe_weight))
    with torch.no_grad():
        probe.weights.copy_(inputs.probe_weight)
        probe.biases.copy_(inputs.probe_bias)
    data = {"X_train": inputs.x_train, "X_test": inputs.x_test, "y_train": inputs.y_train, "y_test": inputs.y_test}
    save_probe_and_data(probe, data, place)
    for split in ("train", "test"):
        words = getattr(inputs, f"{split}_words")
        table = pd.DataFrame({"token": words, "answer_class": np.asarray(getattr(inputs, f"y_{split}"))})
        table.to_csv(place / f"{split}_df.csv")


def _probe_seconds(inputs: SimpleNamespace) -> float:
    """The part per model: sae-bench's ground-truth probe, with its own batch of 64 and 50 epochs."""
    import pandas as pd
    import torch
    from sae_bench.evals.absorption.probing import train_linear_probe_for_task

    tables = [pd.DataFrame({"answer_class": y.tolist()}) for y in (inputs.y_train, inputs.y_test)]
    start = time.perf_counter()
    train_linear_probe_for_task(
        *tables, torch.device("cpu"), inputs.x_train.numpy(), inputs.x_test.numpy(), batch_size=64, num_epochs=50
    )
    return time.perf_counter() - start


def _model_seconds(inputs: SimpleNamespace, sizes: dict[str, int]) -> float:
    """The passes over the true positives' prompts that sae-bench repeats per SAE, by the class it uses, called as it
    calls it, on random weights of the same sizes."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        act_fn="silu", gated_mlp=True, normalization_type="RMS", positional_embedding_type="rotary", seed=0, **sizes
    )
    model, hook = HookedTransformer(config), f"blocks.{inputs.layer}.hook_resid_post"
    with torch.inference_mode():
        model.run_with_cache(inputs.tp_tokens[:10], names_filter=[hook])
        start = time.perf_counter()
        for tokens in inputs.tp_tokens.split(10):  # its default, and the fastest of 10, 32, 128 and all at once
            model.run_with_cache(tokens, names_filter=[hook])
    return time.perf_counter() - start


def _schema_error(path: Path) -> str:
    """What sae-bench's pydantic class says of a result file; empty if it accepts it."""
    from pydantic import TypeAdapter, ValidationError
    from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput

    try:
        TypeAdapter(AbsorptionEvalOutput).validate_python(json.loads(path.read_text()))
    except ValidationError as error:
        return str(error)
    return ""


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
