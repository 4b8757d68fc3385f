"""The physical limit of decoding: every weight is read once per step, and memory gives so many bytes per second."""

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.rounds import settle

BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Far more than the caches hold."""
PASSES = 3


class Memory:
    """A buffer on a device, to be read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.ones(BUFFER_BYTES.get(device.type, 2**30) // 4, device=device)

    def bandwidth(self) -> float:
        """Bytes per second at which a sum or a maximum over the buffer reads it: the best of some passes."""
        reductions = (torch.sum, torch.amax)
        return self._buffer.nbytes / min(self._seconds(reduction) for reduction in reductions for _ in range(PASSES))

    def _seconds(self, reduction: Callable[[Tensor], Tensor]) -> float:
        settle(self._device)
        start = time.perf_counter()
        reduction(self._buffer)
        settle(self._device)
        return time.perf_counter() - start


def bytes_per_step(model: PreTrainedModel, rows: int) -> int:
    """Bytes of weights that a decode step of `rows` tokens reads: all of them once, of the embedding table only rows.

    Keys and values, and what the layers hand to each other, come on top and are not counted. A table that is the
    output layer too is read whole.
    """
    table = cast(Tensor, model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    every = sum(parameter.nbytes for parameter in model.parameters())
    return every if head is not None and head.weight is table else every - table.nbytes + rows * table[0].nbytes
