"""Check that SAELens and sae-bench read a release. Run it with a Python that has both, not with ours.

    sae-train publish RUN --repo you/name --dry-run
    python tests/crosscheck/release_load.py STAGED

STAGED is the folder that the dry run names. SAELens' registry code reads pretrained_saes.yaml, its loader the SAEs by
their registered names (from this folder in place of the hub), and sae-bench's classes and figures the result files.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch


def main(staged: Path) -> int:
    """Print a line per SAE; an exception is what is not read."""
    try:
        import torch
        from huggingface_hub.errors import EntryNotFoundError
        from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
        from sae_bench.sae_bench_utils import general_utils, graphing_utils
        from sae_lens import SAE
        from sae_lens.loading import pretrained_sae_loaders as loaders
        from sae_lens.loading import pretrained_saes_directory as registry
    except ImportError as error:
        print(f"skipped: {error} (this check needs an environment with sae-lens and sae-bench)")
        return 0

    def from_folder(repo_id: str, filename: str, **_: object) -> str:
        if not (staged / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(staged / filename)

    registry.get_pretrained_saes_directory.cache_clear()
    with patch.object(registry, "files", lambda _: staged), patch.object(loaders, "hf_hub_download", from_folder):
        ((release, entry),) = registry.get_pretrained_saes_directory().items()
        for name in entry.saes_map:
            sae, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(release, name)
            on_disk = SAE.load_from_disk(staged / name)
            x = torch.randn(16, sae.cfg.d_in)
            assert torch.equal(sae(x), on_disk(x))
            metadata = sae.cfg.metadata
            assert metadata.training_architecture and metadata.sae_lens_training_version is None
            assert sparsity is None or (sparsity.shape == (sae.cfg.d_sae,) and bool((sparsity <= 1e-6).all()))
            assert entry.expected_l0[name] == 0 or abs(entry.expected_l0[name] / metadata.l0 - 1) < 1e-4
            path = general_utils.get_results_filepath(str(staged / "eval_results/absorption"), entry.repo_id, name)
            told = "no result"
            if Path(path).is_file():
                AbsorptionEvalOutput(**json.loads(Path(path).read_text()))
                (figures,) = graphing_utils.get_eval_results([path]).values()
                told = f"absorption {figures['mean_absorption_fraction_score']:.4f}, {figures['train_tokens']:,} tokens"
            print(
                f"{release}/{name}: {metadata.training_architecture}, L0 {metadata.l0:.4g}, "
                f"{metadata.num_dead_features} dead, sparsity {'absent' if sparsity is None else 'read'}, {told}"
            )
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
