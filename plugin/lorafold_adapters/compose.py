"""How several adapters become one: formulas on the true deltas of one parameter, in fp32.

A part's delta tau is what it adds to the base, and its weight w makes it the task vector `w tau`; a negative weight
negates the task (Ilharco et al. 2023, section 3). Parts arrive one at a time, so that memory does not grow with their
number. Knows nothing of modules or of where deltas come from; `composed.py` applies it.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold_adapters.errors import CompositionInvalid
from lorafold_adapters.truncate import truncated

MAX_WEIGHT = 1e6
"""Beyond any weight that is of use, and far below where fp32 overflows."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What a method needs to be told, beside weights."""

    density: bool = False
    seed: bool = False
    rank: bool = True
    """May be told a rank: that of its unmerged form."""


METHODS = {
    "linear": Method(rank=False),
    "ties": Method(density=True),
    "dare_linear": Method(density=True, seed=True),
    "dare_ties": Method(density=True, seed=True),
    "magnitude_prune": Method(density=True),
    "svd": Method(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """How adapters are composed; which ones, and with which weights, is said beside it."""

    method: str
    """One of `METHODS`."""
    density: float | None = None
    """Share of each part's elements that is kept, above 0 and at most 1: ties, dare_* and magnitude_prune need it."""
    seed: int | None = None
    """Of the random choice of dare_*; 0 unless given."""
    rank: int | None = None
    """svd: of the result, which needs it; others: of the unmerged form, unless it is exact."""

    def __post_init__(self) -> None:
        """Raises CompositionInvalid."""
        if self.method not in METHODS:
            raise CompositionInvalid("method", f"'{self.method}' is no method: use {', '.join(METHODS)}")
        uses = METHODS[self.method]
        for option in ("density", "seed", "rank"):
            if getattr(self, option) is not None and not getattr(uses, option):
                raise CompositionInvalid(option, f"'{self.method}' does not use it: leave it out")
        if uses.density and self.density is None:
            raise CompositionInvalid("density", f"is missing, '{self.method}' needs it: add it")
        if self.density is not None and not 0 < self.density <= 1:
            raise CompositionInvalid("density", f"is {self.density}: it must be above 0 and at most 1")
        if self.method == "svd" and self.rank is None:
            raise CompositionInvalid("rank", "is missing, 'svd' needs it: add it")
        if self.rank is not None and self.rank < 1:
            raise CompositionInvalid("rank", f"is {self.rank}: it must be at least 1")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise CompositionInvalid("seed", f"is {self.seed}: it must be 0 to {MAX_SEED}")


def check_weights(weights: Sequence[float]) -> None:
    """Raises CompositionInvalid for no parts, or a weight that is not finite or out of all proportion."""
    if not weights:
        raise CompositionInvalid("parts", "is empty: name at least one adapter")
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise CompositionInvalid(
                f"parts[{index}].weight", f"is {weight}: it must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One part's share in one parameter."""

    index: int
    """Of the part in the composition."""
    weight: float
    delta: Callable[[], Tensor]
    """Gives a tensor of its own, fp32, which may be written to."""


def combine(spec: Composition, pieces: Iterable[Piece], name: str) -> Tensor:
    """The composed delta of parameter `name`, fp32; parts that do not change it are not among `pieces`.

    linear: `sum_t w_t tau_t` (Ilharco et al. 2023, "task arithmetic"). magnitude_prune: the same of trimmed parts.
    dare_linear: the same of parts after `dropped` (Yu et al. 2023, equation 2 and section 3.3). ties: `elected` of
    trimmed parts (Yadav et al. 2023). dare_ties: `elected` of parts after `dropped`. svd: the linear sum at lower rank.
    """
    thinned = (thin(spec, piece, name) for piece in pieces)
    if spec.method in ("ties", "dare_ties"):
        return elected(thinned)
    total = summed(thinned)
    return truncated(total, spec.rank).product if spec.method == "svd" and total.dim() == 2 and spec.rank else total


def thin(spec: Composition, piece: Piece, name: str) -> Tensor:
    """The part's task vector `w tau`, after whatever the method leaves out of it."""
    delta = piece.delta()
    if spec.density is not None and METHODS[spec.method].seed:
        delta = dropped(delta, spec.density, mask_seed(spec.seed or 0, name, piece.index))
    elif spec.density is not None:
        delta = trimmed(delta, spec.density)
    return delta.mul_(piece.weight)


def summed(vectors: Iterable[Tensor]) -> Tensor:
    """The sum, in the order given. Uses the first up."""
    total: Tensor | None = None
    for vector in vectors:
        total = vector if total is None else total.add_(vector)
    assert total is not None
    return total


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Keeps the share `density` of elements that are largest in magnitude, of equal ones the first; uses `delta` up.

    TIES (Yadav et al. 2023, section 3.2, step 1) trims the vector of all parameters at once; here, as in PEFT, each
    parameter is trimmed by itself, so that one is enough in memory: layers with small deltas keep their share.
    """
    kept = max(1, int(density * delta.numel()))
    if kept >= delta.numel():
        return delta
    flat = delta.view(-1)
    sizes = flat.abs()
    threshold = torch.kthvalue(sizes, delta.numel() - kept + 1).values
    keep = sizes > threshold
    equal = (sizes == threshold).nonzero().flatten()
    keep[equal[: kept - int(keep.sum())]] = True
    flat.mul_(keep)
    return delta


def dropped(delta: Tensor, density: float, seed: int) -> Tensor:
    """DARE (Yu et al. 2023, equation 2): drops all but `density` of the elements, and divides those by it.

    The choice is made on the CPU, so that it is the same on every device. Uses `delta` up.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(delta.shape, generator=generator) < density
    return delta.mul_(keep.to(delta.device)).div_(density)


def mask_seed(seed: int, name: str, index: int) -> int:
    """A seed of its own for every parameter of every part, whatever else is composed before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{name}|{index}".encode()).digest()[:8], "big") >> 1


def elected(vectors: Iterable[Tensor]) -> Tensor:
    """TIES (Yadav et al. 2023, section 3.2, steps 2 and 3): the mean of the elements that have the elected sign.

    The sign of an element is that of its sum over the parts; where that is 0 nobody is elected, and neither is PEFT's
    plus. Weights are in the vectors, so a negated task votes for its own negation. Sums of both signs are kept apart:
    one pass over the parts is enough.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for vector in vectors:
        if not sums:
            sums = [torch.zeros_like(vector) for _ in range(2)]
            counts = [torch.zeros_like(vector, dtype=torch.int16) for _ in range(2)]
        for total, count, side in zip(sums, counts, (vector.clamp(min=0), vector.clamp(max=0)), strict=True):
            total.add_(side)
            count.add_(side != 0)
    positive, negative = (total.div(count.clamp(min=1)) for total, count in zip(sums, counts, strict=True))
    votes = sums[0].add_(sums[1])
    return positive.mul_(votes > 0).add_(negative.mul_(votes < 0))
