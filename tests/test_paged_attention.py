"""Decode over a paged cache: the oracle is plain fp32 attention over each sequence's own keys and values.

On a GPU the kernels are compiled; without one Triton's interpreter runs them.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafold.engine.paged_attention import MAX_SPLITS, choose_splits, decode
from tests.interpreter import compile_for_h100, interpreted
from tests.paged import DEVICE, PAGE, Pages, distance, fill_pages, plain_attention, poisoned_buffers
from tests.tolerances import ATTENTION

pytest.importorskip("triton")

MIXED = [1, 15, 0, 16, 17, 70]


@pytest.fixture
def kernels() -> Iterator[None]:
    from lorafold.engine import paged_kernels

    with nullcontext() if DEVICE == "cuda" else interpreted(paged_kernels):
        yield


def queries(batch: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, heads, width, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)


def expected(query_BHD: Tensor, pages: Pages, **how: Any) -> Tensor:
    rows = [
        plain_attention(query_BHD[row][None], key, value, **how)[0] if len(key) else torch.zeros_like(query_BHD[row])
        for row, (key, value) in enumerate(zip(pages.key_BLKD, pages.value_BLKD, strict=True))
    ]
    return torch.stack(rows)


def run(query_BHD: Tensor, pages: Pages, **how: Any) -> Tensor:
    with poisoned_buffers():
        return decode(query_BHD, pages.keys_PSKD, pages.values_PSKD, pages.pages_BN, pages.length_B, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window", "softcap"),
    [
        (2, 2, 64, None, None),
        (4, 1, 128, 20, None),
        (6, 2, 80, None, 5.0),
        (20, 1, 16, 1, None),
        (3, 1, 96, 33, 2.0),
        (2, 1, 256, 1000, None),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_decode_is_plain_attention_over_each_rows_own_places(
    heads: int, kv_heads: int, width: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    pages = fill_pages(MIXED, kv_heads=kv_heads, width=width, dtype=dtype)
    query = queries(len(MIXED), heads, width, dtype)
    how = {"scale": width**-0.5, "window": window, "softcap": softcap}
    assert distance(run(query, pages, **how, splits=2), expected(query, pages, **how)) < ATTENTION[dtype]


@pytest.mark.usefixtures("kernels")
def test_every_length_up_to_some_pages_is_right() -> None:
    lengths = list(range(1, 2 * PAGE + 2))
    pages = fill_pages(lengths, kv_heads=1, width=16, dtype=torch.float32)
    query = queries(len(lengths), 1, 16, torch.float32)
    assert distance(run(query, pages, scale=0.25), expected(query, pages, scale=0.25)) < ATTENTION[torch.float32]


@pytest.mark.parametrize("splits", [1, 4, 32])
@pytest.mark.usefixtures("kernels")
def test_splits_change_nothing_even_when_most_are_empty(splits: int) -> None:
    pages = fill_pages([200, 3], kv_heads=1, width=32, dtype=torch.float32)
    query = queries(2, 2, 32, torch.float32)
    result = run(query, pages, scale=0.2, window=150, splits=splits)
    assert distance(result, expected(query, pages, scale=0.2, window=150)) < ATTENTION[torch.float32]


@pytest.mark.usefixtures("kernels")
def test_another_table_a_lost_window_and_a_lost_softcap_are_seen_by_the_measure() -> None:
    """The negative control: each of these must be far outside the coarsest tolerance."""
    pages = fill_pages([40, 40], kv_heads=1, width=32, dtype=torch.float32)
    query = queries(2, 2, 32, torch.float32)
    right = expected(query, pages, scale=1.0, window=20, softcap=2.0)
    assert distance(run(query, pages, scale=1.0, window=20, softcap=2.0), right) < ATTENTION[torch.float32]
    assert distance(run(query, pages, scale=1.0, window=21, softcap=2.0), right) > ATTENTION[torch.bfloat16]
    assert distance(run(query, pages, scale=1.0, window=20), right) > ATTENTION[torch.bfloat16]
    pages.pages_BN.copy_(pages.pages_BN.flip(0))
    assert distance(run(query, pages, scale=1.0, window=20, softcap=2.0), right) > ATTENTION[torch.bfloat16]


@pytest.mark.usefixtures("kernels")
def test_padding_rows_are_zeros() -> None:
    pages = fill_pages([5, 0], kv_heads=1, width=16, dtype=torch.bfloat16)
    pages.pages_BN[1] = 0
    result = run(queries(2, 2, 16, torch.bfloat16), pages, scale=1.0)
    assert not result[1].any()
    assert result[0].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # The interpreter's maximum of nothing but NaN.
@pytest.mark.usefixtures("kernels")
def test_what_is_no_number_reaches_its_own_row_only() -> None:
    pages = fill_pages([20, 20, 20], kv_heads=1, width=16, dtype=torch.float32)
    query = queries(3, 2, 16, torch.float32)
    right = run(query, pages, scale=1.0)
    pages.keys_PSKD.flatten(0, 1)[pages.places(1)[7]] = float("nan")
    query[2] = float("nan")
    result = run(query, pages, scale=1.0)
    assert torch.equal(result[0], right[0])
    assert result[1:].isnan().all()


@pytest.mark.usefixtures("kernels")
def test_strided_queries_and_a_given_output_are_taken_as_they_are() -> None:
    pages = fill_pages([18, 3], kv_heads=2, width=32, dtype=torch.float32)
    query_HBD = queries(2, 4, 32, torch.float32).transpose(0, 1).contiguous()
    packed_THD = torch.full((5, 4, 32), 7.0, device=DEVICE)
    result = run(query_HBD.transpose(0, 1), pages, scale=1.0, out=packed_THD[1:3])
    assert result.data_ptr() == packed_THD[1:3].data_ptr()
    assert distance(packed_THD[1:3], expected(query_HBD.transpose(0, 1), pages, scale=1.0)) < ATTENTION[torch.float32]
    assert packed_THD[[0, 3, 4]].eq(7.0).all()


def test_splits_fill_the_device_and_never_exceed_the_blocks() -> None:
    assert choose_splits(programs=8, blocks=1000, processors=132) == MAX_SPLITS
    assert choose_splits(programs=512, blocks=1000, processors=132) == 2
    assert choose_splits(programs=8, blocks=3, processors=132) == 4
    assert choose_splits(programs=10_000, blocks=1000, processors=132) == 1


@pytest.mark.parametrize(("dtype", "width", "softcap"), [(torch.bfloat16, 128, None), (torch.float32, 80, 30.0)])
def test_what_the_launchers_ask_for_compiles_for_an_h100(
    dtype: torch.dtype, width: int, softcap: float | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafold.engine import paged_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pages = fill_pages([40], kv_heads=2, width=width, dtype=dtype)
    query = queries(1, 8, width, dtype)

    def launch() -> None:
        decode(query, pages.keys_PSKD, pages.values_PSKD, pages.pages_BN, pages.length_B, scale=1.0, softcap=softcap)

    compiled = compile_for_h100(launch, paged_kernels, EXACT=dtype == torch.float32)
    assert compiled == ["decode_splits", "merge_splits"]


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_new_lengths_and_tables() -> None:
    first = fill_pages([40, 3, 64], kv_heads=2, width=64, dtype=torch.bfloat16)
    second = fill_pages([2, 64, 0], kv_heads=2, width=64, dtype=torch.bfloat16, seed=1)
    query = queries(3, 4, 64, torch.bfloat16)
    run(query, first, scale=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = decode(query, first.keys_PSKD, first.values_PSKD, first.pages_BN, first.length_B, scale=1.0)
    first.keys_PSKD[: len(second.keys_PSKD)] = second.keys_PSKD
    first.values_PSKD[: len(second.values_PSKD)] = second.values_PSKD
    first.pages_BN.copy_(second.pages_BN)
    first.length_B.copy_(second.length_B)
    graph.replay()
    assert distance(result, expected(query, second, scale=1.0)) < ATTENTION[torch.bfloat16]
