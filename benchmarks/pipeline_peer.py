"""SAELens' side of pipeline.py, in its own environment: its argument is a job as JSON, its answer one line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train with LanguageModelSAETrainingRunner, its defaults but for what the job names."""
    import sae_lens
    from datasets import Dataset
    from sae_lens.config import LoggingConfig

    torch.set_num_threads(job["threads"])
    with open(job["documents"], encoding="utf-8") as file:  # noqa: PTH123
        dataset = Dataset.from_list([json.loads(line) for line in file])
    sae = sae_lens.TopKTrainingSAEConfig(d_in=job["d_in"], d_sae=job["d_sae"], k=job["k"])
    cfg = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae, model_name=job["folder"], model_class_name="AutoModelForCausalLM", hook_name=job["module"],
        dataset_path="documents", is_dataset_tokenized=False, streaming=False, context_size=job["context"],
        prepend_bos=job["bos"], training_tokens=job["tokens"], train_batch_size_tokens=job["batch"], device="cpu",
        logger=LoggingConfig(log_to_wandb=False), n_checkpoints=0, checkpoint_path=None, output_path=None,
        exclude_special_tokens=True, verbose=False,
    )  # fmt: skip
    runner = sae_lens.LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)
    seconds = dict.fromkeys(("language model", "text and buffer", "forward", "backward"), 0.0)
    inside: list[float] = []
    now = time.process_time if job["threads"] == 1 else time.perf_counter

    def watch(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, before = now(), sum(inside)
            out = function(*args, **kwargs)
            taken = now() - start - (sum(inside) - before)
            seconds[part] += taken
            inside.append(taken)
            return out

        setattr(owner, name, timed)

    watch(runner.activations_store, "get_activations", "language model")
    watch(type(runner.activations_store), "__next__", "text and buffer")
    watch(runner.sae, "training_forward_pass", "forward")
    watch(torch.Tensor, "backward", "backward")
    start = now()
    runner.run()
    total = now() - start
    rest = total - sum(seconds.values())
    versions = f"sae-lens {sae_lens.__version__} torch {torch.__version__}"
    parts = {**seconds, "optimiser and all else": rest}
    return {"seconds": total, "parts": parts, "tokens": job["tokens"], "versions": versions}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print goes to stderr
    print(json.dumps(main(json.loads(sys.argv[1]))), file=answers, flush=True)
