"""Decode steps compiled by torch.compile, on a CPU, where Python takes a good part of a short step.

What is compiled is the model's own code between our attention and the linear layers. These two stay what they are, as
custom operators that the compiler does not look into. A compiled graph is handed tensors and numbers only, so the
operator finds the plan of the step under a number.
"""

from itertools import count

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.engine.attention_math import Kind
from lorafold.engine.attention_means import IN_PLACE
from lorafold.engine.step import Step

_steps: dict[int, Step] = {}
_numbers = count(1)


@torch.library.custom_op("lorafold::attend", mutates_args=())
def attend_op(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int, softcap: float, number: int
) -> Tensor:
    """Attention of the step under `number`: query [1, H, T, D] to [1, T, H, D]; 0 is no window and no softcap."""
    step = _steps[number]
    keys_PSKD, values_PSKD = step.cache.store(layer, key, value, step.place_T)
    kind = Kind(scale, window or None, softcap or None)
    return IN_PLACE.decode(query[0].transpose(0, 1), keys_PSKD, values_PSKD, step, kind).unsqueeze(0)


@attend_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int, softcap: float, number: int
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


class CompiledDecode:
    """The forward pass of decode steps without low-rank paths, compiled when the first of them runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._number = next(_numbers)
        self._forward = torch.compile(model.forward, dynamic=True)

    def __call__(self, ids_1T: Tensor, step: Step) -> Tensor:
        """Logits [T, V] of a step in which every sequence decodes."""
        _steps[self._number] = step
        try:
            output = self._forward(
                input_ids=ids_1T, position_ids=step.position_T[None], use_cache=False, compiled_step=self._number
            )
        finally:
            del _steps[self._number]
        logits_TV: Tensor = output.logits[0]
        return logits_TV
