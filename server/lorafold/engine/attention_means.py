"""By which means attention over the cache is computed, each in two forms: one token of each of many sequences, and
chunks of prompts. All compute the same.

Shapes in the names: T packed tokens, B decoding sequences, N tokens of one chunk, L places that are seen;
H query heads, K key-value heads, G = H / K, D head width; P pages of S places.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from lorafold.engine.paged_attention import decode as paged_decode
from lorafold.engine.paged_prefill import prefill as paged_prefill
from lorafold.engine.step import Chunk, Run, Step, Whereabouts

SMALL_BYTES = 4 << 20
"""Keys of one layer up to which one thread is as fast as all: it need not wait for others, whom the system may have
given something else to do.
"""
MAX_RUNS = 4
"""Pieces up to which reading each where it lies is cheaper than copying them together."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one layer computes."""

    scale: float
    window: int | None
    """How many places a token sees, its own included; None: all before it."""
    softcap: float | None
    """Scores are squeezed into this range by tanh (Gemma 2)."""


Attend = Callable[[Tensor, Tensor, Tensor, Step, Kind], Tensor]
"""Takes queries [tokens, H, D], a layer's keys and values [P, S, K, D], the step and the kind; returns [tokens, H, D].
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """How attention is computed."""

    decode: Attend
    """Of the sequences of the step that decode: takes the queries of these alone."""
    prefill: Attend
    """Of its chunks: takes the queries of all tokens."""
    tables: bool
    """True if it reads on the device where sequences lie."""


def decode_in_place(query_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """Sequence by sequence, reading the cache where it lies: for CPUs, where that is dearer than a call."""
    places_read = sum(stop - start for where in step.decoding_at for start, stop in where.runs)
    with threads(1 if places_read * keys_PSKD[0, 0].nbytes < SMALL_BYTES else torch.get_num_threads()):
        return decode_rows(query_BHD, keys_PSKD, values_PSKD, step, kind)


def decode_rows(query_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """`decode_in_place`, with the threads that there are."""
    heads = keys_PSKD.shape[2]
    query_BKGD = query_BHD.reshape(len(query_BHD), heads, query_BHD.shape[1] // heads, -1)
    outputs = []
    for row, where in enumerate(step.decoding_at):
        query_1KGD = query_BKGD[row : row + 1]
        runs = last(where.runs, kind.window)
        if 1 < len(runs) <= MAX_RUNS and kind.softcap is None:
            outputs.append(decode_by_run(query_1KGD, keys_PSKD, values_PSKD, runs, kind.scale))
        else:
            key, value = places(keys_PSKD, where, kind.window), places(values_PSKD, where, kind.window)
            outputs.append(scaled_dot_product(query_1KGD, key, value, kind))
    return torch.cat(outputs).reshape(query_BHD.shape)


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


def decode_gathered(query_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """All sequences at once, on copies of equal length: for GPUs that have nothing better."""
    assert step.tables is not None
    pages_BN, length_B = step.tables.pages_BN[: step.decoding], step.tables.length_B[: step.decoding]
    place_L = torch.arange(pages_BN.shape[1] * step.cache.size, device=query_BHD.device)
    seen_BL = visible(place_L, length_B.unsqueeze(1) - 1, kind.window)
    key, value = (
        cached[pages_BN].flatten(1, 2).masked_fill_(~seen_BL[:, :, None, None], 0).transpose(1, 2)
        for cached in (keys_PSKD, values_PSKD)
    )
    output_BH1D = scaled_dot_product(query_BHD.unsqueeze(2), key, value, kind, seen_BL[:, None, None])
    return output_BH1D.squeeze(2)


def decode_triton(query_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """All sequences at once, reading the cache where it lies, in one kernel."""
    assert step.tables is not None
    rows = step.tables.rows(0, step.decoding)
    return paged_decode(
        query_BHD,
        keys_PSKD,
        values_PSKD,
        rows.pages_BN,
        rows.length_B,
        scale=kind.scale,
        window=kind.window,
        softcap=kind.softcap,
    )


def prefill_by_chunk(query_THD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """Chunk by chunk."""
    return torch.cat([prefill_chunk(query_THD, keys_PSKD, values_PSKD, chunk, kind) for chunk in step.chunks])


def prefill_chunk(query_THD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, chunk: Chunk, kind: Kind) -> Tensor:
    """Neighbouring tokens of one sequence against what it has by now; returns [N, H, D]."""
    query_HND = query_THD[chunk.start : chunk.stop].transpose(0, 1)
    length = chunk.past + chunk.stop - chunk.start
    seen_NL = None
    if kind.softcap is not None or length > (kind.window or length) or (chunk.past and not query_THD.is_cuda):
        place_L = torch.arange(length, device=query_THD.device)
        seen_NL = visible(place_L, place_L[chunk.past :].unsqueeze(1), kind.window)
    elif chunk.past:
        seen_NL = causal_lower_right(query_HND.shape[1], length)
    key, value = places(keys_PSKD, chunk.where), places(values_PSKD, chunk.where)
    return scaled_dot_product(query_HND[None], key, value, kind, seen_NL, causal=True)[0].transpose(0, 1)


def prefill_triton(query_THD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, step: Step, kind: Kind) -> Tensor:
    """All chunks at once, reading the cache where it lies, in one kernel."""
    assert step.tables is not None
    rows = step.tables.rows(step.decoding)
    output_THD = paged_prefill(
        query_THD,
        keys_PSKD,
        values_PSKD,
        rows.pages_BN,
        rows.start_B,
        rows.count_B,
        rows.length_B,
        longest=max(chunk.stop - chunk.start for chunk in step.chunks),
        scale=kind.scale,
        window=kind.window,
        softcap=kind.softcap,
        out=torch.empty_like(query_THD, memory_format=torch.contiguous_format),
    )
    return output_THD[step.decoding :]


IN_PLACE = Means(decode=decode_in_place, prefill=prefill_by_chunk, tables=False)
"""For CPUs."""
PLAIN = Means(decode=decode_gathered, prefill=prefill_by_chunk, tables=True)
"""For every device, with nothing but torch."""
DECODE: Mapping[str, Attend] = {"torch": decode_gathered, "triton": decode_triton}
PREFILL: Mapping[str, Attend] = {"torch": prefill_by_chunk, "triton": prefill_triton}
"""What a GPU may use, by name; `attention_choice` measures which."""


def places(cached_PSKD: Tensor, where: Whereabouts, window: int | None = None) -> Tensor:
    """The last `window` places of a sequence as [1, K, L, D]: where they lie if they are neighbours, or else copied."""
    if where.place_L is None:
        return run_of(cached_PSKD, last(where.runs, window)[0])
    place_L = where.place_L if window is None else where.place_L[-window:]
    return cached_PSKD.flatten(0, 1).index_select(0, place_L).transpose(0, 1)[None]


def run_of(cached_PSKD: Tensor, run: Run) -> Tensor:
    """Neighbouring places as [1, K, L, D], where they lie."""
    heads, width = cached_PSKD.shape[2:]
    start, stop = run
    shape, strides = (1, heads, stop - start, width), (0, width, heads * width, 1)
    return cached_PSKD.as_strided(shape, strides, start * heads * width)


def last(runs: tuple[Run, ...], window: int | None) -> tuple[Run, ...]:
    """The last `window` places."""
    left = sum(stop - start for start, stop in runs) if window is None else window
    kept: list[Run] = []
    for start, stop in reversed(runs):
        if left > 0:
            kept.append((max(start, stop - left), stop))
            left -= stop - start
    return tuple(reversed(kept))


def visible(place_L: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Which cached places a token at `position` [..., 1] sees: none after itself, none before its window."""
    seen = place_L <= position
    return seen if window is None else seen & (place_L > position - window)


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, kind: Kind, seen: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Attention with grouped key-value heads: query [1, H, N, D], key and value [1, K, L, D].

    Without `seen` [N, L], tokens see everything, or, if `causal`, what is not after them (N = L then).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (kind.softcap is not None or (query.is_cuda and type(seen) is Tensor)):
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1  # The kernels for masks on a GPU know no groups.
    if kind.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, seen, scale=kind.scale, is_causal=causal and seen is None, enable_gqa=groups > 1
        )
    scores = torch.tanh(query @ key.transpose(-1, -2) * kind.scale / kind.softcap) * kind.softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.float().softmax(dim=-1).to(value.dtype) @ value
