"""Which rows' deadlines have passed, without looking at all of them. Pure Python."""

import heapq
from itertools import count

from lorafold.engine.rows import Row

LEAST = 64
"""Rows that are kept in any case."""


class Deadlines:
    """Rows by their deadline, seconds on the engine's clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Row]] = []
        self._count = count()
        self._most = LEAST
        """When it is so long, rows that have ended are taken out."""

    def add(self, row: Row) -> None:
        """One more row; nothing happens if it has no deadline."""
        if row.request.deadline is None:
            return
        if len(self._heap) >= self._most:
            self._heap = [item for item in self._heap if not item[2].ended]
            heapq.heapify(self._heap)
            self._most = max(LEAST, 2 * len(self._heap))
        heapq.heappush(self._heap, (row.request.deadline, next(self._count), row))

    @property
    def next(self) -> float | None:
        """The first deadline of a row that has not ended."""
        while self._heap and self._heap[0][2].ended:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> list[Row]:
        """Takes out the rows whose deadline has passed."""
        rows = []
        while (first := self.next) is not None and now > first:
            rows.append(heapq.heappop(self._heap)[2])
        return rows
