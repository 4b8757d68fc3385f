"""What `auto` folds, if anything, while base, `unmerged` and `auto` rows have their turn.

Each option makes so many tokens a second: all rows in one two-path batch, or the rows of one adapter folded while the
others wait. Whenever folding is better, the tokens that are lost without it add up; once they are what folding and
giving the base back cost, it is done. That is the ski rental rule (Karlin et al., "Competitive randomized algorithms
for nonuniform problems", 1994): it never loses more than twice what a prophet would, oscillates only when it pays, and
has no constant that is not measured. Two things bend it. An adapter that is alone is folded at once if it has usually
stayed alone for long enough (`Spells`). And where others would stand beside the fold, twice as much must have been
lost, as they will want their share, which is one more swap there and back. Both halves of a swap are paid for before it
begins, so a fold is left as soon as serving all rows together makes more tokens: no row stands beside it for the sake
of hysteresis.
"""

from dataclasses import dataclass

from lorafold_adapters.costs import Costs
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
        """Rows beside a folded adapter wait `max_wait` seconds at most, or as long as it takes until folding it and
        giving the base back are `swap_share` of the time, if that is less.
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
        """Until when those that waited run, whatever pays."""

    def choose(self, view: QueueView, now: float) -> Choice:
        """Once a step, while the shared side has its turn."""
        rates = self._rates(view)
        seconds = max(0.0, min(now - self._last, LONGEST_STEP))
        self._last = now
        alone = alone_in(view)
        self._spells.gained(alone, seconds * gain(rates, alone))
        if self._choice.folded not in rates:
            self._choose(SHARED, Cause.SHARE_PAYS, f"no rows left for {short(self._choice.folded)}")
        if (waited := self._waited(view, now)) and waited >= self._patience:
            self._owed = now + waited * self._owed_for_waiting(view, rates)
            self._choose(SHARED, Cause.WAITED, f"others waited {waited:.2g} s beside {short(self._choice.folded)}")
        else:
            self._compare(rates, alone, seconds, now)
        return self._choice

    def pause(self) -> None:
        """Somebody else has the next turn, or nobody has rows: nothing is lost meanwhile."""
        self._last = float("inf")

    def _rates(self, view: QueueView) -> dict[Side, float]:
        """Tokens a second of the shared batch, and of the largest group and the present choice folded."""
        counts = {adapter: rows for (adapter, kind), rows in view.rows.items() if kind is PolicyKind.AUTO}
        shared = {group: rows for group, rows in view.rows.items() if group[1] is not PolicyKind.MERGED}
        beside = {adapter for adapter, _ in shared} - {None}
        rows = min(sum(shared.values()), view.places)
        together = self._costs.two_path_seconds(rows, len(beside)) if beside else self._costs.plain_seconds(rows)
        rates: dict[Side, float] = {SHARED: rate(rows, together)}
        for adapter in {self._choice.folded, max(counts, key=counts.__getitem__, default=SHARED)} & counts.keys():
            rows = min(counts[adapter], view.places)
            rates[adapter] = rate(rows, self._costs.plain_seconds(rows))
        return rates

    @property
    def _cycle(self) -> float:
        """Seconds of a fold and of giving the base back."""
        return self._costs.fold_seconds + self._costs.restore_seconds

    @property
    def _patience(self) -> float:
        """Seconds that rows may wait beside a folded adapter."""
        return min(self._max_wait, self._cycle / self._swap_share)

    def _waited(self, view: QueueView, now: float) -> float:
        """Seconds that rows have stood beside the folded adapter."""
        folded = self._choice.folded
        beside = any(group[1] is not PolicyKind.MERGED and group != (folded, PolicyKind.AUTO) for group in view.rows)
        if folded is SHARED or not beside:
            self._beside_since = None
        elif self._beside_since is None:
            self._beside_since = now
        return 0.0 if self._beside_since is None else now - self._beside_since

    def _owed_for_waiting(self, view: QueueView, rates: dict[Side, float]) -> float:
        """Seconds that rows beside the present fold should run for each one that they waited.

        Proportional fairness (Kelly, "Charging and rate control for elastic traffic", 1997): of all shares x of the
        time in which F of N rows run folded, each g faster than beside the others, x = (F g - N + F) / (N g) has the
        largest sum of the logarithms of all rows' rates.
        """
        everyone = sum(rows for (_, kind), rows in view.rows.items() if kind is not PolicyKind.MERGED)
        folded = view.rows[self._choice.folded, PolicyKind.AUTO]
        beside, alone = rates[SHARED] / everyone, rates[self._choice.folded] / folded
        gain = alone / beside - 1 if beside else 0.0
        share = (folded * gain - everyone + folded) / (everyone * gain) if gain > 0 else 0.0
        return 1 / share - 1 if share > 0 else 1.0

    def _compare(self, rates: dict[Side, float], alone: Side, seconds: float, now: float) -> None:
        present = rates[self._choice.folded]
        if self._choice.folded is not SHARED and rates[SHARED] > present:
            self._choose(SHARED, Cause.SHARE_PAYS, instead(rates[SHARED], "all rows in one batch", present))
            return
        self._lost = {
            side: max(0.0, self._lost.get(side, 0.0) + (made - present) * seconds)
            for side, made in rates.items()
            if side != self._choice.folded
        }
        better = max(self._lost, key=self._lost.__getitem__, default=self._choice.folded)
        if not rates[better] > present > 0 or now < self._owed:
            return
        why = instead(rates[better], f"{short(better)} alone", present)
        if alone is not None and self._spells.expected(alone) >= self._cycle:
            self._choose(better, Cause.FOLD_PAYS, f"{why}; it usually stays alone for long enough to pay for a swap")
        elif self._lost[better] >= (BESIDE if alone is None else 1) * self._cycle * rates[better]:
            self._choose(better, Cause.FOLD_PAYS, f"{why}; the difference has paid for a swap")

    def _choose(self, side: Side, cause: Cause, reason: str) -> None:
        self._choice = Choice(folded=side, cause=cause, reason=reason)
        self._lost = {}
        self._beside_since = None


def alone_in(view: QueueView) -> Side:
    """The adapter that has the shared side to itself, and may be folded; None if there is none."""
    groups = [group for group in view.rows if group[1] is not PolicyKind.MERGED]
    adapter, kind = groups[0] if len(groups) == 1 else (SHARED, PolicyKind.AUTO)
    return adapter if kind is PolicyKind.AUTO else SHARED


def gain(rates: dict[Side, float], side: Side) -> float:
    """Share of the time that folding this adapter saves; 0 if nobody knows."""
    return max(0.0, 1 - rates[SHARED] / rates[side]) if rates.get(side) else 0.0


def instead(rate: float, how: str, present: float) -> str:
    """For people."""
    return f"{rate:.0f} tokens/s with {how} instead of {present:.0f}"


def rate(rows: int, seconds: float | None) -> float:
    """Tokens a second; 0 if nobody knows."""
    return rows / seconds if seconds else 0.0
