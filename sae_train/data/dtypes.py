"""Number formats that a language model's weights can have, and which one `auto` means on a device."""

from __future__ import annotations

import torch

from sae_train.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")  # what processors call it


def choose_dtype(asked: str, device: torch.device) -> str:
    """Return the asked format; for "auto", bfloat16 where the device multiplies it faster than float32, else float32.

    benchmarks/dtypes.py shows what that does to the figures of SAEs. UserError for an unknown name.
    """
    if asked in DTYPES:
        return asked
    if asked != "auto":
        raise UserError(f"dtype {asked!r} is unknown; choose auto or one of {', '.join(DTYPES)}.")
    return "bfloat16" if _is_bfloat16_fast(torch.device(device)) else "float32"


def _is_bfloat16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in FAST_BFLOAT16)
