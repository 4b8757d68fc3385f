"""What a site runs while rows are routed: its module's own forward, then the adapters of the rows.

Parts of a batch come in three kinds: spans with a low-rank product of their own, adapters of few tokens each that are
stacked, and spans with anything else. What the sites of a family have in common is computed by its `Shared`.

Shapes in the names: N tokens of a batch, I in-features, O out-features, R rank, G slots, P tokens of one slot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafold_adapters.errors import RoutingMismatch
from lorafold_adapters.layout import Layout
from lorafold_adapters.paths import AdapterPath
from lorafold_adapters.sharing import Products, Shared, Sightings
from lorafold_adapters.spans import Span
from lorafold_adapters.stacks import Factors
from lorafold_adapters.two_path import Site

Expand = Callable[[Products, Tensor, int], None]
"""Writes adapted outputs over the base's [N, O], given what `Shrink` made for its part, and tokens per unit."""


@dataclass(slots=True)
class Batch:
    """The batch of the forward pass that runs now."""

    tokens: int | None = None
    """None until it is known."""
    active: bool = False
    """True while rows are routed."""


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

    def __call__(self, inputs_NI: Tensor, tokens_per_unit: int) -> Products:
        """See `Shrink`; a piece [T, R] for each of `ranks`."""
        inputs_TI = inputs_NI if self.part.whole else self.part(inputs_NI, tokens_per_unit)
        shrunk_TR = torch.mm(inputs_TI, self.a_IR)
        return shrunk_TR.split_with_sizes(self.ranks, 1) if len(self.ranks) > 1 else (shrunk_TR,)


@dataclass(frozen=True, slots=True)
class SpanExpand:
    """Adds one adapter's low-rank products to its tokens."""

    part: Part
    piece: int
    b_RO: Tensor
    gain_O: Tensor | None
    shift_O: Tensor | None

    def __call__(self, products: Products, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """See `Expand`."""
        if not self.part.whole:
            outputs_NO = self.part(outputs_NO, tokens_per_unit)
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

    __slots__ = ("_b_GRO", "_gain_G1O", "_layout", "_piece", "_shift_G1O")

    def __init__(self, layout: Layout, piece: int, factors: Factors) -> None:
        self._layout = layout
        self._piece = piece
        self._b_GRO = factors.b_GRO[: layout.slots]
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


@dataclass(frozen=True, slots=True)
class Work:
    """What one site does for one composition of the batch."""

    shared: Shared | None
    expands: tuple[Expand | None, ...]
    """One for each product of `shared`; None where the adapter does not change this site."""
    others: tuple[Other, ...]

    def __call__(self, inputs: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """Writes the adapted outputs over the base's."""
        if self.shared is not None:
            for expand, products in zip(self.expands, self.shared.of(inputs, tokens_per_unit), strict=True):
                if expand is not None:
                    expand(products, outputs_NO, tokens_per_unit)
        if self.others:
            feature_axes = 0 if inputs.dtype in (torch.int32, torch.int64) else 1
            inputs_N = inputs.reshape(outputs_NO.shape[0], *inputs.shape[inputs.dim() - feature_axes :])
            for other in self.others:
                other(inputs_N, outputs_NO, tokens_per_unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerStep:
    """A site's forward for one composition of the batch."""

    site: Site
    batch: Batch
    sightings: Sightings
    units: int
    rowwise: Work
    """For any number of tokens per unit."""
    grouped: Work | None
    """For one token per unit, if that is another way."""

    def forward(self, inputs: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """See `Step`. Raises RoutingMismatch if the module works on something else than the routed rows."""
        site = self.site
        if site.own is None:
            outputs = type(site.module).forward(site.module, inputs, *args, **kwargs).contiguous()
        else:
            outputs = site.own(inputs, *args, **kwargs).contiguous()
        outputs_NO = outputs.view(-1, outputs.shape[-1])
        tokens, units = outputs_NO.shape[0], self.units
        if tokens != self.batch.tokens or tokens % units:
            self.check(tokens)
        if self.sightings.open:
            self.sightings.saw(inputs, site)
        work = self.rowwise if self.grouped is None or tokens != units else self.grouped
        work(inputs, outputs_NO, tokens // units)
        return outputs

    def check(self, tokens: int) -> None:
        """Raises RoutingMismatch unless the rows can be told apart."""
        expected = None if self.site.is_head else self.batch.tokens
        if tokens % self.units or expected not in (None, tokens):
            raise RoutingMismatch(
                f"a layer got {tokens} tokens of a batch of {expected or self.units}: it does not work row by row; "
                "fold the adapter, or run one row at a time"
            )
