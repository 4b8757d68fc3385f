"""What is known of the weights, for those who ask: plain data, and who is told of changes."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from lorafold_adapters.policy import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsState:
    """Which adapter is in the weights, and why."""

    generation: int
    folded: str | None
    """Content digest; None: the weights are the base's."""
    pinned: bool
    reason: str
    undo_bytes: int
    """Memory that is held to give the base back."""
    reloads: int
    """How often the base was found damaged and loaded again."""
    provenance: str
    """What folds into a quantised base start from; empty if it is not quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one change of the weights took."""

    state: WeightsState
    seconds: float
    weight_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One change of the weights that is over."""

    time: datetime
    """For people: clocks jump."""
    generation: int
    folded: str | None
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What reading every weight found."""

    tensors: int
    mismatched: tuple[str, ...]
    base_fingerprint: str


class WeightsObserver(Protocol):
    """Whoever keeps count of what becomes of the weights."""

    def planned(self, plan: Plan) -> None:
        """The policy decided on something else than before, or for another cause."""
        ...

    def changed(self, change: Change) -> None:
        """The weights were changed."""
        ...
