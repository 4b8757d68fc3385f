"""How many pages the cache of keys and values gets: what is declared, or what the device can spare."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorafold.engine.attention_means import PLAIN
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.step import Part, plan_step

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


@torch.inference_mode()
def step_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Memory of a GPU that a step of so many tokens takes beside the weights, by running one; 0 on a CPU."""
    if model.device.type != "cuda":
        return 0
    cache = PagedCache(pages=1 + -(-tokens // PAGE_TOKENS), size=PAGE_TOKENS)
    part = Part(tokens=tokens, past=0, pages=range(1, cache.pages), decodes=False)
    step = plan_step(cache, [part], model.device, with_tables=True)
    ids_1T = torch.zeros((1, tokens), dtype=torch.int64, device=model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model(
        input_ids=ids_1T,
        position_ids=step.position_T[None],
        use_cache=False,
        logits_to_keep=1,
        step=step,
        means=PLAIN,
    )
    peak = torch.cuda.max_memory_allocated(model.device)
    del cache, step, ids_1T
    torch.cuda.empty_cache()
    return peak - before


def free_host_bytes() -> int:
    """Memory that this process can still have: of a container's limit, or as Linux tells it; elsewhere all there is."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
        return min([int(available.split()[1]) * 1024, *left_of_limits()])
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def left_of_limits(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What the limit of this process's control group leaves, version 2 or 1; nothing if there is none.

    Files that are cached count as used there, and are given up when memory is wanted.
    """
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number, and no limit.
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            spare = int(statistics.get("inactive_file", 0))
            yield int((folder / limit).read_text()) - int((folder / used).read_text()) + spare
