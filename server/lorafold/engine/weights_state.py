"""What is known of the weights, for those who ask: plain data, and who is told of changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
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


class Result(Enum):
    """What became of a change of the weights."""

    FOLDED = "folded"
    RESTORED = "restored"
    FAILED = "failed"
    """An adapter could not be folded: the base was given back instead."""
    DAMAGED = "damaged"
    """The base could not be given back."""
    RELOADED = "reloaded"
    """The base was loaded anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one change of the weights took."""

    state: WeightsState
    result: Result
    seconds: float
    weight_bytes: int
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of its parts; see `AdapterManager.take_phases`."""


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

    def held(self, held: bool) -> None:
        """Whether an operator holds the weights."""
        ...

    def verified(self, whole: bool) -> None:
        """The base was compared with its checksums."""
        ...
