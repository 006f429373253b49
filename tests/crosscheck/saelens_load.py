"""Check that SAELens loads our SAEs and reconstructs alike. Run it with a Python that has sae-lens, not with ours.

    python tests/crosscheck/saelens_load.py FOLDER INPUTS.safetensors

FOLDER holds one folder per SAE; INPUTS holds x (n, d_in) and, for each SAE, a tensor of its name: our reconstruction.
"""

import sys
from pathlib import Path


def main(folder: Path, inputs: Path) -> int:
    """Print a line per SAE; return 1 if one differs by more than 1e-5 of the largest reconstruction, else 0."""
    try:
        import torch
        from sae_lens import SAE
        from safetensors.torch import load_file
    except ImportError as error:
        print(f"skipped: {error} (this check needs an environment with sae-lens)")
        return 0
    tensors, status = load_file(inputs), 0
    for path in sorted(p.parent for p in folder.glob("*/cfg.json")):
        with torch.no_grad():
            recon = SAE.load_from_disk(path)(tensors["x"])
        expected = tensors[path.name]
        error = ((recon - expected).abs().max() / expected.abs().max()).item()
        status |= error > 1e-5
        print(f"{path.name}: largest relative difference {error:.1e}, {'FAILED' if error > 1e-5 else 'ok'}")
    return status


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
