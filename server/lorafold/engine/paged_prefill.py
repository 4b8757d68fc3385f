"""Attention of chunks of prompts over a paged cache, by a Triton kernel: one launch for all chunks of a step.

Checks shapes and chooses the grid; the arithmetic is in `prefill_kernels`. The cache and its page tables are those of
`paged_attention`, and so is the legend, with C chunks for B sequences. Importing needs no Triton, calling does.
"""

from torch import Tensor

from lorafold.engine.paged_attention import ceil_div, check_cache, is_exact, tile, window_width


def prefill(
    query_THD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    pages_CN: Tensor,
    start_C: Tensor,
    count_C: Tensor,
    length_C: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor,
) -> Tensor:
    """Chunk `c` is the packed tokens `start_C[c]` and on, `count_C[c]` of them; returns `out` [T, H, D].

    They are the last of the `length_C[c]` places of their sequence, and each sees itself and what is before it: their
    keys and values must be in the cache. Everything that ends in C is int32 on the device; `longest` is no less than
    the largest count and decides the grid. A count of 0 is padding. Rows of `out` that no chunk names stay as they are.
    `window` and `softcap` as in `paged_attention.decode`.
    """
    check_cache(keys_PSKD, values_PSKD, query_THD)
    from lorafold.engine import prefill_kernels

    _, heads, width = query_THD.shape
    query_THD = query_THD if query_THD.stride(-1) == 1 else query_THD.contiguous()
    assert out.stride(-1) == 1, "a head's numbers must be adjacent"
    dim, block = tile(width, query_THD)
    rows, warps = choose_rows(longest, dim, is_exact(query_THD))
    prefill_kernels.prefill_tiles[(ceil_div(longest, rows), heads, len(pages_CN))](
        query_THD,
        keys_PSKD,
        values_PSKD,
        pages_CN,
        start_C,
        count_C,
        length_C,
        out,
        *query_THD.stride()[:2],
        *keys_PSKD.stride()[:3],
        pages_CN.stride(0),
        *out.stride()[:2],
        window_width(window),
        scale,
        softcap or 1.0,
        GROUP=heads // keys_PSKD.shape[2],
        WIDTH=width,
        PAGE=keys_PSKD.shape[1],
        ROWS=rows,
        DIM=dim,
        BLOCK=block,
        CAPPED=softcap is not None,
        EXACT=is_exact(query_THD),
        num_warps=warps,
        num_stages=3,
    )
    return out


def choose_rows(longest: int, dim: int, exact: bool) -> tuple[int, int]:
    """Tokens a program takes and its warps: what the registers hold, so far fewer where products are in fp32."""
    if exact:
        return max(16, min(32, 2**12 // dim)), 4
    return (128, 8) if longest > 64 and dim <= 128 else (64, 4)
