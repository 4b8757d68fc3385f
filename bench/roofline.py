"""The physical limits of decoding: every weight is read once per step, and memory gives so many bytes per second; every
multiplication is done, and the processor does so many of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.rounds import stopwatch

BUFFER_BYTES = {"cpu": 2**30, "cuda": 2**32}
"""Far more than the caches hold."""
PASSES = 3
SQUARE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """What low-rank paths add to one decode step at least."""

    nbytes: int
    """Of the factors, each read once."""
    flops: int
    """A multiplication and an addition are two."""

    def seconds(self, bandwidth: float, rate: float) -> float:
        """At `bandwidth` bytes and `rate` operations per second, both at once."""
        return max(self.nbytes / bandwidth, self.flops / rate)


def extra(shapes: Iterable[tuple[int, int]], rank: int, *, rows: int, adapters: int, itemsize: int) -> Extra:
    """Of adapters of one rank on modules of these (out, in) shapes: B (A x), for each of `rows` tokens."""
    elements = rank * sum(outputs + inputs for outputs, inputs in shapes)
    return Extra(nbytes=adapters * elements * itemsize, flops=2 * rows * elements)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the best of some."""
    size = SQUARE.get(device.type, 2048)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    torch.mm(matrix, matrix)
    return 2 * size**3 / min(stopwatch(device, lambda: torch.mm(matrix, matrix)) for _ in range(2 * PASSES))


class Memory:
    """A buffer on a device, to be read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.ones(BUFFER_BYTES.get(device.type, 2**30) // 4, device=device)

    def bandwidth(self) -> float:
        """Bytes per second at which a sum or a maximum over the buffer reads it: the best of some passes."""
        reductions = (torch.sum, torch.amax)
        return self._buffer.nbytes / min(
            stopwatch(self._device, partial(reduction, self._buffer)) for reduction in reductions for _ in range(PASSES)
        )


def bytes_per_step(model: PreTrainedModel, rows: int) -> int:
    """Bytes of weights that a decode step of `rows` tokens reads: all of them once, of the embedding table only rows.

    Keys and values, and what the layers hand to each other, come on top and are not counted. A table that is the
    output layer too is read whole.
    """
    table = cast(Tensor, model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    every = sum(parameter.nbytes for parameter in model.parameters())
    return every if head is not None and head.weight is table else every - table.nbytes + rows * table[0].nbytes
