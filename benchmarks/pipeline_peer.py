"""The other side of pipeline.py, SAELens and sae-bench, in their own environment.

Its argument is a file with a job, its answer one line of JSON.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pipeline import EVAL, Parts, clock

LARGE_BATCH = 64  # prompts at a time, of 79 tokens


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train with LanguageModelSAETrainingRunner, its defaults but for what the job names, and evaluate if asked."""
    import sae_lens

    torch.set_num_threads(job["threads"])
    now = clock(job)
    parts = Parts(now)
    runner = _runner(job)
    parts.watch(runner.activations_store, "get_activations", "language model")
    parts.watch(type(runner.activations_store), "__next__", "text and buffer")
    parts.watch(runner.sae, "training_forward_pass", "forward")
    parts.watch(torch.Tensor, "backward", "backward")
    start = now()
    with parts.part("optimiser and all else"):
        sae = runner.run()
    versions = f"sae-lens {sae_lens.__version__} torch {torch.__version__}"
    done = {"seconds": now() - start, "parts": dict(parts.seconds), "tokens": job["tokens"], "versions": versions}
    return done | (evaluate(job, sae, runner.model, Parts(now), versions) if job["evaluate"] else {})


def _runner(job: dict[str, Any]) -> Any:
    """Make the runner on the model as TransformerLens has it or, where it does not know it, on SAELens' wrapper."""
    import sae_lens
    from datasets import Dataset
    from sae_lens.config import LoggingConfig
    from transformer_lens import loading_from_pretrained

    loading_from_pretrained.get_official_model_name = lambda name: name  # it knows folders, but asks for a known name
    with open(job["documents"], encoding="utf-8") as file:  # noqa: PTH123
        dataset = Dataset.from_list([json.loads(line) for line in file])

    def make(kind: str, hook: str, **of_model: Any) -> Any:
        cfg = sae_lens.LanguageModelSAERunnerConfig(
            sae=sae_lens.TopKTrainingSAEConfig(d_in=job["d_in"], d_sae=job["d_sae"], k=job["k"]),
            model_name=job["folder"], model_class_name=kind, hook_name=hook,
            model_from_pretrained_kwargs={"dtype": job["dtype"], **of_model},
            dataset_path="documents", is_dataset_tokenized=False, streaming=False, context_size=job["context"],
            prepend_bos=job["bos"], training_tokens=job["tokens"], train_batch_size_tokens=job["batch"], device="cpu",
            logger=LoggingConfig(log_to_wandb=False), n_checkpoints=0, checkpoint_path=None, output_path=None,
            exclude_special_tokens=True, verbose=False, autocast=job["dtype"] == "bfloat16",
        )  # fmt: skip
        return sae_lens.LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)

    try:
        return make("HookedTransformer", job["hook"], n_ctx=max(job["context"], 256))
    except NotImplementedError:  # TransformerLens has no such architecture
        if job["evaluate"]:
            raise
        return make("AutoModelForCausalLM", job["module"])


def evaluate(job: dict[str, Any], trained: Any, model: Any, parts: Parts, versions: str) -> dict[str, Any]:
    """Evaluate with sae-bench's run_eval, probes and all, on the words of the job."""
    from importlib.metadata import version

    from sae_bench.evals.absorption import common, eval_config, feature_absorption, k_sparse_probing, main
    from sae_lens import SAE

    work = Path(job["work"])
    trained.save_inference_model(work / "sae")
    sae = SAE.load_from_disk(work / "sae")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = job["hook"], "model"
    os.chdir(work)  # run_eval writes artifacts beside it
    torch.manual_seed(0)
    random.seed(0)
    for module in (common, feature_absorption):
        module.get_alpha_tokens = lambda tokenizer: job["words"]
    main.HookedTransformer = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
    # Their default places are in the installed package.
    places = {name: work / name for name in ("probes", "ranked", "absorbed")}
    found = _keep(main, "run_k_sparse_probing_experiment", probes_dir=places["probes"], experiment_dir=places["ranked"])
    absorbed = _keep(
        main, "run_feature_absortion_experiment", probes_dir=places["probes"], experiment_dir=places["absorbed"],
        sparse_probing_experiment_dir=places["ranked"],
    )  # fmt: skip
    parts.watch(common, "train_and_save_probes", EVAL[0])
    parts.watch(common, "train_linear_probe_for_task", "{}: probe")
    parts.watch(model, "run_with_cache", "{}: language model")
    parts.watch(k_sparse_probing, "train_k_sparse_probes", "{}: k-sparse probes")
    config = eval_config.AbsorptionEvalConfig(
        model_name="model", random_seed=0, llm_batch_size=LARGE_BATCH, llm_dtype=job["dtype"], min_feats_for_eval=1,
        eval_k_sparse_probe_batch_size=4096, precalc_k_sparse_probe_sae_acts=True,
    )  # fmt: skip
    with parts.part(EVAL[1]):
        result = main.run_eval(config, [("trained", sae)], "cpu", str(work), force_rerun=True)
    means = next(iter(result.values()))["eval_result_metrics"]["mean"]
    figures = {"words": len(job["words"]), "true positives": len(absorbed[0]),
               "letters that count": int((found[0]["f1_probe"] > config.min_GT_probe_f1).sum()),
               "fraction": means["mean_absorption_fraction_score"],
               "full": means["mean_full_absorption_score"]}  # fmt: skip
    return {"eval": parts.seconds, "figures": figures, "versions": f"{versions} sae-bench {version('sae-bench')}"}


def _keep(module: Any, name: str, **given: Any) -> list[Any]:
    """Let a function of a module take these arguments too, and keep what it returns."""
    function, kept = getattr(module, name), []

    @functools.wraps(function)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.append(function(*args, **kwargs, **given))
        return kept[-1]

    setattr(module, name, keeping)
    return kept


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes to stderr
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))), file=answers, flush=True)
