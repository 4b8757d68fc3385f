"""Attention over a paged cache of keys and values, by Triton kernels: one launch for a whole batch.

Checks shapes and chooses grids; the arithmetic is in `paged_kernels`. Knows nothing of sequences, adapters or models.
Importing needs no Triton, calling does. No call reads the device from the host or makes a tensor whose shape depends on
lengths, so each may be captured in a CUDA graph and replayed with other lengths, page tables and places.

The cache of one layer is `keys_PSKD` and `values_PSKD` [P pages, S places a page, K key-value heads, D head width],
the same strides for both, a head's numbers adjacent. Place `i` of a sequence lies in page `pages[i // S]` at `i % S`.
Shapes in the names besides: B sequences, N pages of the longest, H query heads, T tokens.
"""

from functools import cache

import torch
from torch import Tensor

MAX_SPLITS = 32
# Query heads a program takes together: what the tensor cores need at the least.
GROUP_TILE = 16
# Programs for each multiprocessor that keep its memory pipe full, as many as fit beside each other.
PROGRAMS_EACH = 4
# A window that no sequence fills.
NO_WINDOW = 2**30


def decode(
    query_BHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    pages_BN: Tensor,
    length_B: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """One query token a sequence over the `length` places of that sequence, its own included; returns [B, H, D].

    `pages_BN` and `length_B` are int32 on the device; entries of a table beyond the length are not read, and of the
    cache no place beyond it. Length 0 (padding) gives zeros. With `window` only the last `window` places are seen; with
    `softcap` the scores are squeezed by tanh first (Gemma 2). `splits`, a power of two, is how many programs share a
    sequence; the default depends on the shapes alone.
    """
    check_cache(keys_PSKD, values_PSKD, query_BHD)
    from lorafold.engine import paged_kernels

    batch, heads, width = query_BHD.shape
    page, kv_heads = keys_PSKD.shape[1:3]
    query_BHD = query_BHD if query_BHD.stride(-1) == 1 else query_BHD.contiguous()
    out = torch.empty_like(query_BHD, memory_format=torch.contiguous_format) if out is None else out
    assert out.stride(-1) == 1, "a head's numbers must be adjacent"
    dim, block = tile(width, query_BHD)
    tiles = ceil_div(heads // kv_heads, GROUP_TILE)
    places = pages_BN.shape[1] * page
    splits = splits or choose_splits(batch * kv_heads * tiles, ceil_div(places, block), _processors(query_BHD.device))
    partial = query_BHD.new_empty(batch, heads, splits, width, dtype=torch.float32)
    logsum = query_BHD.new_empty(batch, heads, splits, dtype=torch.float32)
    paged_kernels.decode_splits[(batch, kv_heads * tiles, splits)](
        query_BHD,
        keys_PSKD,
        values_PSKD,
        pages_BN,
        length_B,
        partial,
        logsum,
        *query_BHD.stride()[:2],
        *keys_PSKD.stride()[:3],
        pages_BN.stride(0),
        window_width(window),
        scale,
        softcap or 1.0,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        PAGE=page,
        SPLITS=splits,
        ROWS=GROUP_TILE,
        DIM=dim,
        BLOCK=block,
        CAPPED=softcap is not None,
        EXACT=is_exact(query_BHD),
        num_warps=4,
        num_stages=3,
    )
    paged_kernels.merge_splits[(batch, heads)](
        partial, logsum, out, *out.stride()[:2], HEADS=heads, WIDTH=width, SPLITS=splits, DIM=dim, num_warps=4
    )
    return out


def choose_splits(programs: int, blocks: int, processors: int) -> int:
    """How many programs share a sequence: enough to fill the device, no more than there are blocks; a power of two."""
    wanted = ceil_div(PROGRAMS_EACH * processors, max(programs, 1))
    return _power_of_two(max(1, min(wanted, blocks, MAX_SPLITS)))


def check_cache(keys_PSKD: Tensor, values_PSKD: Tensor, new: Tensor) -> None:
    """Raises AssertionError for a cache that the kernels would misread, or read differently from `new`."""
    assert keys_PSKD.shape == values_PSKD.shape, "keys and values of different shapes"
    assert keys_PSKD.stride() == values_PSKD.stride(), "keys and values laid out differently"
    assert keys_PSKD.stride(-1) == 1, "a head's numbers must be adjacent"
    assert (new.shape[-1], new.dtype) == (keys_PSKD.shape[-1], keys_PSKD.dtype), "not what the cache holds"


def window_width(window: int | None) -> int:
    """The window as the kernels take it."""
    return NO_WINDOW if window is None else window


def is_exact(query: Tensor) -> bool:
    """Whether products are taken in fp32: Triton's interpreter, which alone runs on a CPU, has no bf16 product."""
    return not query.is_cuda or query.dtype == torch.float32


def tile(width: int, query: Tensor) -> tuple[int, int]:
    """The head width as a power of two, and how many places make a tile of 16 KiB: several fit an older GPU too."""
    dim = max(16, _power_of_two(width))
    return dim, min(64, max(16, 2**14 // (dim * query.element_size())))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (number - 1).bit_length()
