"""Triton kernels over a paged cache of keys and values: decode, the merge of its splits, and store.

Knows pointers and strides only: shapes are checked and grids chosen by `paged_attention`. Importing needs Triton.
Products are taken in the cache's dtype and summed in fp32; with EXACT the tiles are cast to fp32 first.
The softmax is the online one of FlashAttention-2 (arXiv:2307.08691), the splits those of Flash-Decoding.

Letters in the names of tiles: G query heads of one group, M query tokens, L cached places, D head width, C splits.
Capitals that stand alone are compile-time: HEADS, KV_HEADS, GROUP (query heads a key-value head), WIDTH (of a head),
PAGE (places a page); DIM is WIDTH rounded up to a power of two, ROWS and BLOCK are the tile's queries and places.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def load_tile(cache, at_L, live_L, dim_D, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """Rows of the cache that begin at `at_L`, as a tile [L, D]; zeros where a place is not live."""
    tile_LD = tl.load(cache + at_L[:, None] + dim_D[None, :], live_L[:, None] & (dim_D[None, :] < WIDTH), 0.0)
    if EXACT:
        tile_LD = tile_LD.to(tl.float32)
    return tile_LD


@triton.jit
def locate(pages, place_L, live_L, page_stride, place_stride, PAGE: tl.constexpr):
    """Where the places of one sequence begin in the cache, in elements: its page table says in which pages."""
    page_L = tl.load(pages + place_L // PAGE, live_L, 0)
    return page_L.to(tl.int64) * page_stride + (place_L % PAGE) * place_stride


@triton.jit
def squeeze(score, scale, softcap, CAPPED: tl.constexpr):
    """Scaled scores; with CAPPED softcap * tanh(score / softcap), tanh by way of exp."""
    score = score * scale
    if CAPPED:
        score = softcap - 2.0 * softcap / (tl.exp(2.0 * score / softcap) + 1.0)
    return score


@triton.jit
def absorb(score_ML, value_LD, peak_M, total_M, sum_MD):
    """One step of the online softmax: the state (largest score, sum of weights, weighted sum) after these places."""
    new_peak_M = tl.maximum(peak_M, tl.max(score_ML, 1))
    # A row that has seen nothing yet: minus infinity less itself would be no number.
    shift_M = tl.where(new_peak_M == -float("inf"), 0.0, new_peak_M)
    kept_M = tl.exp(peak_M - shift_M)
    weight_ML = tl.exp(score_ML - shift_M[:, None])
    total_M = total_M * kept_M + tl.sum(weight_ML, 1)
    sum_MD = sum_MD * kept_M[:, None] + tl.dot(weight_ML.to(value_LD.dtype), value_LD, input_precision="ieee")
    return new_peak_M, total_M, sum_MD


# Numbers that differ from batch to batch or from layer to layer: not worth a kernel of their own.
@triton.jit(do_not_specialize=["pages_row", "window"])
def decode_splits(
    query,
    keys,
    values,
    pages,
    lengths,
    partial,
    logsum,
    query_row,
    query_head,
    page_stride,
    place_stride,
    head_stride,
    pages_row,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Program (row, heads, split): one group's attention over one split of what the row sees, and its log-sum-exp."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    in_group_G = tl.program_id(1) // KV_HEADS * ROWS + tl.arange(0, ROWS)
    dim_D = tl.arange(0, DIM)
    head_G = kv_head * GROUP + in_group_G
    real_GD = (in_group_G[:, None] < GROUP) & (dim_D[None, :] < WIDTH)
    query_GD = tl.load(query + row * query_row + head_G[:, None] * query_head + dim_D[None, :], real_GD, 0.0)
    if EXACT:
        query_GD = query_GD.to(tl.float32)

    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0)
    blocks = (length - first + BLOCK - 1) // BLOCK
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    peak_G = tl.full([ROWS], -float("inf"), tl.float32)
    total_G = tl.full([ROWS], 0.0, tl.float32)
    sum_GD = tl.full([ROWS, DIM], 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        place_L = start + tl.arange(0, BLOCK)
        live_L = place_L < end
        at_L = locate(pages + row * pages_row, place_L, live_L, page_stride, place_stride, PAGE) + kv_head * head_stride
        key_LD = load_tile(keys, at_L, live_L, dim_D, WIDTH, EXACT)
        value_LD = load_tile(values, at_L, live_L, dim_D, WIDTH, EXACT)
        score_GL = squeeze(tl.dot(query_GD, tl.trans(key_LD), input_precision="ieee"), scale, softcap, CAPPED)
        score_GL = tl.where(live_L[None, :], score_GL, -float("inf"))
        peak_G, total_G, sum_GD = absorb(score_GL, value_LD, peak_G, total_G, sum_GD)

    # An empty split has total 0 and says minus infinity; a total that is no number stays so.
    total_G = tl.where(total_G == 0.0, 1.0, total_G)
    at_G = (row * KV_HEADS * GROUP + head_G) * SPLITS + split
    tl.store(logsum + at_G, peak_G + tl.log(total_G), in_group_G < GROUP)
    tl.store(partial + at_G[:, None] * WIDTH + dim_D[None, :], sum_GD / total_G[:, None], real_GD & (begin < end))


@triton.jit
def merge_splits(
    partial,
    logsum,
    out,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Program (row, head): the splits' results weighted by the exponentials of their log-sums; no split, zeros."""
    row, head = tl.program_id(0), tl.program_id(1)
    dim_D = tl.arange(0, DIM)
    at_C = (row * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    logsum_C = tl.load(logsum + at_C)
    peak = tl.max(logsum_C, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    weight_C = tl.exp(logsum_C - peak)
    total = tl.sum(weight_C, 0)
    # Empty splits wrote no result: what stands in the buffer is not read, since 0 times NaN is NaN.
    full_CD = (logsum_C != -float("inf"))[:, None] & (dim_D[None, :] < WIDTH)
    partial_CD = tl.load(partial + at_C[:, None] * WIDTH + dim_D[None, :], full_CD, 0.0)
    merged_D = tl.sum(partial_CD * weight_C[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_row + head * out_head + dim_D, merged_D, dim_D < WIDTH)
