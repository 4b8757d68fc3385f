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
from lorafold_adapters.paths import AdapterPath, LowRankPath, finish_
from lorafold_adapters.sharing import Shared, Sightings
from lorafold_adapters.spans import Span
from lorafold_adapters.stacks import Factors
from lorafold_adapters.two_path import Site

Expand = Callable[[Tensor, Tensor, int], None]
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

    def __call__(self, inputs_NI: Tensor, tokens_per_unit: int) -> Tensor:
        """See `sharing.Shrink`; [T, R]."""
        return torch.mm(self.part(inputs_NI, tokens_per_unit), self.a_IR)


@dataclass(frozen=True, slots=True)
class SpanExpand:
    """Adds one adapter's low-rank products to its tokens."""

    part: Part
    columns: slice | None
    """Of the family's products; None: all."""
    path: LowRankPath

    def __call__(self, shrunk_TR: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """See `Expand`."""
        own_TR = shrunk_TR if self.columns is None else shrunk_TR[:, self.columns]
        self.path.add_(own_TR, self.part(outputs_NO, tokens_per_unit))


@dataclass(frozen=True, slots=True)
class StackShrink:
    """Products of the stacked adapters' tokens with their A's."""

    layout: Layout
    a_GIR: Tensor

    def __call__(self, inputs_NI: Tensor, tokens_per_unit: int) -> Tensor:
        """See `sharing.Shrink`; [G, P, R]."""
        return torch.bmm(self.layout.taken(inputs_NI), self.a_GIR)


class StackExpand:
    """Adds the stacked adapters' products to their tokens."""

    __slots__ = ("_b_GRO", "_columns", "_gain_G1O", "_layout", "_shift_G1O")

    def __init__(self, layout: Layout, factors: Factors) -> None:
        self._layout = layout
        self._columns = factors.columns
        self._b_GRO = factors.b_GRO[: layout.slots]
        gain_GO, shift_GO = factors.gain_GO, factors.shift_GO
        self._gain_G1O = None if gain_GO is None else gain_GO[: layout.slots, None]
        self._shift_G1O = None if shift_GO is None else shift_GO[: layout.slots, None]

    def __call__(self, shrunk_GPR: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """See `Expand`."""
        own_GPO = self._layout.taken(outputs_NO)
        own_GPO.baddbmm_(shrunk_GPR[..., self._columns], self._b_GRO)
        finish_(own_GPO, self._gain_G1O, self._shift_G1O)
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
            for expand, shrunk in zip(self.expands, self.shared.of(inputs, tokens_per_unit), strict=True):
                if expand is not None:
                    expand(shrunk, outputs_NO, tokens_per_unit)
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
        outputs: Tensor = self.site.base(inputs, *args, **kwargs).contiguous()
        outputs_NO = outputs.view(-1, outputs.shape[-1])
        tokens_per_unit, rest = divmod(outputs_NO.shape[0], self.units)
        if rest or (
            outputs_NO.shape[0] != self.batch.tokens and self.batch.tokens is not None and not self.site.is_head
        ):
            self.refuse(outputs_NO.shape[0])
        if not self.site.is_head:
            self.sightings.saw(inputs, self.site)
        work = self.rowwise if self.grouped is None or tokens_per_unit != 1 else self.grouped
        work(inputs, outputs_NO, tokens_per_unit)
        return outputs

    def refuse(self, tokens: int) -> None:
        """Raises RoutingMismatch."""
        raise RoutingMismatch(
            f"a layer got {tokens} tokens of a batch of {self.batch.tokens or self.units}: it does not work row by "
            "row; fold the adapter, or run one row at a time"
        )
