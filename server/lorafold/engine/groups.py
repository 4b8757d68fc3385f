"""Rows that have their turns together, how many there are, and how long others had theirs. No tensors, no queues."""

from collections.abc import Iterator

from lorafold.engine.rows import Row, Waits
from lorafold_adapters.policy import Group, Plan


class Groups:
    """The groups that have rows."""

    def __init__(self) -> None:
        self._groups: dict[Group, Waits] = {}
        self._limits: dict[str, int] = {}
        """Of deployments that limit how many of their rows run, as their latest request has it."""

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def rows(self, group: Group) -> int:
        """How many rows a group has."""
        return self._groups[group].rows

    def runnable(self, group: Group) -> int:
        """How many of them can run at once, as far as their deployments' limits go."""
        waits = self._groups[group]
        return waits.rows - sum(max(0, rows - self._limits[name]) for name, rows in waits.limited.items())

    def total(self) -> int:
        """Rows of all groups."""
        return sum(waits.rows for waits in self._groups.values())

    def join(self, row: Row) -> None:
        """One more row; how long it has waited stays."""
        waits = self._groups.setdefault(row.group, Waits())
        waits.rows += 1
        name, most = row.request.deployment, row.request.max_concurrency
        if most is not None:
            self._limits[name] = most
            waits.limited[name] += 1
        row.join(waits)

    def leave(self, row: Row) -> None:
        """One row less."""
        waits = self._groups[row.group]
        waits.rows -= 1
        if row.request.max_concurrency is not None:
            waits.limited[row.request.deployment] -= 1
        if not waits.rows:
            del self._groups[row.group]

    def waited(self, seconds: float, plan: Plan | None = None) -> None:
        """Notes that rows which do not run under this plan, or all of them, waited."""
        for group, waits in self._groups.items():
            if plan is None or not plan.runs(group):
                waits.seconds += seconds
