"""The parts of a mixed batch, and what each adds to the outputs of a module.

They come in three kinds: spans with a low-rank product of their own, adapters of few tokens each that are stacked, and
spans with anything else.

Shapes in the names: N tokens of a batch, T of a span, I in-features, O out-features, R rank, G slots, P tokens of one
slot.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorafold_adapters.cpu_products import add_expanded, shrunk
from lorafold_adapters.layout import Layout
from lorafold_adapters.paths import AdapterPath
from lorafold_adapters.sharing import Products
from lorafold_adapters.spans import Span
from lorafold_adapters.stacks import Factors


class Expand(Protocol):
    """The second product of a part, at one site."""

    @property
    def nbytes(self) -> int:
        """Of the factors that it reads."""
        ...

    def __call__(self, products: Products, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """Writes adapted outputs over the base's, given what `Shrink` made for the part."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Where a span lies; `whole` spares the slices."""

    start: int
    stop: int
    whole: bool

    @classmethod
    def of(cls, span: Span, units: int) -> "Part":
        """The part of a batch of so many units."""
        return cls(start=span.start, stop=span.stop, whole=span.stop - span.start == units)

    def __call__(self, all_N: Tensor, tokens_per_unit: int) -> Tensor:
        """The part's tokens."""
        return all_N if self.whole else all_N[self.start * tokens_per_unit : self.stop * tokens_per_unit]


@dataclass(frozen=True, slots=True)
class SpanShrink:
    """Products of one adapter's tokens with its A's."""

    part: Part
    a_IR: Tensor
    ranks: tuple[int, ...]
    """Of each site that it changes."""
    is_large: bool
    """See `cpu_products`."""

    def __call__(self, inputs_NI: Tensor, tokens_per_unit: int) -> Products:
        """See `Shrink`; a piece [T, R] for each of `ranks`."""
        inputs_TI = inputs_NI if self.part.whole else self.part(inputs_NI, tokens_per_unit)
        shrunk_TR = shrunk(inputs_TI, self.a_IR) if self.is_large else torch.mm(inputs_TI, self.a_IR)
        return shrunk_TR.split_with_sizes(self.ranks, 1) if len(self.ranks) > 1 else (shrunk_TR,)


@dataclass(frozen=True, slots=True)
class SpanExpand:
    """Adds one adapter's low-rank products to its tokens."""

    part: Part
    piece: int
    b_RO: Tensor
    gain_O: Tensor | None
    shift_O: Tensor | None
    is_large: bool
    """See `cpu_products`."""

    @property
    def nbytes(self) -> int:
        """See `Expand`."""
        return self.b_RO.nbytes

    def __call__(self, products: Products, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """See `Expand`."""
        if not self.part.whole:
            outputs_NO = self.part(outputs_NO, tokens_per_unit)
        if self.is_large:
            add_expanded(outputs_NO, products[self.piece], self.b_RO)
        else:
            outputs_NO.addmm_(products[self.piece], self.b_RO)
        if self.gain_O is not None:
            outputs_NO.mul_(self.gain_O)
        if self.shift_O is not None:
            outputs_NO.add_(self.shift_O)


@dataclass(frozen=True, slots=True)
class StackShrink:
    """Products of the stacked adapters' tokens with their A's."""

    layout: Layout
    a_GIR: Tensor
    ranks: tuple[int, ...]
    """Of each site that they change."""

    def __call__(self, inputs_NI: Tensor, tokens_per_unit: int) -> Products:
        """See `Shrink`; a piece [G, P, R] for each of `ranks`."""
        shrunk_GPR = torch.bmm(self.layout.taken(inputs_NI), self.a_GIR)
        return shrunk_GPR.split_with_sizes(self.ranks, 2) if len(self.ranks) > 1 else (shrunk_GPR,)


class StackExpand:
    """Adds the stacked adapters' products to their tokens."""

    __slots__ = ("_b_GRO", "_gain_G1O", "_layout", "_piece", "_shift_G1O", "nbytes")

    def __init__(self, layout: Layout, piece: int, factors: Factors) -> None:
        self._layout = layout
        self._piece = piece
        self._b_GRO = factors.b_GRO[: layout.slots]
        self.nbytes = self._b_GRO.nbytes
        gain_GO, shift_GO = factors.gain_GO, factors.shift_GO
        self._gain_G1O = None if gain_GO is None else gain_GO[: layout.slots, None]
        self._shift_G1O = None if shift_GO is None else shift_GO[: layout.slots, None]

    def __call__(self, products: Products, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """See `Expand`."""
        own_GPO = self._layout.taken(outputs_NO)
        own_GPO.baddbmm_(products[self._piece], self._b_GRO)
        if self._gain_G1O is not None:
            own_GPO.mul_(self._gain_G1O)
        if self._shift_G1O is not None:
            own_GPO.add_(self._shift_G1O)
        self._layout.put_back(own_GPO, outputs_NO)


@dataclass(frozen=True, slots=True)
class Other:
    """What is no low-rank product, on one span."""

    part: Part
    path: AdapterPath

    def __call__(self, inputs_N: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """Writes the adapted outputs over the base's."""
        own_TO = self.part(outputs_NO, tokens_per_unit)
        own_TO.copy_(self.path(self.part(inputs_N, tokens_per_unit), own_TO))
