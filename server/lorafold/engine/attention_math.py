"""What the means of attention have in common: places of the cache as keys and values, who sees what, the formula.

Shapes in the names: L places that are seen; H query heads, K key-value heads, D head width; P pages of S places.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.engine.step import Run, Whereabouts


@dataclass(frozen=True, slots=True)
class Kind:
    """What one layer computes."""

    scale: float
    window: int | None
    """How many places a token sees, its own included; None: all before it."""
    softcap: float | None
    """Scores are squeezed into this range by tanh (Gemma 2)."""


def places(cached_PSKD: Tensor, where: Whereabouts) -> Tensor:
    """The places of a sequence as [1, K, L, D]: where they lie if they are neighbours, or else copied."""
    if where.place_L is None:
        return run_of(cached_PSKD, where.runs[0])
    return cached_PSKD.flatten(0, 1).index_select(0, where.place_L).transpose(0, 1)[None]


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
