"""What `auto` folds, if anything, while base, `unmerged` and `auto` rows have their turn.

Each option makes so many tokens a second: all rows in one two-path batch, or the rows of one adapter folded while the
others wait. Whenever folding is better, the tokens that are lost without it add up; once they are what folding and
giving the base back cost, it is done. That is the ski rental rule (Karlin et al., "Competitive randomized algorithms
for nonuniform problems", 1994): it never loses more than twice what a prophet would, oscillates only when it pays, and
has no constant that is not measured. Two things bend it. An adapter that is alone is folded at once if it has usually
stayed alone for long enough (`Spells`). And where others would stand beside the fold, they and it take turns, so that a
turn must gain what its swap costs, and twice as much must have been lost before the first. Both halves of a swap are
paid for before it begins, so a fold is left as soon as serving all rows together makes more tokens: no row stands
beside it for the sake of hysteresis.
"""

from dataclasses import dataclass

from lorafold_adapters.costs import Costs
from lorafold_adapters.options import Options
from lorafold_adapters.policy import SHARED, Cause, PolicyKind, QueueView, Side, short
from lorafold_adapters.spells import Spells

LONGEST_STEP = 1.0
"""Seconds between two plans that count at most: a pause is nobody's loss."""
BESIDE = 2
"""Swaps there and back that must be paid for before others have to wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What `auto` wants folded."""

    folded: Side = SHARED
    cause: Cause | None = None
    """None as long as it has not chosen anything."""
    reason: str = ""


class AutoChoice:
    """Remembers what was lost against every fold that was not made."""

    def __init__(self, costs: Costs, *, swap_share: float, max_wait: float) -> None:
        """While rows stand beside a folded adapter, they and it take turns, as long as it takes until folding it and
        giving the base back are `swap_share` of the time; they wait `max_wait` seconds of that at most.
        """
        self._costs = costs
        self._swap_share = swap_share
        self._max_wait = max_wait
        self._choice = Choice()
        self._lost: dict[Side, float] = {}
        """Tokens that each other option would have made more than the present one."""
        self._spells = Spells()
        self._last = float("inf")
        self._beside_since: float | None = None
        """Since when rows wait beside the folded adapter."""
        self._owed = float("-inf")
        """Until when those that waited run, whatever pays, unless all of them are done."""

    def choose(self, view: QueueView, now: float) -> Choice:
        """Once a step, while the shared side has its turn."""
        options = Options(self._costs, view, self._choice.folded)
        seconds = max(0.0, min(now - self._last, LONGEST_STEP))
        self._last = now
        self._spells.gained(options.alone, seconds * options.gain(options.alone))
        if options.alone is not None:
            self._owed = float("-inf")
        if self._choice.folded not in options.rates:
            self._choose(SHARED, Cause.SHARE_PAYS, f"no rows left for {short(self._choice.folded)}")
        waited = self._waited(view, now)
        if waited and waited >= self._turn_seconds(options, self._choice.folded):
            owed = waited * (1 / self._share(options, self._choice.folded) - 1)
            self._choose(SHARED, Cause.WAITED, f"others waited {waited:.2g} s beside {short(self._choice.folded)}")
            self._owed = now + owed
        else:
            self._compare(options, seconds, now)
        return self._choice

    def pause(self) -> None:
        """Somebody else has the next turn, or nobody has rows: nothing is lost meanwhile."""
        self._last = float("inf")

    @property
    def _cycle(self) -> float:
        """Seconds of a fold and of giving the base back."""
        return self._costs.fold_seconds + self._costs.restore_seconds

    def _share(self, options: Options, side: Side) -> float:
        """Share of the time in which this adapter is folded while others stand beside it: for a cycle at least."""
        return max(options.fair_share(side), self._swap_share)

    def _turn_seconds(self, options: Options, side: Side) -> float:
        """How long others may wait at a time while this adapter is folded."""
        return min(self._max_wait, self._share(options, side) * self._cycle / self._swap_share)

    def _waited(self, view: QueueView, now: float) -> float:
        """Seconds that rows have stood beside the folded adapter."""
        folded = self._choice.folded
        beside = any(group[1] is not PolicyKind.MERGED and group != (folded, PolicyKind.AUTO) for group in view.rows)
        if folded is SHARED or not beside:
            self._beside_since = None
        elif self._beside_since is None:
            self._beside_since = now
        return 0.0 if self._beside_since is None else now - self._beside_since

    def _compare(self, options: Options, seconds: float, now: float) -> None:
        rates, folded = options.rates, self._choice.folded
        present = rates[folded]
        if folded is not SHARED and rates[SHARED] > present:
            self._choose(SHARED, Cause.SHARE_PAYS, instead(rates[SHARED], "all rows in one batch", present))
            return
        self._lost = {
            side: max(0.0, self._lost.get(side, 0.0) + (made - present) * seconds)
            for side, made in rates.items()
            if side != folded
        }
        better = max(self._lost, key=self._lost.__getitem__, default=folded)
        if rates[better] > present > 0 and now >= self._owed and (paid := self._paid(options, better)):
            gain = instead(rates[better], f"{short(better)} alone", present)
            self._choose(better, Cause.FOLD_PAYS, f"{gain}; {paid}")

    def _paid(self, options: Options, side: Side) -> str:
        """Why swapping there and back is worth it, for people; empty if it is not."""
        paid = self._lost[side] / options.rates[side] / self._cycle if self._cycle else float("inf")
        if options.alone is not None:
            if self._spells.expected(options.alone) >= self._cycle:
                return "it usually stays alone for long enough to pay for a swap"
            return "the difference has paid for a swap" if paid >= 1 else ""
        if self._turn_seconds(options, side) * options.gain(side) < self._cycle:
            return ""
        if self._owed > float("-inf"):
            return "the others have had their share"
        return "the difference has paid for a swap" if paid >= BESIDE else ""

    def _choose(self, side: Side, cause: Cause, reason: str) -> None:
        self._choice = Choice(folded=side, cause=cause, reason=reason)
        self._lost = {}
        self._beside_since = None
        self._owed = float("-inf")


def instead(rate: float, how: str, present: float) -> str:
    """For people."""
    return f"{rate:.0f} tokens/s with {how} instead of {present:.0f}"
