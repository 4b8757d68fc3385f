"""Chunks of prompts over a paged cache: the oracle is plain fp32 attention over each sequence's own keys and values.

On a GPU the kernel is compiled; without one Triton's interpreter runs it.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafold.engine.paged_prefill import choose_rows, prefill
from tests.interpreter import compile_for_h100, interpreted
from tests.paged import DEVICE, Pages, distance, fill_pages, plain_attention
from tests.tolerances import ATTENTION

pytest.importorskip("triton")

# A whole prompt, the end of one, a single token as in decode, padding, and one past several tiles.
LENGTHS = [21, 50, 33, 0, 70]
COUNTS = [21, 18, 1, 0, 67]
# Packed behind each other, but for two tokens of somebody else before the third.
STARTS = [0, 21, 41, 42, 42]
TOKENS = 109
UNTOUCHED = [39, 40]


@pytest.fixture
def kernels() -> Iterator[None]:
    from lorafold.engine import paged_kernels, prefill_kernels

    with nullcontext() if DEVICE == "cuda" else interpreted(paged_kernels, prefill_kernels):
        yield


def queries(heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, heads, width, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)


def run(query_THD: Tensor, pages: Pages, **how: Any) -> Tensor:
    start_C, count_C = (torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (STARTS, COUNTS))
    cache = (pages.keys_PSKD, pages.values_PSKD, pages.pages_BN)
    out = torch.full_like(query_THD, 7.0)
    return prefill(query_THD, *cache, start_C, count_C, pages.length_B, longest=max(COUNTS), out=out, **how)


def expected(query_THD: Tensor, pages: Pages, **how: Any) -> Tensor:
    out = torch.full(query_THD.shape, 7.0, device=DEVICE)
    for row, (start, count) in enumerate(zip(STARTS, COUNTS, strict=True)):
        part = slice(start, start + count)
        out[part] = plain_attention(query_THD[part], pages.key_BLKD[row], pages.value_BLKD[row], **how)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window", "softcap"),
    [(2, 1, 64, None, None), (2, 2, 80, 20, None), (3, 1, 16, 1, 3.0), (1, 1, 256, 1000, None)],
)
@pytest.mark.usefixtures("kernels")
def test_each_chunk_sees_its_own_sequence_up_to_each_token_and_nothing_else_is_written(
    heads: int, kv_heads: int, width: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    pages = fill_pages(LENGTHS, kv_heads=kv_heads, width=width, dtype=dtype)
    query = queries(heads, width, dtype)
    how = {"scale": width**-0.5, "window": window, "softcap": softcap}
    result, right = run(query, pages, **how), expected(query, pages, **how)
    assert result[UNTOUCHED].eq(7.0).all()
    result[UNTOUCHED], right[UNTOUCHED] = 0.0, 0.0
    assert distance(result, right) < ATTENTION[dtype]


@pytest.mark.usefixtures("kernels")
def test_a_place_more_in_the_window_is_seen_by_the_measure() -> None:
    """The negative control."""
    pages = fill_pages(LENGTHS, kv_heads=1, width=16, dtype=torch.float32)
    query = queries(1, 16, torch.float32)
    right = expected(query, pages, scale=1.0, window=20)
    assert distance(run(query, pages, scale=1.0, window=20), right) < ATTENTION[torch.float32]
    assert distance(run(query, pages, scale=1.0, window=21), right) > ATTENTION[torch.bfloat16]


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # The interpreter's maximum of nothing but NaN.
@pytest.mark.usefixtures("kernels")
def test_what_is_no_number_reaches_its_own_chunk_only() -> None:
    pages = fill_pages(LENGTHS, kv_heads=1, width=16, dtype=torch.float32)
    query = queries(1, 16, torch.float32)
    right = run(query, pages, scale=1.0)
    pages.values_PSKD.flatten(0, 1)[pages.places(0)[5]] = float("nan")
    result = run(query, pages, scale=1.0)
    assert result[5:21].isnan().all()
    assert torch.equal(result[21:], right[21:])


def test_a_program_takes_no_more_tokens_than_its_registers_hold() -> None:
    assert choose_rows(longest=512, dim=128, exact=False) == (128, 8)
    assert choose_rows(longest=64, dim=128, exact=False) == (64, 4)
    assert choose_rows(longest=512, dim=256, exact=False) == (64, 4)
    assert choose_rows(longest=512, dim=256, exact=True) == (16, 4)


@pytest.mark.parametrize(("dtype", "width", "softcap"), [(torch.bfloat16, 128, None), (torch.float32, 48, 30.0)])
def test_what_the_launcher_asks_for_compiles_for_an_h100(
    dtype: torch.dtype, width: int, softcap: float | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafold.engine import prefill_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pages = fill_pages(LENGTHS, kv_heads=1, width=width, dtype=dtype)
    exact = dtype == torch.float32
    rows, warps = choose_rows(max(COUNTS), 64 if exact else 128, exact)
    compiled = compile_for_h100(
        lambda: run(queries(2, width, dtype), pages, scale=1.0, softcap=softcap),
        prefill_kernels,
        EXACT=exact,
        ROWS=rows,
        num_warps=warps,
    )
    assert compiled == ["prefill_tiles"]
