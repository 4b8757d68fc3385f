"""How many pages the cache of keys and values gets: what is declared, or what the device can spare."""

import os
from dataclasses import dataclass

import torch

GIB = 2**30
PAGE_TOKENS = 16
SPARE = 0.25
"""Share of a CPU's free memory that the cache may take unless told otherwise."""
GPU_SHARE = 0.9
"""Share of a GPU's memory that weights, activations and the cache may take together unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What decides how many pages are worth having."""

    declared_gib: float | None
    """Memory for the cache; None: as much as can be spared."""
    max_batch: int
    context: int
    """Tokens of one sequence at most."""


def pages_for(wishes: Wishes, bytes_per_token: int, device: torch.device, step_bytes: int = 0) -> int:
    """Pages of `PAGE_TOKENS` tokens: within the budget, and no more than `max_batch` whole contexts take.

    `step_bytes`: memory of a GPU that a forward step takes beside weights and cache.
    """
    if wishes.declared_gib is not None:
        budget = int(wishes.declared_gib * GIB)
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - (1 - GPU_SHARE) * total - step_bytes)
    else:
        budget = int(SPARE * free_host_bytes())
    pages = budget // (bytes_per_token * PAGE_TOKENS)
    most = wishes.max_batch * -(-wishes.context // PAGE_TOKENS)
    return max(1, min(pages, most)) + 1  # One is nobody's.


def free_host_bytes() -> int:
    """Memory that programs can still have, as Linux tells it; elsewhere all that there is."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
