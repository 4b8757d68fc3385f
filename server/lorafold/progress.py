"""How far an update is: what whoever waits for it is told. Plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """How far an update is."""

    READ = "read"
    BOUND = "bound"
    MEASURED = "measured"
    STAGED = "staged"
    SAVED = "saved"
    SWITCHED = "switched"
    DRAINING = "draining"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One step of an update."""

    stage: Stage
    done: int = 0
    """MEASURED: parameters so far."""
    total: int = 0
    """MEASURED: of so many."""
    in_flight: int = 0
    """DRAINING: requests that still run on the adapter of before."""


Tell = Callable[[Progress], object]


def nobody(progress: Progress) -> None:
    """For updates that nobody watches."""
