"""Attention of sequences that decode, on a CPU. A sequence is computed in pieces, each by itself, which are then
weighted by the sums of their exponentials, as Flash-Decoding merges its splits: long runs where they lie, and what is
short, of all sequences together, on copies.

A call costs tens of microseconds, and so does copying a hundred kilobytes. On two cores, for 32 sequences of 128 tokens
and 4 heads of 64, the calls took 1.7 ms, if the sequences lay in two runs 4.8, and one call on copies 1.0 ms; from some
megabytes on copying is dearer, and far dearer once the allocator hands out fresh pages for it. In 16 bits without
grouped queries torch's attention takes up to twice as long where the places of one head do not follow each other: there
everything is copied so that they do.

Shapes in the names: B sequences, N pieces, R pieces of one sequence, L places that are seen; H query heads, K key-value
heads, G = H / K, D head width; P pages of S places.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorafold.engine.attention_math import Kind, last, run_of
from lorafold.engine.step import Run, Step

SHORT_BYTES = 5 << 17
"""Keys and values of one sequence that are copied: its shortest runs, up to so many."""
SHORTEST = 8
"""Runs below this part of `SHORT_BYTES` are copied in any case: a call for each would take longer."""
TOGETHER_BYTES = 5 << 20
"""Of all pieces that are copied at once: what an allocator keeps, and a cache holds."""
ONE_THREAD_BYTES = {4: 2 << 20, 2: 1 << 17}
"""Keys and values of one layer, by bytes of a number, up to which one thread is as fast as all: it need not wait for
others, whom the system may have given something else to do. Numbers of 16 bits are computed, not read, for most of the
time.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Places of one sequence that are computed together."""

    row: int
    runs: tuple[Run, ...]
    length: int
    """How many."""
    short: bool
    """True if it is copied, together with others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Pieces that are copied and computed at once."""

    row_N: Tensor | None
    """int64: whose they are; None if that is every sequence in order."""
    place_NCL: Tensor
    """int64; after the end of a piece some place that holds numbers. C is 1, or K: then each head has its own."""
    mask_N11L: Tensor | None
    """fp32: minus infinity there, and else 0; None if all are of one length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """Which pieces make a sequence. They are numbered in the order in which they are computed."""

    piece_BR: Tensor
    """int64; filled up with the sequence's own first one: another's might not be a number, whatever its weight."""
    absent_BR: Tensor
    """bool: what only fills up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a step's sequences are computed in layers of one kind."""

    together: tuple[Together, ...]
    alone: tuple[tuple[int, Run], ...]
    """Sequence and run."""
    merge: Merge | None
    """None if each sequence is one piece, in order."""
    nbytes: int
    """Of keys and values that are read."""


def decode_in_place(query_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """The next token of each sequence; see `attention_means.Attend`."""
    heads, width, bytes_each = *keys_PSKD.shape[2:], keys_PSKD.element_size()
    by_head = bytes_each == 2 and query_BHD.shape[1] == heads
    layout = layout_of(step, 2 * heads * width * bytes_each, kind.window, heads if by_head else 1)
    query_BKGD = query_BHD.reshape(len(query_BHD), heads, -1, width)
    with threads(1 if layout.nbytes < ONE_THREAD_BYTES[bytes_each] else torch.get_num_threads()):
        pieces = []
        for group in layout.together:
            query_NKGD = query_BKGD if group.row_N is None else query_BKGD[group.row_N]
            key, value = copied(keys_PSKD, group.place_NCL), copied(values_PSKD, group.place_NCL)
            pieces.append(attend(query_NKGD, key, value, kind, group.mask_N11L))
        for row, run in layout.alone:
            key, value = run_of(keys_PSKD, run), run_of(values_PSKD, run)
            if by_head:
                key, value = key.contiguous(), value.contiguous()
            pieces.append(attend(query_BKGD[row : row + 1], key, value, kind))
    with threads(1):
        return merged(pieces, layout.merge).view(query_BHD.shape)


def attend(
    query_NKGD: Tensor, key_NKLD: Tensor, value_NKLD: Tensor, kind: Kind, mask_N11L: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention [N, K, G, D], and the logarithms [N, K, G] of the sums of the exponentials, fp32."""
    if kind.softcap is None:
        output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_NKGD, key_NKLD, value_NKLD, attn_mask=mask_N11L, scale=kind.scale
        )
        return output, sums
    scores = torch.tanh(query_NKGD @ key_NKLD.transpose(-1, -2) * kind.scale / kind.softcap).float() * kind.softcap
    if mask_N11L is not None:
        scores += mask_N11L
    return scores.softmax(dim=-1).to(value_NKLD.dtype) @ value_NKLD, scores.logsumexp(dim=-1)


def copied(cached_PSKD: Tensor, place_NCL: Tensor) -> Tensor:
    """Places of the cache as [N, K, L, D]."""
    heads, width = cached_PSKD.shape[2:]
    parts = place_NCL.shape[1]
    rows = cached_PSKD.view(-1, heads // parts * width).index_select(0, place_NCL.flatten())
    return rows.view(*place_NCL.shape, heads // parts, width).transpose(2, 3).flatten(1, 2)


def merged(pieces: Sequence[tuple[Tensor, Tensor]], merge: Merge | None) -> Tensor:
    """Whole sequences [B, K, G, D] out of what was computed of them."""
    output_NKGD = torch.cat([output for output, _ in pieces]) if len(pieces) > 1 else pieces[0][0]
    if merge is None:
        return output_NKGD
    if merge.piece_BR.shape[1] == 1:
        return output_NKGD[merge.piece_BR[:, 0]]
    sums_BRKG = torch.cat([sums for _, sums in pieces])[merge.piece_BR]
    weights_BRKG = sums_BRKG.masked_fill(merge.absent_BR[:, :, None, None], float("-inf")).softmax(dim=1)
    return (output_NKGD[merge.piece_BR] * weights_BRKG.unsqueeze(-1)).sum(dim=1).to(output_NKGD.dtype)


def layout_of(step: Step, place_bytes: int, window: int | None, parts: int) -> Layout:
    """The layout for layers like this one."""
    key = (place_bytes, window, parts)
    if key not in step.layouts:
        step.layouts[key] = made_layout(step.decoding_at, place_bytes, window, parts)
    return step.layouts[key]


def made_layout(sequences: Sequence[tuple[Run, ...]], place_bytes: int, window: int | None, parts: int) -> Layout:
    """Which pieces are computed together: all short ones, in groups that are not too large.

    `parts`: in how many a place is copied.
    """
    most = SHORT_BYTES // place_bytes
    pieces = [piece for row, runs in enumerate(sequences) for piece in pieces_of(row, last(runs, window), most)]
    short, alone = [piece for piece in pieces if piece.short], [piece for piece in pieces if not piece.short]
    if len(short) == 1 and len(short[0].runs) == 1:
        short, alone = [], pieces  # Nothing to share a call with: it is read where it lies.
    groups = grouped(short, TOGETHER_BYTES // place_bytes) if short else []
    order = [piece.row for group in groups for piece in group] + [piece.row for piece in alone]
    return Layout(
        together=tuple(together(group, len(sequences), parts) for group in groups),
        alone=tuple((piece.row, piece.runs[0]) for piece in alone),
        merge=None if order == list(range(len(sequences))) else merge_of(order),
        nbytes=sum(piece.length for piece in pieces) * place_bytes,
    )


def pieces_of(row: int, runs: Sequence[Run], most: int) -> Iterator[Piece]:
    """The shortest runs as one piece, of up to `most` places unless they are too short for calls of their own; and each
    of the others.
    """
    shortest = sorted(runs, key=lambda run: run[1] - run[0])
    lengths = [stop - start for start, stop in shortest]
    up_to = list(accumulate(lengths))
    short = max(bisect_right(up_to, most), bisect_left(lengths, most // SHORTEST))
    if short:
        yield Piece(row, tuple(shortest[:short]), up_to[short - 1], short=True)
    for run, length in zip(shortest[short:], lengths[short:], strict=True):
        yield Piece(row, (run,), length, short=False)


def grouped(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Groups with `most` places when filled up to the longest; of about one length if there are several."""
    if len(pieces) * max(piece.length for piece in pieces) <= most:
        return [list(pieces)]
    groups: list[list[Piece]] = [[]]
    for piece in sorted(pieces, key=lambda piece: piece.length):
        if groups[-1] and (len(groups[-1]) + 1) * piece.length > most:
            groups.append([])
        groups[-1].append(piece)
    return groups


def together(pieces: Sequence[Piece], sequences: int, parts: int) -> Together:
    """One group, of a step with so many sequences, each place in so many parts."""
    rows = [piece.row for piece in pieces]
    lengths = [piece.length for piece in pieces]
    mask_N11L = None
    if min(lengths) < max(lengths):
        beyond_NL = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        mask_N11L = torch.zeros(beyond_NL.shape).masked_fill_(beyond_NL, float("-inf"))[:, None, None]
    return Together(
        row_N=None if rows == list(range(sequences)) else torch.tensor(rows),
        place_NCL=places_of(pieces, max(lengths)).unsqueeze(1) * parts + torch.arange(parts).unsqueeze(1),
        mask_N11L=mask_N11L,
    )


def places_of(pieces: Sequence[Piece], longest: int) -> Tensor:
    """Their places [N, L], int64, each filled up to `longest` with its own last one."""
    most = max(len(piece.runs) for piece in pieces)
    # Of each run, from which place of the piece on it is meant, and how far that lies from the place in the cache.
    tables = []
    for piece in pieces:
        froms = list(accumulate((stop - start for start, stop in piece.runs), initial=0))[:-1]
        shifts = [start - since for (start, _), since in zip(piece.runs, froms, strict=True)]
        missing = most - len(piece.runs)
        tables.append([[*froms, *[longest] * missing], [*shifts, *[0] * missing], [piece.length - 1] * most])
    from_RN1, shift_RN1, last_RN1 = torch.tensor(tables).permute(1, 2, 0).unsqueeze(-1).unbind()
    nth_NL = torch.arange(longest).minimum(last_RN1[0])
    place_NL: Tensor = nth_NL + shift_RN1[0]
    for from_N1, shift_N1 in zip(from_RN1[1:], shift_RN1[1:], strict=True):
        place_NL = torch.where(nth_NL >= from_N1, nth_NL + shift_N1, place_NL)
    return place_NL


def merge_of(order: Sequence[int]) -> Merge:
    """What belongs together, of pieces of these sequences."""
    pieces: list[list[int]] = [[] for _ in range(max(order) + 1)]
    for piece, row in enumerate(order):
        pieces[row].append(piece)
    most = max(map(len, pieces))
    return Merge(
        piece_BR=torch.tensor([[*own, *own[:1] * (most - len(own))] for own in pieces]),
        absent_BR=torch.tensor([[False] * len(own) + [True] * (most - len(own)) for own in pieces]),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; takes less than a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
