"""Attention of sequences that decode, on a CPU: short ones together, on copies; long ones one by one, where they lie.

A call costs tens of microseconds, and so does copying a hundred kilobytes. On two cores, for 32 sequences of 128 tokens
and 4 heads of 64, the calls took 1.7 ms, if the sequences lay in two pieces 4.8, and one call on copies 1.0 ms; from
some megabytes on copying is dearer, and far dearer once the allocator hands out fresh pages for it.

Shapes in the names: B sequences, L places that are seen; H query heads, K key-value heads, G = H / K, D head width;
P pages of S places.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorafold.engine.attention_math import Kind, last, places, run_of, scaled_dot_product
from lorafold.engine.step import Run, Step, Whereabouts

SHORT_BYTES = 1 << 20
"""Keys and values of one sequence up to which it is copied."""
TOGETHER_BYTES = 8 << 20
"""Of all sequences that are copied at once: what an allocator keeps, and a cache holds."""
ONE_THREAD_BYTES = 8 << 20
"""Keys and values of one layer up to which one thread is as fast as all: it need not wait for others, whom the system
may have given something else to do.
"""
MAX_RUNS = 4
"""Pieces up to which reading each where it lies is cheaper than copying them together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Short sequences that are copied and computed at once."""

    rows: tuple[int, ...]
    place_BL: Tensor
    """int64; after the end of a sequence some place that holds numbers."""
    seen_B11L: Tensor | None
    """Which of them are its own; None if all are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a step's sequences are computed in layers of one kind."""

    together: tuple[Together, ...]
    alone: tuple[int, ...]
    nbytes: int
    """Of keys and values that are read."""


def decode_in_place(query_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """The next token of each sequence; see `attention_means.Attend`."""
    layout = layout_of(step, 2 * keys_PSKD.shape[2] * keys_PSKD.shape[3] * keys_PSKD.element_size(), kind.window)
    query_BKGD = query_BHD.reshape(len(query_BHD), keys_PSKD.shape[2], -1, query_BHD.shape[2])
    with threads(1 if layout.nbytes < ONE_THREAD_BYTES else torch.get_num_threads()):
        if len(layout.together) == 1 and not layout.alone:
            return decode_together(query_BKGD, keys_PSKD, values_PSKD, layout.together[0], kind).view(query_BHD.shape)
        output_BKGD = torch.empty_like(query_BKGD, memory_format=torch.contiguous_format)
        for group in layout.together:
            rows = list(group.rows)
            output_BKGD[rows] = decode_together(query_BKGD[rows], keys_PSKD, values_PSKD, group, kind)
        for row in layout.alone:
            where = step.decoding_at[row]
            output_BKGD[row] = decode_alone(query_BKGD[row : row + 1], keys_PSKD, values_PSKD, where, kind)[0]
        return output_BKGD.view(query_BHD.shape)


def layout_of(step: Step, place_bytes: int, window: int | None) -> Layout:
    """The layout for layers like this one."""
    key = (place_bytes, window)
    if key not in step.layouts:
        step.layouts[key] = made_layout(step.decoding_at, place_bytes, window)
    return step.layouts[key]


def made_layout(sequences: Sequence[Whereabouts], place_bytes: int, window: int | None) -> Layout:
    """Which sequences are computed together: all short ones, in groups that are not too large."""
    lengths = [sum(stop - start for start, stop in last(where.runs, window)) for where in sequences]
    short = [row for row, length in enumerate(lengths) if length * place_bytes <= SHORT_BYTES]
    groups = grouped(short, lengths, TOGETHER_BYTES // place_bytes) if len(short) > 1 else []
    inside = {row for group in groups for row in group}
    return Layout(
        together=tuple(together([sequences[row] for row in group], group, window) for group in groups),
        alone=tuple(row for row in range(len(sequences)) if row not in inside),
        nbytes=sum(lengths) * place_bytes,
    )


def grouped(rows: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Groups of rows with `most` places when filled up to the longest; of about one length if there are several."""
    if len(rows) * max(lengths[row] for row in rows) <= most:
        return [list(rows)]
    groups: list[list[int]] = [[]]
    for row in sorted(rows, key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[row] > most:
            groups.append([])
        groups[-1].append(row)
    return groups


def together(sequences: Sequence[Whereabouts], rows: Sequence[int], window: int | None) -> Together:
    """One group."""
    each = [places_of(where, window) for where in sequences]
    longest = max(len(place_L) for place_L in each)
    seen_B11L = None
    if any(len(place_L) < longest for place_L in each):
        length_B1 = torch.tensor([[len(place_L)] for place_L in each])
        seen_B11L = (torch.arange(longest) < length_B1)[:, None, None]
    place_BL = pad_sequence(each, batch_first=True, padding_value=float(each[0][0]))
    return Together(rows=tuple(rows), place_BL=place_BL, seen_B11L=seen_B11L)


def places_of(where: Whereabouts, window: int | None) -> Tensor:
    """The last `window` places, one by one."""
    if where.place_L is None:
        return torch.arange(*last(where.runs, window)[0])
    return where.place_L if window is None else where.place_L[-window:]


def decode_together(query_BKGD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, group: Together, kind: Kind) -> Tensor:
    """A group on copies of its keys and values; returns [B, K, G, D]."""
    key_BKLD, value_BKLD = (
        cached.flatten(0, 1)
        .flatten(1)
        .index_select(0, group.place_BL.flatten())
        .view(*group.place_BL.shape, *cached.shape[2:])
        .transpose(1, 2)
        for cached in (keys_PSKD, values_PSKD)
    )
    return scaled_dot_product(query_BKGD, key_BKLD, value_BKLD, kind, group.seen_B11L)


def decode_alone(query_1KGD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, where: Whereabouts, kind: Kind) -> Tensor:
    """One sequence where it lies, or on a copy if it is short or in many pieces; returns [1, K, G, D]."""
    runs = last(where.runs, kind.window)
    places_read = sum(stop - start for start, stop in runs)
    short = 2 * places_read * keys_PSKD[0, 0].nbytes <= SHORT_BYTES
    if 1 < len(runs) <= MAX_RUNS and kind.softcap is None and not short:
        return decode_by_run(query_1KGD, keys_PSKD, values_PSKD, runs, kind.scale)
    key, value = places(keys_PSKD, where, kind.window), places(values_PSKD, where, kind.window)
    return scaled_dot_product(query_1KGD, key, value, kind)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; takes less than a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decode_by_run(
    query_1KGD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, runs: Sequence[Run], scale: float
) -> Tensor:
    """One sequence that shares a prefix and so lies in pieces: each by itself, then weighted by the sums of their
    exponentials, as Flash-Decoding merges its splits. Returns [1, K, G, D].
    """
    outputs, sums = zip(
        *(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_1KGD, run_of(keys_PSKD, run), run_of(values_PSKD, run), scale=scale
            )
            for run in runs
        ),
        strict=True,
    )
    weights = torch.stack(sums).softmax(dim=0).unsqueeze(-1)
    return (torch.stack(outputs) * weights).sum(dim=0).to(query_1KGD.dtype)
