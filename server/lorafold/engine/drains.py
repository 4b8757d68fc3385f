"""What becomes of requests in flight when an operator changes what is folded: they finish, wait, or go on unmerged.

Runs on the engine's thread, between steps. Nothing is changed before all that must end has ended.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum

from lorafold.engine.residents import Residents
from lorafold.engine.rows import Row
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.weights import WeightsControl
from lorafold.engine.weights_state import Change
from lorafold.errors import DeadlineExceeded, EngineStopped, FoldInProgress
from lorafold_adapters.errors import LorafoldError
from lorafold_adapters.policy import Cause, Plan, PolicyKind, Side, short


class DrainMode(Enum):
    """What requests in flight do that cannot run any more."""

    WAIT = "wait"
    """They finish first, as they were; no other request starts meanwhile. Those that nobody reads are parked."""
    PARK = "park"
    """They wait, their keys and values kept, and go on when they may."""
    TWO_PATH = "two_path"
    """They go on unmerged; a fold waits for them to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What an operator wants."""

    folded: Side
    """The adapter to be folded; None: the base."""
    hold: bool
    """Keep it so, over every policy, until `release`."""
    mode: DrainMode
    until: float | None
    """On the engine's clock, seconds: if it cannot be done by then, nothing is changed."""

    def runs(self, row: Row) -> bool:
        """True if a row can run once this is done."""
        return Plan(folded=self.folded, cause=Cause.HELD, reason="").runs(row.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drained:
    """What was done."""

    change: Change
    drained: int
    """Requests' completions that finished before it."""
    parked: int
    """Those in flight that wait now."""
    unmerged: int
    """Those that went on unmerged."""
    seconds: float
    """From the order to the change, that included."""


class Drains:
    """At most one order is under way."""

    def __init__(
        self, scheduler: Scheduler, weights: WeightsControl, residents: Residents, now: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._residents = residents
        self._weights = weights
        self._now = now
        self._order: Order | None = None
        self._rows: dict[Row, None] = {}
        """Those that must end first."""
        self._moved: dict[Row, PolicyKind] = {}
        """Those that go on unmerged for this order, and how they ran before."""
        self._done: Future[Drained] = Future()
        self._since = 0.0
        self._awaited = 0

    @property
    def active(self) -> bool:
        """True while rows must end first."""
        return self._order is not None

    @property
    def adapter(self) -> str | None:
        """The one that the present order needs on the device."""
        return None if self._order is None else self._order.folded

    @property
    def until(self) -> float | None:
        """When the present order is given up."""
        return None if self._order is None else self._order.until

    @property
    def told(self) -> str:
        """What the present order waits for, for people; empty if there is none."""
        if self._order is None:
            return ""
        wanted = (
            "the base is to be given back"
            if self._order.folded is None
            else f"{short(self._order.folded)} is to be folded"
        )
        rows = [row for row in self._rows if not row.ended]
        waits = f"{completions(len(rows))} to end" if rows else "a place for it on the device"
        return f"{wanted} by hand, and waits for {waits}"

    def begin(self, order: Order, done: "Future[Drained]") -> None:
        """Starts on an order; `done` then has what was done, or the error.

        Raises FoldInProgress, or what `WeightsControl.refuse_fold` raises.
        """
        if self._order is not None:
            raise FoldInProgress("another call is changing what is folded: wait for it, or cancel it, and try again")
        if order.folded is not None:
            self._residents.require(order.folded)
            self._weights.refuse_fold(order.folded)
        started = [row for row in self._scheduler.rows if row.admitted]
        stuck = [row for row in started if not order.runs(row)]
        if order.mode is DrainMode.TWO_PATH:
            self._moved = {row: row.kind for row in stuck if self._residents.runs_beside(row.request.adapter)}
            for row in self._moved:
                self._scheduler.move(row, PolicyKind.UNMERGED)
        leave = order.mode is DrainMode.PARK
        self._rows = {} if leave else dict.fromkeys(row for row in stuck if not order.runs(row))
        self._order, self._done, self._since, self._awaited = order, done, self._now(), len(self._rows)
        if self._rows:
            self._scheduler.only(self._rows)

    def advance(self) -> None:
        """Does what was ordered once nothing stands in its way, or gives it up."""
        order = self._order
        if order is None:
            return
        self._rows = {row: None for row in self._rows if not row.ended}
        if all(self._scheduler.is_paused(row) for row in self._rows) and self._residents.here(order.folded):
            self._carry_out(order)
        elif order.until is not None and self._now() > order.until:
            self.give_up(
                DeadlineExceeded(
                    f"{completions(len(self._rows))} had not ended, nothing was changed: allow more time, or "
                    "park them (drain mode 'park')"
                    if self._rows
                    else "all places on the device are taken by adapters with requests in flight, nothing was changed: "
                    "allow more time, or raise residency.device_slots"
                )
            )

    def give_up(self, error: LorafoldError) -> None:
        """Ends the present order, if there is one; nothing was changed."""
        if self._order is None:
            return
        for row, kind in self._moved.items():
            if not row.ended:
                self._scheduler.move(row, kind)
        done = self._finish()
        if not done.done():
            done.set_exception(error)

    def lost(self, adapter: str, error: LorafoldError) -> None:
        """An adapter cannot be brought: an order to fold it fails."""
        if self.adapter == adapter:
            self.give_up(error)

    def cancel(self, done: "Future[Drained]") -> None:
        """Gives up the order of this future if it is still under way: nobody waits for it any more."""
        if self._done is done:
            self.give_up(EngineStopped("cancelled"))

    def _carry_out(self, order: Order) -> None:
        moved, awaited, since = len(self._moved), self._awaited - len(self._rows), self._since
        done = self._finish()
        try:
            change = self._weights.obey(order.folded, hold=order.hold)
        except Exception as error:
            done.set_exception(error)
            if not isinstance(error, LorafoldError):
                raise
            return
        parked = sum(bool(row.admitted) and not order.runs(row) for row in self._scheduler.rows)
        done.set_result(
            Drained(change=change, drained=awaited, parked=parked, unmerged=moved, seconds=self._now() - since)
        )

    def _finish(self) -> "Future[Drained]":
        self._order, self._rows, self._moved = None, {}, {}
        self._scheduler.only(None)
        return self._done


def completions(count: int) -> str:
    """For people."""
    return f"{count} completion{'' if count == 1 else 's'}"
