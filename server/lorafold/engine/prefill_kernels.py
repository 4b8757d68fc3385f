"""Triton kernel of attention for chunks of prompts over a paged cache; the letters are those of `paged_kernels`.

Knows pointers and strides only: shapes are checked and the grid chosen by `paged_prefill`. Importing needs Triton.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from lorafold.engine.paged_kernels import absorb, load_tile, locate, squeeze


@triton.jit(do_not_specialize=["pages_row", "window"])
def prefill_tiles(
    query,
    keys,
    values,
    pages,
    starts,
    counts,
    lengths,
    out,
    query_token,
    query_head,
    page_stride,
    place_stride,
    head_stride,
    pages_row,
    out_token,
    out_head,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Program (tile, head, chunk): ROWS tokens of one chunk, one head, over what they see."""
    tile_start = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    count = tl.load(counts + chunk)
    if tile_start >= count:
        return
    length = tl.load(lengths + chunk)
    token_M = tile_start + tl.arange(0, ROWS)
    dim_D = tl.arange(0, DIM)
    real_MD = (token_M[:, None] < count) & (dim_D[None, :] < WIDTH)
    packed_M = (tl.load(starts + chunk) + token_M).to(tl.int64)
    query_MD = tl.load(query + packed_M[:, None] * query_token + head * query_head + dim_D[None, :], real_MD, 0.0)
    if EXACT:
        query_MD = query_MD.to(tl.float32)

    past = length - count
    position_M = past + token_M
    begin = tl.maximum(past + tile_start - window + 1, 0)
    end = tl.minimum(past + tile_start + ROWS, length)
    peak_M = tl.full([ROWS], -float("inf"), tl.float32)
    total_M = tl.full([ROWS], 0.0, tl.float32)
    sum_MD = tl.full([ROWS, DIM], 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        place_L = start + tl.arange(0, BLOCK)
        live_L = place_L < end
        at_L = locate(pages + chunk * pages_row, place_L, live_L, page_stride, place_stride, PAGE)
        at_L += head // GROUP * head_stride
        key_LD = load_tile(keys, at_L, live_L, dim_D, WIDTH, EXACT)
        value_LD = load_tile(values, at_L, live_L, dim_D, WIDTH, EXACT)
        score_ML = squeeze(tl.dot(query_MD, tl.trans(key_LD), input_precision="ieee"), scale, softcap, CAPPED)
        back_ML = position_M[:, None] - place_L[None, :]
        seen_ML = (back_ML >= 0) & (back_ML < window) & live_L[None, :]
        score_ML = tl.where(seen_ML, score_ML, -float("inf"))
        peak_M, total_M, sum_MD = absorb(score_ML, value_LD, peak_M, total_M, sum_MD)

    # Tokens beyond the chunk's end may see nothing; they are not stored.
    result_MD = sum_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    tl.store(out + packed_M[:, None] * out_token + head * out_head + dim_D[None, :], result_MD, real_MD)
