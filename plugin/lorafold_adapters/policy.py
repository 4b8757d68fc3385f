"""Decides which adapter is folded and which rows run next.

Pure Python: no tensors, no clocks of its own, no gRPC. Time arrives as an argument. Rows run on sides: the shared side
(the base's weights, two-path for whoever has an adapter) and one folded side per adapter. Rows with the policy `merged`
run on their own side only, `unmerged` ones and the base on the shared one, `auto` ones on either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Mode(Enum):
    """By which path a row is computed."""

    BASE = "base"
    MERGED = "merged"
    UNMERGED = "unmerged"


class PolicyKind(Enum):
    """What a deployment declares."""

    MERGED = "merged"
    UNMERGED = "unmerged"
    AUTO = "auto"


class Cause(Enum):
    """Why a plan folds what it folds, for programs."""

    HELD = "held"
    """An operator said so."""
    ALONE = "alone"
    """Nobody else has rows."""
    TURN = "turn"
    """It waited longest, and the others' turn is over."""
    FOLD_PAYS = "fold_pays"
    """More tokens a second folded, for long enough to pay for a swap."""
    SHARE_PAYS = "share_pays"
    """More tokens a second unmerged, for long enough to pay for a swap."""
    WAITED = "waited"
    """Rows beside a folded `auto` adapter have waited as long as they may."""


SHARED = None
Side = str | None
"""Digest of the adapter that is folded on this side; None is the shared side."""
Group = tuple[str | None, PolicyKind]
"""Rows of one adapter (None is the base) and policy."""


@dataclass(frozen=True, slots=True)
class Hold:
    """What an operator holds in the weights, over every policy."""

    folded: Side


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueView:
    """What a policy sees."""

    held: Hold | None
    folded: str | None
    """What is in the weights now."""
    rows: Mapping[Group, int]
    """Rows that run or wait; only groups that have any."""
    places: int
    """Rows of a step at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the next step does."""

    folded: Side
    """The adapter that must be in the weights; None: the base's weights."""
    cause: Cause
    reason: str
    """Why, for people."""

    def runs(self, group: Group) -> bool:
        """True if rows of this group may run."""
        adapter, kind = group
        if self.folded is SHARED:
            return kind is not PolicyKind.MERGED or adapter is None
        return adapter == self.folded and (kind is not PolicyKind.UNMERGED or self.cause is Cause.HELD)


class Policy(Protocol):
    """Decides what the next step does."""

    def plan(self, view: QueueView, now: float) -> Plan:
        """`view.rows` is not empty; `now` is in seconds on the caller's clock."""
        ...

    def pause(self) -> None:
        """No row can run: the time until the next plan is nobody's loss."""
        ...


def short(side: Side) -> str:
    """A side, for people."""
    return "the shared batch" if side is SHARED else f"adapter {side[:12]}"
