"""Rows that wait, in the order in which they should start: every deployment gets its share of the tokens.

Among deployments of the same priority, the one that has been served least is next (the virtual token counter of Sheng
et al., "Fairness in Serving Large Language Models", OSDI 2024). Within one, rows start in order of arrival, but rows
whose turn it is not do not hold up others: each adapter and policy of a deployment has a queue of its own. Pure Python.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from lorafold.engine.rows import Row
from lorafold_adapters.policy import Group

Key = tuple[str, Group]
"""Deployment, adapter and policy."""


class FairQueue:
    """Queues of the deployments, and how many tokens each deployment was served."""

    def __init__(self) -> None:
        self._queues: dict[Key, OrderedDict[Row, None]] = {}
        self._queued: Counter[str] = Counter()
        """Rows by deployment; none that has no rows."""
        self._length = 0
        self._served: dict[str, float] = {}
        self._last_left = ""
        """The deployment whose queue became empty last."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Row]:
        """All rows, queue by queue."""
        for queue in self._queues.values():
            yield from queue

    def heads(self) -> Iterator[Row]:
        """The first row of each queue that is ready, that of the deployment that should be next at the front.

        Whoever takes it out of the queue before the next one is asked for, gets the row behind it too, in its place.
        """
        order = [(self._rank(key), number, key) for number, key in enumerate(self._queues)]
        heapify(order)
        while order:
            _, number, key = heappop(order)
            row = next((row for row in self._queues.get(key, ()) if row.ready), None)
            if row is None:
                continue
            yield row
            if row not in self._queues.get(key, (row,)):
                heappush(order, (self._rank(key), number, key))

    def ahead_of(self, row: Row) -> int:
        """Rows that are in its own queue already."""
        return len(self._queues.get(key_of(row), ()))

    def _rank(self, key: Key) -> tuple[int, float, tuple[float, int]]:
        first = next(iter(self._queues[key]))
        return -first.request.priority, self._served[key[0]], first.arrival

    def push(self, row: Row) -> None:
        """Puts a row at the end of its queue. A deployment that was idle has saved up nothing."""
        name = row.request.deployment
        if name not in self._queued:
            floor = min(self._served.get(other, 0.0) for other in self._queued or (self._last_left,))
            self._served[name] = max(self._served.get(name, 0.0), floor)
        self._queues.setdefault(key_of(row), OrderedDict())[row] = None
        self._queued[name] += 1
        self._length += 1

    def push_front(self, row: Row) -> None:
        """Puts a row back at the head of its queue."""
        self.push(row)
        self._queues[key_of(row)].move_to_end(row, last=False)

    def remove(self, row: Row) -> None:
        """Takes a row out, wherever it is. Raises KeyError if it is not there."""
        key = key_of(row)
        del self._queues[key][row]
        if not self._queues[key]:
            del self._queues[key]
        name = row.request.deployment
        self._queued[name] -= 1
        self._length -= 1
        if not self._queued[name]:
            del self._queued[name]
            self._last_left = name

    def charge(self, deployment: str, tokens: int) -> None:
        """Says that a deployment was served so many tokens."""
        self._served[deployment] = self._served.get(deployment, 0.0) + tokens


def key_of(row: Row) -> Key:
    """The queue that it belongs to."""
    return row.request.deployment, row.group
