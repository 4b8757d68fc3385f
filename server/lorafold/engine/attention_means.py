"""By which means attention over the cache is computed, each in two forms: one token of each of many sequences, and
chunks of prompts. All compute the same.

Shapes in the names: T packed tokens, B decoding sequences, N tokens of one chunk, L places that are seen;
H query heads, K key-value heads, G = H / K, D head width; P pages of S places.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from lorafold.engine.attention_math import Kind, places, scaled_dot_product, visible
from lorafold.engine.cpu_attention import decode_in_place
from lorafold.engine.paged_attention import decode as paged_decode
from lorafold.engine.paged_prefill import prefill as paged_prefill
from lorafold.engine.step import Chunk, Step

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
