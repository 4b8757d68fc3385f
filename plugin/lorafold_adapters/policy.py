"""Decides which adapter is folded and which rows decode next.

Pure Python: no tensors, no clocks of its own, no gRPC. Time arrives as an argument. Rows run in lanes: the shared lane
(base weights, two-path for whoever has an adapter) and one folded lane per adapter. Lanes take turns.
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


SHARED = None
Lane = str | None
"""Digest of the adapter that is folded in this lane; None is the shared lane."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneView:
    """What a policy sees. Every time is in seconds on the caller's clock."""

    pinned: str | None
    """The adapter that an operator holds folded, over every policy."""
    rows: Mapping[Lane, int]
    """Rows that could run, by lane; only lanes that have any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the next step does."""

    folded: Lane
    """The adapter that must be in the weights; only rows of this lane run."""
    reason: str
    """Why, for people."""


class Policy(Protocol):
    """Chooses lanes for rows and turns for lanes."""

    def lane(self, adapter: str | None, kind: PolicyKind, view: LaneView) -> Lane:
        """The lane of a row that is about to start; it stays there."""
        ...

    def plan(self, view: LaneView, now: float) -> Plan:
        """What to do next. `view.rows` is not empty."""
        ...


class TurnTaking:
    """Lanes with rows take turns of `turn_seconds`; whoever has waited longest is next, so nobody starves.

    An `auto` row is folded if no other lane has rows when it starts, and shares otherwise.
    """

    def __init__(self, turn_seconds: float) -> None:
        self._turn_seconds = turn_seconds
        self._lane: Lane = SHARED
        self._since = float("-inf")
        self._waiting: dict[Lane, float] = {}
        """Since when each lane that has rows has not run."""

    def lane(self, adapter: str | None, kind: PolicyKind, view: LaneView) -> Lane:
        """See `Policy.lane`."""
        if adapter is None or kind is PolicyKind.UNMERGED:
            return SHARED
        if kind is PolicyKind.MERGED:
            return adapter
        return adapter if all(lane == adapter for lane in view.rows) else SHARED

    def plan(self, view: LaneView, now: float) -> Plan:
        """See `Policy.plan`."""
        self._waiting = {lane: self._waiting.get(lane, now) for lane in view.rows if lane != self._lane}
        if view.pinned is not None:
            return Plan(folded=view.pinned, reason="held by MergeAdapter")
        if self._lane in view.rows and (not self._waiting or now - self._since < self._turn_seconds):
            return self._stay(len(self._waiting))
        return self._turn(min(self._waiting, key=self._waiting.__getitem__), view, now)

    def _stay(self, waiting: int) -> Plan:
        reason = f"its turn, {waiting} other lanes wait" if waiting else "nobody else has rows"
        return Plan(folded=self._lane, reason=reason)

    def _turn(self, lane: Lane, view: LaneView, now: float) -> Plan:
        over = "turn over" if self._lane in view.rows else "no rows left"
        name = "shared lane" if lane is SHARED else f"adapter {lane[:12]}"
        self._lane, self._since = lane, now
        return Plan(folded=lane, reason=f"{over}; {name} waited longest, with {view.rows[lane]} rows")
