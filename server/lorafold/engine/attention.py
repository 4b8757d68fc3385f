"""Our attention function in transformers' `AttentionInterface`.

A step packs tokens of many sequences into one row [1, T]. Each token's key and value go to its place in the cache; then
every sequence attends to its own places only. No mask function is registered under our name, so the model builds no
mask and hands us `step`, the plan of the batch, with the keywords of its forward.

Shapes in the names: T packed tokens, B decoding sequences, N tokens of one prompt chunk, L cached length,
H query heads, K key-value heads, G = H / K, D head width, P places of the cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorafold.engine.kv_cache import Chunk, Decoding, Run, Step

NAME = "lorafold"
SPY = "lorafold-probe"
# What models pass that changes nothing when decoding without gradients.
HARMLESS = {"position_ids", "is_causal", "use_cache", "output_attentions", "output_router_logits", "cache_position"}


@dataclass(frozen=True, slots=True)
class Kind:
    """What one layer computes."""

    scale: float
    window: int | None
    """How many places a token sees, its own included; None: all before it."""
    softcap: float | None
    """Scores are squeezed into this range by tanh (Gemma 2)."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over the cache: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]."""
    if step is None:
        raise NotImplementedError("the model does not hand its keywords on to its attention")
    refuse_unknown(others)
    keys_PKD, values_PKD = step.cache.store(getattr(module, "layer_idx", 0), key, value, step.place_T)
    kind = Kind(scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window, softcap)
    query_THD = query[0].transpose(0, 1)
    outputs = [prefill(query_THD[chunk.start : chunk.stop], keys_PKD, values_PKD, chunk, kind) for chunk in step.chunks]
    if step.decoding is not None:
        outputs.insert(0, decode(query_THD[: step.decoding.count], keys_PKD, values_PKD, step.decoding, kind))
    output_THD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output_THD.unsqueeze(0), None


def refuse_unknown(keywords: dict[str, Any]) -> None:
    """Raises NotImplementedError for keywords that would change what attention computes."""
    unknown = {name for name, value in keywords.items() if value is not None} - HARMLESS
    if keywords.get("is_causal") is False:
        raise NotImplementedError("the model's attention looks ahead")
    if unknown:
        raise NotImplementedError(f"the model's attention uses {', '.join(sorted(unknown))}")


def decode(query_BHD: Tensor, keys_PKD: Tensor, values_PKD: Tensor, decoding: Decoding, kind: Kind) -> Tensor:
    """One token of each sequence against all that it sees; returns [B, H, D]. Reads the cache where it lies."""
    heads, groups = keys_PKD.shape[1], query_BHD.shape[1] // keys_PKD.shape[1]
    query_BKGD = query_BHD.reshape(decoding.count, heads, groups, -1)
    outputs = [
        scaled_dot_product(
            query_BKGD[row : row + 1], piece(keys_PKD, runs, kind.window), piece(values_PKD, runs, kind.window), kind
        )
        for row, runs in enumerate(decoding.runs)
    ]
    return torch.cat(outputs).reshape(decoding.count, heads * groups, -1)


def prefill(query_NHD: Tensor, keys_PKD: Tensor, values_PKD: Tensor, chunk: Chunk, kind: Kind) -> Tensor:
    """Neighbouring tokens of one sequence against what it has by now; returns [N, H, D]."""
    tokens = chunk.stop - chunk.start
    keys_KLD, values_KLD = piece(keys_PKD, chunk.runs), piece(values_PKD, chunk.runs)
    length = chunk.past + tokens
    seen_NL = None
    if chunk.past or kind.softcap is not None or length > (kind.window or length):
        place_L = torch.arange(length, device=query_NHD.device)
        seen_NL = visible(place_L, place_L[chunk.past :].unsqueeze(1), kind.window)
    output_HND = scaled_dot_product(query_NHD.transpose(0, 1)[None], keys_KLD, values_KLD, kind, seen_NL, causal=True)
    return output_HND[0].transpose(0, 1)


def piece(cached_PKD: Tensor, runs: tuple[Run, ...], window: int | None = None) -> Tensor:
    """The last `window` places of a sequence as [1, K, L, D]: where they lie if that is one run, or else copied."""
    if len(runs) > 1:
        whole = torch.cat([cached_PKD[start:stop] for start, stop in runs])
        start, stop = 0, whole.shape[0]
    else:
        whole, (start, stop) = cached_PKD, runs[0]
    if window is not None:
        start = max(start, stop - window)
    _, heads, width = whole.shape
    return whole.as_strided(
        (1, heads, stop - start, width), (0, width, heads * width, 1), whole.storage_offset() + start * heads * width
    )


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
    grouped = query.shape[1] != key.shape[1]
    if kind.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, seen, scale=kind.scale, is_causal=causal and seen is None, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * kind.scale / kind.softcap) * kind.softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.float().softmax(dim=-1).to(value.dtype) @ value


def register_spy() -> set[int]:
    """Makes a function known as `SPY` that attends and notes the windows it is told in the returned set."""
    windows: set[int] = set()

    def spy(*tensors: Any, **keywords: Any) -> tuple[Tensor, None]:
        if keywords.get("sliding_window") is not None:
            windows.add(keywords["sliding_window"])
        return attend(*tensors, **keywords)

    AttentionInterface.register(SPY, spy)
    return windows


def register() -> None:
    """Makes the function known to transformers as `attn_implementation="lorafold"`; again does no harm."""
    AttentionInterface.register(NAME, attend)
