"""Rows that have room in the cache, and what they take: pages, places of their deployment, adapters.

Pure Python: no tensors, no model, no policy. `scheduler.py` decides who gets room and who gives it up.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from lorafold.engine.pages import PagePool
from lorafold.engine.rows import Row


class Adapters(Protocol):
    """Which adapters can be used now."""

    def takes(self, digest: str | None) -> bool:
        """True if rows of this adapter may start."""
        ...

    def use(self, digest: str | None) -> None:
        """A row of it has started."""
        ...

    def unuse(self, digest: str | None) -> None:
        """A row of it has no place any more."""
        ...


class Running:
    """Iterates over rows in the order in which they started."""

    def __init__(self, pool: PagePool, adapters: Adapters) -> None:
        self._pool = pool
        self._adapters = adapters
        self._rows: dict[Row, None] = {}
        self._growing: set[Row] = set()
        """Those that may want more pages than they have."""
        self._by_deployment: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __reversed__(self) -> Iterator[Row]:
        return reversed(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def of(self, deployment: str) -> int:
        """How many rows of a deployment run."""
        return self._by_deployment[deployment]

    def limited(self, row: Row) -> bool:
        """True if as many rows of its deployment run as may."""
        most = row.request.max_concurrency
        return most is not None and self._by_deployment[row.request.deployment] >= most

    def fits(self, row: Row) -> bool:
        """True if there are pages for a row, and one more for each running row that may still grow."""
        if not self._rows:
            return True
        room = self._pool.available
        wanted = self._pool.pages_for(len(row.tokens)) + len(self._growing)
        if wanted <= room or wanted - len(row.tokens) // self._pool.size > room:
            return wanted <= room
        known = self._pool.start(row.request.adapter, row.tokens)
        fits = wanted - len(known.pages) <= self._pool.available
        self._pool.release(known)
        return fits

    def start(self, row: Row) -> None:
        """Gives a row that fits its pages; what is known of its tokens is found again."""
        holding = self._pool.start(row.request.adapter, row.tokens)
        self._pool.grow(holding, len(row.tokens), at_most=row.at_most)
        row.holding, row.cached = holding, holding.sealed * self._pool.size
        self._rows[row] = None
        self._note_growth(row)
        self._adapters.use(row.request.adapter)
        self._by_deployment[row.request.deployment] += 1

    def grow(self, row: Row) -> None:
        """Gives a row pages for all its tokens. Raises KvFull."""
        assert row.holding is not None
        self._pool.grow(row.holding, len(row.tokens), at_most=row.at_most)
        self._note_growth(row)

    def free(self, row: Row) -> None:
        """Takes everything back that the row got."""
        del self._rows[row]
        self._growing.discard(row)
        self._adapters.unuse(row.request.adapter)
        self._by_deployment[row.request.deployment] -= 1
        assert row.holding is not None
        self._pool.release(row.holding)
        row.holding, row.cached = None, 0

    def _note_growth(self, row: Row) -> None:
        if len(row.pages) < self._pool.pages_for(row.at_most):
            self._growing.add(row)
        else:
            self._growing.discard(row)

    def check_integrity(self) -> None:
        """Running rows hold exactly the pages that are in use."""
        self._pool.check_integrity([row.holding for row in self._rows if row.holding is not None])
        assert all(row.holding is not None for row in self._rows)
