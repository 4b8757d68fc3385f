"""How one parameter changes when an adapter is folded into it: pure arithmetic on chunks of rows.

A change computes in the dtype of `out`, fp32 for folding, so that a fold rounds once. Shapes in the names: N rows and
M columns of a parameter as it is stored, R rank, O out-features, I in-features. Formulas: LoRA (Hu et al. 2021, section
4.1), rsLoRA (Kalajdzievski 2023; its alpha/sqrt(r) arrives here as `scaling`), DoRA (Liu et al. 2024, equation 5).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**21
"""Rows are taken in chunks of about this size, so that what lies between reading and writing stays in the cache."""
DEVICE_CHUNK_ELEMENTS = 2**25
"""The same on a GPU, where starting a kernel costs more than leaving the cache: 128 MB in fp32."""


class Change(Protocol):
    """What an adapter does to one parameter."""

    @property
    def whole(self) -> bool:
        """True if the parameter cannot be taken in chunks."""
        ...

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> Tensor | None:
        """Writes the folded values of `rows` into `out`; `base` holds the same rows of the base, in its dtype.

        `out` is not `base`. Returns what `backward` must know besides, if anything; it is small.
        """
        ...

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """Writes into `out` what the base probably was, given the folded and rounded values of `rows`.

        `memo` is what `forward` returned. The same calls always give the same bits; how near they come decides how
        small an undo record is.
        """
        ...


def chunks(parameter: Tensor, change: Change, *, whole: bool = False) -> Iterator[slice]:
    """The slices of rows in which a change is carried out; `whole`: one, whatever the change allows."""
    rows = parameter.shape[0]
    size = CHUNK_ELEMENTS if parameter.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = rows if change.whole or whole else max(1, size * rows // max(1, parameter.numel()))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, kw_only=True, slots=True)
class AddProduct:
    """`W + scaling * left right`; with DoRA each output then gets the length its magnitude says."""

    left_NR: Tensor
    right_RM: Tensor
    scaling: float
    magnitude: Tensor | None = None
    """DoRA: [N] if outputs are the rows, [M] if they are the columns."""
    outputs_are_rows: bool = True

    @property
    def whole(self) -> bool:
        """The length of a column needs all rows."""
        return self.magnitude is not None and not self.outputs_are_rows

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> Tensor | None:
        """See `Change`; the memo is DoRA's gain."""
        self._add(base, rows, out, self.scaling)
        if self.magnitude is None:
            return None
        gain = self._gain(out, rows)
        out.mul_(gain)
        return gain

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """See `Change`."""
        self._add(folded if memo is None else folded / memo, rows, out, -self.scaling)

    def gain(self, base: Tensor) -> Tensor:
        """DoRA's `m / ||W + delta||` by output, in fp32, for the whole parameter."""
        everything = slice(0, base.shape[0])
        updated = torch.empty(base.shape, dtype=torch.float32, device=base.device)
        self._add(base, everything, updated, self.scaling)
        return self._gain(updated, everything).flatten()

    def _add(self, start: Tensor, rows: slice, out: Tensor, scaling: float) -> None:
        left, right = self.left_NR[rows].to(out), self.right_RM.to(out)
        if start.dtype == out.dtype:
            torch.addmm(start, left, right, alpha=scaling, out=out)
        else:
            out.copy_(start).addmm_(left, right, alpha=scaling)

    def _gain(self, updated: Tensor, rows: slice) -> Tensor:
        assert self.magnitude is not None
        inputs_axis = 1 if self.outputs_are_rows else 0
        magnitude = self.magnitude[rows] if self.outputs_are_rows else self.magnitude
        norm: Tensor = torch.linalg.vector_norm(updated, dim=inputs_axis, keepdim=True)
        return magnitude.to(updated).unsqueeze(inputs_axis) / norm


@dataclass(frozen=True, kw_only=True, slots=True)
class AddValues:
    """`b + scaling * values`."""

    values: Tensor
    scaling: float = 1.0

    @property
    def whole(self) -> bool:
        """Element by element."""
        return False

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """See `Change`."""
        out.copy_(base).add_(self.values[rows].to(out), alpha=self.scaling)

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """See `Change`."""
        out.copy_(folded).sub_(self.values[rows].to(out), alpha=self.scaling)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetValues:
    """Other values altogether."""

    values: Tensor

    @property
    def whole(self) -> bool:
        """Element by element."""
        return False

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """See `Change`."""
        out.copy_(self.values[rows])

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """Nothing is left of the base: the record is a copy."""
        out.copy_(folded)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetRows:
    """Other values in some rows."""

    index_K: Tensor
    """The rows, int64."""
    values_KM: Tensor

    @property
    def whole(self) -> bool:
        """Row by row."""
        return False

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """See `Change`."""
        out.copy_(base)
        here = (self.index_K >= rows.start) & (self.index_K < rows.stop)
        out[(self.index_K[here] - rows.start).to(out.device)] = self.values_KM[here].to(out)

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """Nothing is left of those rows: the record holds them."""
        out.copy_(folded)


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """Whatever a function of the whole parameter gives."""

    function: Callable[[Tensor], Tensor]
    """From the base's values in fp32 (or fp64) to the folded ones."""

    @property
    def whole(self) -> bool:
        """Nothing is known of the function."""
        return True

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """See `Change`."""
        out.copy_(self.function(base.to(out.dtype)))

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """The function cannot be undone: the record holds what it changed."""
        out.copy_(folded)
