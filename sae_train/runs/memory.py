"""How much memory a run may take: what is free on the device, in a container no more than its limit leaves."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# The files of a control group that say its limit, what is used, and what of that are cached files: version 2, 1.
V2 = "memory.max", "memory.current", "inactive_file "
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "


def free_memory(device: torch.device) -> float:
    """Bytes free on the device."""
    import psutil
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min([float(psutil.virtual_memory().available), *_left_by_limits()])


def _left_by_limits(root: Path = CGROUPS, own: Path = OWN) -> list[float]:
    """What the limits of this process's control group, and of those above it, leave; empty where there are none."""
    left: list[float] = []
    with suppress(OSError, ValueError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, names = (root / "memory", V1) if controllers else (root, V2)
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):  # in a container its own group stands at the root
                if folder == top or top in folder.parents:
                    left += _left_in(folder, *names)
    return left


def _left_in(group: Path, limit: str, used: str, cached: str) -> list[float]:
    with suppress(OSError, ValueError):  # no such file, or "max"
        at_most, now = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
        stat = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        given_back = sum(int(line.split()[1]) for line in stat if line.startswith(cached))
        return [float(max(0, at_most - now + given_back))]
    return []
