"""The unmerged path: layers of the base that add an adapter's low-rank product for the rows that have one.

`install` swaps a module's class in place for a subclass of it, so its parameters stay where they are; with nothing
routed it computes exactly what it did before. Which rows have which adapter is said per forward pass by a `Routing`.

Shapes in the names: T tokens of one span, R rank, I in-features, O out-features.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorafold_adapters.binding import LowRank, Replaced, Update
from lorafold_adapters.delta import dora_gain, low_rank_delta
from lorafold_adapters.errors import RoutingMismatch

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


class AdapterPath(Protocol):
    """What one adapter does at one module."""

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted outputs of one span, given its inputs and what the base makes of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankPath:
    """`g * (W x + s B(A x)) + b`, with g = 1 unless the adapter is DoRA."""

    a_RI: Tensor
    scaled_b_OR: Tensor
    scaled_bias_O: Tensor | None
    gain_O: Tensor | None
    base_bias_O: Tensor | None

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted outputs [T, O] of inputs [T, I] whose outputs under the base are given."""
        adapted_TO = torch.addmm(outputs_TO, inputs @ self.a_RI.T, self.scaled_b_OR.T)
        if self.scaled_bias_O is not None:
            adapted_TO = adapted_TO + self.scaled_bias_O
        if self.gain_O is None:
            return adapted_TO
        if self.base_bias_O is None:
            return adapted_TO * self.gain_O
        return (adapted_TO - self.base_bias_O) * self.gain_O + self.base_bias_O


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplacedPath:
    """The module of modules_to_save itself, in place of the base's."""

    module: nn.Module

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The replaced module's outputs; the base's are dropped."""
        return cast(Tensor, self.module(inputs))


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
        if outputs_NO.shape[0] % routed.units:
            raise RoutingMismatch(f"a layer got {outputs_NO.shape[0]} tokens for {routed.units} routed rows")
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


def path_of(update: Update, module: nn.Module, pristine: Callable[[str], Tensor]) -> AdapterPath:
    """The two-path form of an update, on the module's device and in its dtype.

    `pristine` gives the module's parameters as they are in the base, whatever is folded now.
    """
    if isinstance(update, Replaced):
        return ReplacedPath(module=replica(module, update))
    return low_rank_path(update, cast(nn.Linear, module), pristine)


def low_rank_path(update: LowRank, module: nn.Linear, pristine: Callable[[str], Tensor]) -> LowRankPath:
    """Scales B once, in fp32, so that a forward pass does not have to."""
    weight_OI: Tensor = module.weight if update.magnitude_O is None else pristine("weight")
    a_RI, b_OR = update.a_RI.to(weight_OI.device), update.b_OR.to(weight_OI.device)
    gain_O = None
    if update.magnitude_O is not None:
        delta_OI = low_rank_delta(a_RI, b_OR, update.scaling)
        gain_O = dora_gain(weight_OI, delta_OI, update.magnitude_O.to(weight_OI.device)).to(weight_OI)
    return LowRankPath(
        a_RI=a_RI.to(weight_OI),
        scaled_b_OR=(b_OR.float() * update.scaling).to(weight_OI),
        scaled_bias_O=None if update.bias_O is None else (update.bias_O.float() * update.scaling).to(weight_OI),
        gain_O=gain_O,
        base_bias_O=pristine("bias") if gain_O is not None and module.bias is not None else None,
    )


def replica(module: nn.Module, update: Replaced) -> nn.Module:
    """A copy of `module` that has the adapter's parameters and shares everything else."""
    own = copy.copy(module)
    own.__dict__.pop(SITE, None)
    own.__class__ = getattr(type(module), "lorafold_base", type(module))
    own._parameters = {
        name: None if parameter is None else nn.Parameter(update.parameters[name].to(parameter), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    return own
