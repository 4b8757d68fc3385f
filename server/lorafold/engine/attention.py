"""Our attention function in transformers' `AttentionInterface`.

A step packs tokens of many sequences into one row [1, T]. Each token's key and value go to its sequence's slot of the
cache; then every sequence attends to its own slot only. No mask function is registered under our name, so the model
builds no mask and hands us `step`, the plan of the batch, with the keywords of its forward.

Shapes in the names: T packed tokens, B decoding sequences, N tokens of one prompt chunk, L cached length,
H query heads, K key-value heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorafold.engine.kv_cache import Chunk, Step

NAME = "lorafold"
SPY = "lorafold-probe"
# What models pass that changes nothing when decoding without gradients.
HARMLESS = {"position_ids", "is_causal", "use_cache", "output_attentions", "output_router_logits", "cache_position"}


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
    keys, values = step.cache.store(getattr(module, "layer_idx", 0), key, value, step)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    output_HTD = query.new_empty(query.shape[1], query.shape[2], value.shape[-1])
    if step.decoding_B.numel():
        output_HTD[:, step.decoding_B] = decode(query[0], keys, values, step, scale, sliding_window, softcap)
    for chunk in step.chunks:
        part = slice(chunk.start, chunk.stop)
        output_HTD[:, part] = prefill(query[0, :, part], keys, values, chunk, scale, sliding_window, softcap)
    return output_HTD.transpose(0, 1).unsqueeze(0).contiguous(), None


def refuse_unknown(keywords: dict[str, Any]) -> None:
    """Raises NotImplementedError for keywords that would change what attention computes."""
    unknown = {name for name, value in keywords.items() if value is not None} - HARMLESS
    if keywords.get("is_causal") is False:
        raise NotImplementedError("the model's attention looks ahead")
    if unknown:
        raise NotImplementedError(f"the model's attention uses {', '.join(sorted(unknown))}")


def decode(
    query_HTD: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One token of each decoding sequence against its whole slot; returns [H, B, D]."""
    query_BHD = query_HTD[:, step.decoding_B].transpose(0, 1).unsqueeze(2)
    slot_B, position_B = step.slot_T[step.decoding_B], step.position_T[step.decoding_B]
    keys_BKLD = keys[slot_B, :, : step.decoding_length]
    values_BKLD = values[slot_B, :, : step.decoding_length]
    place_L = torch.arange(step.decoding_length, device=query_HTD.device)
    seen_BL = visible(place_L, position_B.unsqueeze(1), window)
    output = scaled_dot_product(query_BHD, keys_BKLD, values_BKLD, seen_BL[:, None, None], scale, softcap)
    return output.squeeze(2).transpose(0, 1)


def prefill(
    query_HND: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: Chunk,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """A chunk of one prompt against what its slot holds by now; returns [H, N, D]."""
    tokens = chunk.stop - chunk.start
    length = chunk.past + tokens
    place_L = torch.arange(length, device=query_HND.device)
    seen_NL = visible(place_L, place_L[chunk.past :].unsqueeze(1), window)
    keys_KLD, values_KLD = keys[chunk.slot, :, :length], values[chunk.slot, :, :length]
    output = scaled_dot_product(query_HND[None], keys_KLD[None], values_KLD[None], seen_NL, scale, softcap)
    return output[0]


def visible(place_L: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Which cached places a token at `position` [..., 1] sees: none after itself, none before its window."""
    seen = place_L <= position
    return seen if window is None else seen & (place_L > position - window)


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention with grouped key-value heads; with `softcap` (Gemma 2) the scores are squeezed by tanh first."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * scale / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).float().softmax(dim=-1)
    return weights.to(value.dtype) @ value


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
