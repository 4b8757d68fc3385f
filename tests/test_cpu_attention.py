"""Attention over the cache on a CPU, sequences together and alone. The oracle is plain attention, in fp32; every place
of the cache that is nobody's holds NaN.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.engine import cpu_attention
from lorafold.engine.attention_math import Kind
from lorafold.engine.cpu_attention import Layout, Piece, decode_in_place, grouped, made_layout, places_of
from lorafold.engine.step import Run, Step, runs_of
from tests.paged import PAGE, Pages, distance, fill_pages, plain_attention
from tests.tolerances import ATTENTION, EFFECT

KV_HEADS, HEADS, WIDTH = 2, 6, 16
PLACE_BYTES = 2 * KV_HEADS * WIDTH * 4
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the pages that it reads would lie on the GPU")


def step_of(pages: Pages) -> Step:
    sequences = []
    for table, length in zip(pages.pages_BN.tolist(), pages.length_B.tolist(), strict=True):
        sequences.append(tuple(runs_of(table, length, PAGE)))
    return cast(Step, SimpleNamespace(decoding_at=tuple(sequences), layouts={}))


def expected(query_BHD: Tensor, pages: Pages, kind: Kind) -> Tensor:
    rows = [
        plain_attention(
            query_BHD[row : row + 1], key, value, scale=kind.scale, window=kind.window, softcap=kind.softcap
        )
        for row, (key, value) in enumerate(zip(pages.key_BLKD, pages.value_BLKD, strict=True))
    ]
    return torch.cat(rows)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=7),
    window=st.sampled_from([None, 1, 7, 33]),
    softcap=st.sampled_from([None, 2.0]),
    short=st.sampled_from([0, 20, 10_000]),
    most=st.sampled_from([40, 200, 10_000]),
    seed=st.integers(0, 99),
    heads=st.sampled_from([KV_HEADS, HEADS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_way_to_lay_a_step_out_computes_attention(
    lengths: list[int],
    window: int | None,
    softcap: float | None,
    short: int,
    most: int,
    seed: int,
    heads: int,
    dtype: torch.dtype,
) -> None:
    pages = fill_pages(lengths, kv_heads=KV_HEADS, width=WIDTH, dtype=dtype, seed=seed)
    query_BHD = torch.randn(len(lengths), heads, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    kind = Kind(0.5, window, softcap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "SHORT_BYTES", short * 2 * KV_HEADS * WIDTH * dtype.itemsize)
        patch.setattr(cpu_attention, "TOGETHER_BYTES", most * 2 * KV_HEADS * WIDTH * dtype.itemsize)
        result = decode_in_place(query_BHD, pages.keys_PSKD, pages.values_PSKD, step_of(pages), kind)
    assert distance(result, expected(query_BHD, pages, kind)) < ATTENTION[dtype]
    if max(lengths) > 1 and window != 1:  # Negative control: other queries, other results.
        assert distance(result, expected(-query_BHD, pages, kind)) > EFFECT


def test_what_is_no_number_stays_in_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "SHORT_BYTES", 50 * PLACE_BYTES)
    keys, values = torch.randn(2, 20, PAGE, KV_HEADS, WIDTH).unbind()
    values[0, 3] = float("nan")
    sequences = (((0, 20),), ((32, 132), (150, 160)), ((180, 200),))
    step = cast(Step, SimpleNamespace(decoding_at=sequences, layouts={}))
    output = decode_in_place(torch.randn(3, HEADS, WIDTH), keys, values, step, Kind(0.5, None, None))
    assert output.isfinite().flatten(1).all(dim=1).tolist() == [False, True, True]


def rows_of(layout: Layout, sequences: int) -> list[list[int]]:
    return [list(range(sequences)) if group.row_N is None else group.row_N.tolist() for group in layout.together]


def test_short_sequences_are_together_and_long_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "SHORT_BYTES", 100)
    monkeypatch.setattr(cpu_attention, "TOGETHER_BYTES", 250)
    sequences = [((0, length),) for length in (90, 500, 10, 100, 101, 12)]
    layout = made_layout(sequences, 1, None, 1)
    assert rows_of(layout, 6) == [[2, 5], [0, 3]]
    assert layout.alone == ((1, (0, 500)), (4, (0, 101)))
    windowed = made_layout(sequences, 1, 20, 1)
    assert rows_of(windowed, 6) == [[0, 1, 2, 3, 4, 5]]
    assert windowed.merge is None
    assert windowed.nbytes == 20 + 20 + 10 + 20 + 20 + 12
    assert made_layout(sequences[:2], 1, None, 1).together == ()


def test_a_sequence_in_very_many_runs_is_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "SHORT_BYTES", 100)
    runs = tuple((20 * run, 20 * run + 10) for run in range(50))
    layout = made_layout([runs, ((2000, 2500),)], 1, None, 1)
    assert [group.place_NCL.shape for group in layout.together] == [(1, 1, 500)]
    assert layout.alone == ((1, (2000, 2500)),)


def test_the_ends_of_sequences_that_share_a_prefix_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "SHORT_BYTES", 100)
    prefix = (0, 500)
    layout = made_layout([(prefix, (600 + 50 * row, 630 + 50 * row)) for row in range(3)], 1, None, 1)
    assert rows_of(layout, 3) == [[0, 1, 2]]
    assert layout.alone == tuple((row, prefix) for row in range(3))
    assert layout.merge is not None
    assert layout.merge.piece_BR.tolist() == [[0, 3], [1, 4], [2, 5]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(50, 200))
def test_groups_hold_every_piece_once_and_no_more_places_than_they_may(lengths: list[int], most: int) -> None:
    groups = grouped([Piece(row, ((0, length),), length, short=True) for row, length in enumerate(lengths)], most)
    assert sorted(piece.row for group in groups for piece in group) == list(range(len(lengths)))
    assert all(len(group) * max(piece.length for piece in group) <= most for group in groups)


def test_layers_alike_share_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int | None] = []
    real = cpu_attention.made_layout

    def noting(sequences: Sequence[tuple[Run, ...]], place_bytes: int, window: int | None, parts: int) -> Layout:
        made.append(window)
        return real(sequences, place_bytes, window, parts)

    monkeypatch.setattr(cpu_attention, "made_layout", noting)
    pages = fill_pages([5, 40], kv_heads=KV_HEADS, width=WIDTH, dtype=torch.float32)
    step, query = step_of(pages), torch.randn(2, HEADS, WIDTH)
    for window in (None, 8, None, 8):
        decode_in_place(query, pages.keys_PSKD, pages.values_PSKD, step, Kind(1.0, window, None))
    assert made == [None, 8]


def test_layers_of_as_many_numbers_but_other_heads_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "SHORT_BYTES", 1 << 20)
    kind, step = Kind(0.5, None, None), None
    for kv_heads, width in ((HEADS, 16), (HEADS // 3, 48)):
        pages = fill_pages([5, 40], kv_heads=kv_heads, width=width, dtype=torch.bfloat16)
        step = step or step_of(pages)
        query = torch.randn(2, HEADS, width, generator=torch.Generator().manual_seed(0)).bfloat16()
        result = decode_in_place(query, pages.keys_PSKD, pages.values_PSKD, step, kind)
        assert distance(result, expected(query, pages, kind)) < ATTENTION[torch.bfloat16]
        assert distance(result, expected(-query, pages, kind)) > EFFECT  # Negative control.


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_places_are_those_of_the_runs_in_order(lengths: list[list[int]]) -> None:
    starts = [[100 * row + 10 * run for run in range(len(each))] for row, each in enumerate(lengths)]
    pieces = [
        Piece(
            row,
            tuple((start, start + size) for start, size in zip(starts[row], each, strict=True)),
            sum(each),
            short=True,
        )
        for row, each in enumerate(lengths)
    ]
    longest = max(piece.length for piece in pieces)
    for piece, found in zip(pieces, places_of(pieces, longest).tolist(), strict=True):
        wanted = [place for run in piece.runs for place in range(*run)]
        assert found == wanted + wanted[-1:] * (longest - len(wanted))
