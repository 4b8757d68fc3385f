"""Who asks for what at the same time: what `advise` goes by. Pure Python; time arrives as an argument.

Counted in moments, one for each plan, of rows that could run then, whatever the policy lets run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lorafold_adapters.policy import Group

WINDOW = 600.0
"""Seconds after which moments begin to be forgotten; all are after twice as many."""


@dataclass(slots=True)
class Moments:
    """Of one adapter: those in which it had rows."""

    count: int = 0
    alone: int = 0
    """Those in which nobody else had any."""
    rows: int = 0
    """Its own, summed up."""
    all_rows: int = 0
    """Everybody's."""
    adapters: int = 0
    """Distinct ones, its own included."""

    def plus(self, other: "Moments") -> "Moments":
        """Both together."""
        return Moments(
            count=self.count + other.count,
            alone=self.alone + other.alone,
            rows=self.rows + other.rows,
            all_rows=self.all_rows + other.all_rows,
            adapters=self.adapters + other.adapters,
        )


class Traffic:
    """The moments of the last while, by adapter."""

    def __init__(self) -> None:
        self._now: dict[str, Moments] = {}
        self._before: dict[str, Moments] = {}
        self._since = float("-inf")

    def note(self, rows: Mapping[Group, int], now: float) -> None:
        """So many rows of each group can run."""
        if now - self._since > WINDOW:
            self._before, self._now = ({} if now - self._since > 2 * WINDOW else self._now), {}
            self._since = now
        own: dict[str | None, int] = {}
        for (adapter, _), count in rows.items():
            own[adapter] = own.get(adapter, 0) + count
        everybody, adapters = sum(own.values()), len(own.keys() - {None})
        for adapter, count in own.items():
            if adapter is not None:
                moments = self._now.setdefault(adapter, Moments())
                moments.count += 1
                moments.alone += len(own) == 1
                moments.rows += count
                moments.all_rows += everybody
                moments.adapters += adapters

    def of(self, adapter: str) -> Moments:
        """What is remembered of one."""
        return self._now.get(adapter, Moments()).plus(self._before.get(adapter, Moments()))
