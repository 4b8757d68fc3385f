"""Two ways to give a parameter back bit for bit: a copy of it, or a record of what rounding would not give back.

Either carries out a change in place, chunk by chunk. An exception between any two lines leaves enough behind to restore
the parameter. Knows single parameters only; which ones an adapter changes is `fold.py`'s business.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorafold_adapters.delta import Change


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What becomes of folded values when they are stored."""

    function: Callable[[Tensor], Tensor]
    whole: bool = False
    """True if it must be given the whole parameter, not chunks of rows."""


class Undo(Protocol):
    """Changes parameters, and gives them back."""

    def reserve(self, names: Iterable[str]) -> None:
        """Takes the memory that writing these parameters needs; raises torch.OutOfMemoryError, taking none."""
        ...

    def write(self, name: str, change: Change) -> list[Tensor]:
        """Makes parameter `name` the base with `change` in it, whatever it was; returns the extents of the values.

        An extent is the smallest and the largest value before rounding, fp32 [2]; both are NaN if any value is.
        """
        ...

    def restore(self, name: str) -> None:
        """Makes it the base's again; does nothing if it is."""
        ...

    def pristine(self, name: str) -> Tensor:
        """The base's values, on the parameter's device; not to be written to."""
        ...

    def target(self, name: str) -> Tensor:
        """A tensor of the shape and dtype that folded values are written in; maybe without values."""
        ...

    def rounding(self, name: str) -> Rounding:
        """What writing does to values."""
        ...

    def extra_bytes(self, name: str) -> int:
        """Memory that the parameter takes while it is folded, beside its own and what the undo keeps."""
        ...

    def rebase(self) -> None:
        """Forgets everything: the parameters now are the base's."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory it holds now, beside the parameters."""
        ...


class Scratch:
    """Buffers that are used again and again: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, chunk: Tensor, role: str = "new", dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of this role in the shape of `chunk`, on its device; its contents are whatever they were."""
        buffer = self._buffers.get((role, dtype))
        if buffer is None or buffer.device != chunk.device or buffer.numel() < chunk.numel():
            buffer = self._buffers[role, dtype] = torch.empty(chunk.numel(), dtype=dtype, device=chunk.device)
        return buffer[: chunk.numel()].view(chunk.shape)

    def rounded(self, values: Tensor, role: str, dtype: torch.dtype) -> Tensor:
        """`values` in `dtype`: themselves if they have it, or else in the buffer of this role."""
        return values if values.dtype == dtype else self.like(values, role, dtype).copy_(values)


def extent(values: Tensor) -> Tensor:
    """Smallest and largest value, [2]; stays on the device, so that nobody waits for it."""
    return torch.stack(torch.aminmax(values))


class InPlace:
    """What both ways have in common: values are written where the parameters lie."""

    _live: Mapping[str, Tensor]

    def reserve(self, names: Iterable[str]) -> None:
        """See `Undo`."""

    def target(self, name: str) -> Tensor:
        """See `Undo`."""
        return self._live[name]

    def rounding(self, name: str) -> Rounding:
        """See `Undo`."""
        dtype = self._live[name].dtype
        return Rounding(function=lambda exact: exact.to(dtype))

    def extra_bytes(self, name: str) -> int:
        """See `Undo`."""
        return 0
