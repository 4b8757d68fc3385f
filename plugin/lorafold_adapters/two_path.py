"""The unmerged path: layers of the base that add an adapter's low-rank product for the rows that have one.

`install` swaps a module's class in place for a subclass of it, so its parameters stay where they are; with nothing
routed it computes exactly what it did before. Which rows have which adapter is said per forward pass by a `Routing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafold_adapters.errors import RoutingMismatch
from lorafold_adapters.paths import AdapterPath

SITE = "_lorafold_site"


@dataclass(frozen=True, slots=True)
class Span:
    """Units `start` to `stop` (exclusive) of a batch belong to `adapter`."""

    start: int
    stop: int
    adapter: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Which parts of a batch have an adapter. A unit is a row, or a token where rows are packed."""

    units: int
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, adapters: Sequence[str | None]) -> "Spans":
        """Neighbours with the same adapter become one span; None is the base."""
        spans: list[Span] = []
        for index, adapter in enumerate(adapters):
            if adapter is None:
                continue
            if spans and spans[-1].adapter == adapter and spans[-1].stop == index:
                spans[-1] = Span(spans[-1].start, index + 1, adapter)
            else:
                spans.append(Span(index, index + 1, adapter))
        return cls(units=len(adapters), spans=tuple(spans))


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """One forward pass: the spans of its tokens and of what reaches the output embedding."""

    body: Spans
    head: Spans


@dataclass(slots=True)
class RoutingCell:
    """Shared by all installed layers of one model; None while nothing is routed."""

    current: Routing | None = None
    tokens: int | None = None
    """Of the whole batch, once it is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What is installed on one module."""

    cell: RoutingCell
    is_head: bool
    paths: dict[str, AdapterPath] = field(default_factory=dict)

    def adapt(self, routing: Routing, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Writes the adapted outputs of every routed span over the base's outputs."""
        routed = routing.head if self.is_head else routing.body
        outputs_NO = outputs.view(-1, outputs.shape[-1])
        feature_axes = 0 if inputs.dtype in (torch.int32, torch.int64) else 1
        inputs_N = inputs.reshape(outputs_NO.shape[0], *inputs.shape[inputs.dim() - feature_axes :])
        expected = None if self.is_head else self.cell.tokens
        if outputs_NO.shape[0] % routed.units or expected not in (None, outputs_NO.shape[0]):
            raise RoutingMismatch(
                f"a layer got {outputs_NO.shape[0]} tokens of a batch of {expected or routed.units}: it does not work "
                "row by row; fold the adapter, or run one row at a time"
            )
        tokens = outputs_NO.shape[0] // routed.units
        for span in routed.spans:
            path = self.paths.get(span.adapter)
            if path is not None:
                part = slice(span.start * tokens, span.stop * tokens)
                outputs_NO[part] = path(inputs_N[part], outputs_NO[part])
        return outputs


class TwoPath(nn.Module):
    """Mixed into the class of a module that adapters change."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, then the low-rank path for the routed rows."""
        outputs = super().forward(inputs, *args, **kwargs)
        site: Site = self.__dict__[SITE]
        routing = site.cell.current
        return outputs if routing is None else site.adapt(routing, inputs, outputs)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def two_path_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` whose instances route; one per class."""
    if base not in _classes:
        _classes[base] = type(f"TwoPath{base.__name__}", (TwoPath, base), {"lorafold_base": base})
    return _classes[base]


def install(module: nn.Module, cell: RoutingCell, *, is_head: bool) -> Site:
    """Makes `module` route, in place; returns its site, the existing one if it has one."""
    if SITE not in module.__dict__:
        module.__dict__[SITE] = Site(cell=cell, is_head=is_head)
        module.__class__ = two_path_class(type(module))
    return cast(Site, module.__dict__[SITE])


def uninstall(module: nn.Module) -> None:
    """Makes `module` exactly what it was."""
    module.__class__ = cast(Any, type(module)).lorafold_base
    del module.__dict__[SITE]
