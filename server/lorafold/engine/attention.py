"""Our attention function in transformers' `AttentionInterface`.

A step packs tokens of many sequences into one row [1, T]. Each token's key and value go to its place in the cache; then
every sequence attends to its own places only, by the means that `attention_means` has. No mask function is registered
under our name, so the model builds no mask and hands us `step` and `means` with the keywords of its forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lorafold.engine.attention_math import Kind
from lorafold.engine.attention_means import Means
from lorafold.engine.compiled import attend_op
from lorafold.engine.step import Step

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
    means: Means | None = None,
    compiled_step: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over the cache: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]."""
    refuse_unknown(others)
    layer: int = getattr(module, "layer_idx", 0)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if compiled_step is not None:
        return attend_op(query, key, value, layer, scale, sliding_window or 0, softcap or 0.0, compiled_step), None
    if step is None or means is None:
        raise NotImplementedError("the model does not hand its keywords on to its attention")
    keys_PSKD, values_PSKD = step.cache.store(layer, key, value, step.place_T)
    kind = Kind(scale, sliding_window, softcap)
    query_THD = query[0].transpose(0, 1)
    outputs = []
    if step.decoding:
        outputs.append(means.decode(query_THD[: step.decoding], keys_PSKD, values_PSKD, step, kind))
    if step.chunks:
        outputs.append(means.prefill(query_THD, keys_PSKD, values_PSKD, step, kind))
    output_THD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output_THD.unsqueeze(0), None


def refuse_unknown(keywords: dict[str, Any]) -> None:
    """Raises NotImplementedError for keywords that would change what attention computes."""
    unknown = {name for name, value in keywords.items() if value is not None} - HARMLESS
    if keywords.get("is_causal") is False:
        raise NotImplementedError("the model's attention looks ahead")
    if unknown:
        raise NotImplementedError(f"the model's attention uses {', '.join(sorted(unknown))}")


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
