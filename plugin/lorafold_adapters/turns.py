"""The policy of a server: sides take turns, and measured costs decide how long, and what `auto` folds.

Every side with rows of `merged` deployments takes turns with the others and with all rest: base, `unmerged` and `auto`
rows, which `AutoChoice` serves in one batch or behind a fold. dLoRA (Wu et al., OSDI 2024) decides by the same two
quantities, with constants where these are measured.
"""

from lorafold_adapters.auto import AutoChoice
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import SHARED, Cause, Plan, PolicyKind, QueueView, Side, short

UNMEASURED_TURN = 0.05
"""Seconds of a turn before any swap was measured."""


class MeasuredTurns:
    """Implements `policy.Policy`."""

    def __init__(self, costs: Costs, *, swap_share: float, max_wait: float) -> None:
        """`swap_share`: of decode time, what swaps between turns may take. `max_wait`: seconds that rows may wait for
        their turn, as far as turns of at least one swap allow it; it comes before `swap_share`.
        """
        self._costs = costs
        self._swap_share = swap_share
        self._max_wait = max_wait
        self._auto = AutoChoice(costs, swap_share=swap_share, max_wait=max_wait)
        self._side: Side = SHARED
        self._since = float("-inf")
        self._waiting: dict[Side, float] = {}
        """Since when each side that has rows has not had its turn."""
        self._cause, self._reason = Cause.ALONE, "nobody else has rows"

    def plan(self, view: QueueView, now: float) -> Plan:
        """See `Policy.plan`."""
        if view.held is not None:
            self._auto.pause()
            what = "the base" if view.held.folded is SHARED else short(view.held.folded)
            return Plan(folded=view.held.folded, cause=Cause.HELD, reason=f"{what} is held by hand")
        sides = sides_of(view)
        self._waiting = {side: self._waiting.get(side, now) for side in sides if side != self._side}
        if self._side not in sides or (self._waiting and now - self._since >= self.turn_seconds(len(self._waiting))):
            self._turn(min(self._waiting, key=self._waiting.__getitem__), now, over=self._side in sides)
        if self._side is not SHARED:
            self._auto.pause()
            return Plan(folded=self._side, cause=self._cause, reason=self._reason)
        return self._shared(view, now)

    def pause(self) -> None:
        """See `Policy.pause`."""
        self._auto.pause()

    def turn_seconds(self, others: int) -> float:
        """How long a turn lasts while so many other sides wait."""
        swap = self._costs.swap_seconds or UNMEASURED_TURN * self._swap_share
        return max(swap, min(swap / self._swap_share, self._max_wait / others - swap))

    def _turn(self, side: Side, now: float, *, over: bool) -> None:
        waited = now - self._waiting.pop(side)
        if over:
            self._waiting[self._side] = now
            self._cause = Cause.TURN
            self._reason = f"turn over after {now - self._since:.2f} s; {short(side)} waited longest, {waited:.2f} s"
        else:
            self._cause = Cause.TURN if self._waiting else Cause.ALONE
            self._reason = f"no rows left for {short(self._side)}; {short(side)} has some"
        self._side, self._since = side, now

    def _shared(self, view: QueueView, now: float) -> Plan:
        choice = self._auto.choose(view, now)
        if choice.cause is None:
            return Plan(folded=choice.folded, cause=self._cause, reason=self._reason)
        return Plan(folded=choice.folded, cause=choice.cause, reason=choice.reason)


def sides_of(view: QueueView) -> list[Side]:
    """Sides that need turns: one of each adapter with `merged` rows, and the shared one for all others."""
    sides: dict[Side, None] = {}
    for adapter, kind in view.rows:
        sides[adapter if kind is PolicyKind.MERGED else SHARED] = None
    return list(sides)
