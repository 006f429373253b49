"""In: a hub id. Out: whether the Hugging Face hub answers for it now, found out in one quick question."""

from __future__ import annotations

import os

from sae_train.errors import UserError


def hub_answers(name: str, kind: str) -> bool:
    """Ask the hub once for a "model" or "dataset": loading without this retries for 24 s before it gives up.

    False means no network (the local cache may still serve); an id that the hub does not know is a UserError.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=5)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"there is no {kind} {name!r}, neither as a path here nor on the hub.") from error
    except Exception:  # the HTTP client's errors share no public base
        return False
    return True
