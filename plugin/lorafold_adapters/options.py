"""What could be folded now, and what each option would make. Pure Python."""

from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import SHARED, PolicyKind, QueueView, Side


class Options:
    """The shared batch, and the largest `auto` adapter and the present one, if it has rows, folded."""

    def __init__(self, costs: Costs, view: QueueView, present: Side) -> None:
        self._rows = {group: rows for group, rows in view.rows.items() if group[1] is not PolicyKind.MERGED}
        self._auto = {adapter: rows for (adapter, kind), rows in self._rows.items() if kind is PolicyKind.AUTO}
        self.rates: dict[Side, float] = {SHARED: rate(self._everyone(view), self._together(costs, view))}
        """Tokens a second, of the rows that would run; 0 if nobody knows."""
        for adapter in {present, max(self._auto, key=self._auto.__getitem__, default=SHARED)} & self._auto.keys():
            rows = min(self._auto[adapter], view.places)
            self.rates[adapter] = rate(rows, costs.plain_seconds(rows))

    @property
    def alone(self) -> Side:
        """The adapter that has the shared side to itself, and may be folded; None if there is none."""
        return next(iter(self._auto)) if len(self._rows) == len(self._auto) == 1 else SHARED

    def gain(self, side: Side) -> float:
        """Share of the time that folding this adapter saves; 0 if nobody knows."""
        return max(0.0, 1 - self.rates[SHARED] / self.rates[side]) if self.rates.get(side) else 0.0

    def fair_share(self, side: Side) -> float:
        """Share of the time in which this adapter should be folded while others stand beside it; 0 to 1.

        Proportional fairness (Kelly, "Charging and rate control for elastic traffic", 1997): of all shares x of the
        time in which F of N rows run folded, each g faster than beside the others, x = (F g - N + F) / (N g) has the
        largest sum of the logarithms of all rows' rates.
        """
        everyone, folded = sum(self._rows.values()), self._auto[side]
        beside, alone = self.rates[SHARED] / everyone, self.rates[side] / folded
        faster = alone / beside - 1 if beside else 0.0
        return max(0.0, (folded * faster - everyone + folded) / (everyone * faster)) if faster > 0 else 0.0

    def _everyone(self, view: QueueView) -> int:
        return min(sum(self._rows.values()), view.places)

    def _together(self, costs: Costs, view: QueueView) -> float | None:
        """Seconds of a step of everybody."""
        adapters = len({adapter for adapter, _ in self._rows} - {None})
        rows = self._everyone(view)
        return costs.two_path_seconds(rows, adapters) if adapters else costs.plain_seconds(rows)


def rate(rows: int, seconds: float | None) -> float:
    """Tokens a second; 0 if nobody knows."""
    return rows / seconds if seconds else 0.0
