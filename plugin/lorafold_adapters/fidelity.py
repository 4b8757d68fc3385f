"""How much of an adapter survives being written into weights of a coarse dtype.

A fold rounds `W + delta` once; where the delta is small beside the spacing of the dtype's numbers, what arrives is not
what was meant. Measured parameter by parameter, exactly, from the base's own values.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafold_adapters.delta import Change, chunks
from lorafold_adapters.undo import Rounding

if TYPE_CHECKING:
    from lorafold_adapters.manager import AdapterManager


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterFidelity:
    """What became of one parameter's delta, as sums that can be added up."""

    name: str
    elements: int
    unchanged: int
    """Elements that are the base's still, bit for bit."""
    weight_squares: float
    """Sum of the squares of the base's values."""
    delta_squares: float
    """Of what the adapter adds, exactly."""
    error_squares: float
    """Of what arrived, which is the folded values less the base's as they would be stored, less what was meant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """What became of an adapter's delta."""

    parameters: tuple[ParameterFidelity, ...]

    @property
    def delta_over_weight(self) -> float:
        """rms(delta) / rms(W) over everything the adapter changes."""
        return root_of_ratio(self._sum("delta_squares"), self._sum("weight_squares"))

    @property
    def delta_error(self) -> float:
        """Norm of (what arrived - delta) over the norm of delta: 0 is exact, 1 is as bad as no adapter."""
        return root_of_ratio(self._sum("error_squares"), self._sum("delta_squares"))

    @property
    def unchanged_share(self) -> float:
        """Share of the elements that the fold left as they are, though the adapter changes their parameter."""
        return self._sum("unchanged") / max(1.0, self._sum("elements"))

    def by_parameter(self) -> dict[str, "Fidelity"]:
        """The same for each parameter alone."""
        return {parameter.name: Fidelity(parameters=(parameter,)) for parameter in self.parameters}

    def _sum(self, field: str) -> float:
        return float(sum(getattr(parameter, field) for parameter in self.parameters))


def root_of_ratio(over: float, under: float) -> float:
    """Square root of a ratio of sums of squares; 0 where there is nothing to divide, NaN where either is."""
    return 0.0 if over == under == 0 else math.sqrt(over / under) if under else math.inf


@torch.no_grad()
def measure(name: str, change: Change, base: Tensor, rounding: Rounding) -> ParameterFidelity:
    """Carries `change` out on a copy of `base`, rounded and exactly, and compares; changes nothing.

    Exactly means in fp32 for 16-bit weights, in fp64 for others.
    """
    exact_dtype = torch.float32 if base.element_size() == 2 else torch.float64
    sums = torch.zeros(4, dtype=torch.float64, device=base.device)
    for rows in chunks(base, change, whole=rounding.whole):
        before = base[rows]
        exact = torch.empty(before.shape, dtype=exact_dtype, device=base.device)
        change.forward(before, rows, exact)
        folded = exact
        if exact_dtype == torch.float64:
            folded = torch.empty(before.shape, dtype=torch.float32, device=base.device)
            change.forward(before, rows, folded)
        folded = rounding.function(folded)
        unfolded = before if folded.dtype == base.dtype and not rounding.whole else rounding.function(before)
        delta = exact - before
        sums += torch.stack(
            [
                (folded == unfolded).sum().double(),
                squares(before),
                squares(delta),
                squares(folded.to(exact_dtype) - unfolded - delta),
            ]
        )
    unchanged, weight_squares, delta_squares, error_squares = sums.tolist()
    return ParameterFidelity(
        name=name,
        elements=base.numel(),
        unchanged=int(unchanged),
        weight_squares=weight_squares,
        delta_squares=delta_squares,
        error_squares=error_squares,
    )


def squares(values: Tensor) -> Tensor:
    """Sum of squares, fp64; 16-bit values are summed in fp32."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(values, dtype=dtype)
    return norm.double().square()


@torch.no_grad()
def kl_divergence(manager: "AdapterManager", name: str, ids_BT: Tensor) -> float:
    """How far next-token distributions of adapter `name` folded lie from those of its two-path form, in nats.

    KL(two-path || folded), the mean over all positions of the prompts; both as the base computes in its own dtype.
    Folds the adapter for it, and leaves folded what was folded before.
    Raises AdapterUnsupported if the adapter has only one of the two forms, and what `merge_adapter` raises.
    """
    model, before = manager.model, manager.fold_state.folded
    inputs = ids_BT.to(model.device)
    try:
        manager.unmerge_adapter()
        with manager.routed([name] * len(ids_BT)):
            meant = model(input_ids=inputs, use_cache=False).logits
        manager.merge_adapter(name)
        got = model(input_ids=inputs, use_cache=False).logits
    finally:
        if before is None:
            manager.unmerge_adapter()
        else:
            manager.merge_adapter(before)
    return divergence(meant, got)


def divergence(meant_BTV: Tensor, got_BTV: Tensor) -> float:
    """KL(meant || got) of the distributions that logits stand for, the mean over all positions, in nats."""
    total = 0.0
    for meant_V, got_V in zip(meant_BTV.flatten(0, 1), got_BTV.flatten(0, 1), strict=True):
        meant, got = (torch.log_softmax(logits.double(), dim=0) for logits in (meant_V, got_V))
        total += float((meant.exp() * (meant - got)).sum())
    return total / meant_BTV.shape[:2].numel()
