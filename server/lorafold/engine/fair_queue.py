"""Rows that wait, in the order in which they should start: every deployment gets its share of the tokens.

A deployment that has been served least is next (the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024); within one, rows start in order of arrival. Pure Python.
"""

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafold.engine.scheduler import Row


class FairQueue:
    """A queue for each deployment, and how many tokens each was served."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Row]] = {}
        self._served: dict[str, float] = {}
        self._last_left = ""
        """The deployment whose queue became empty last."""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator["Row"]:
        """All rows, those that should start first at the front."""
        for name in sorted(self._queues, key=self._served.__getitem__):
            yield from self._queues[name]

    def push(self, row: "Row") -> None:
        """Puts a row at the end of its deployment's queue. One that was idle has saved up nothing."""
        name = row.request.deployment
        if name not in self._queues:
            others = list(self._queues) or [self._last_left]
            floor = min(self._served.get(other, 0.0) for other in others)
            self._served[name] = max(self._served.get(name, 0.0), floor)
            self._queues[name] = deque()
        self._queues[name].append(row)

    def push_front(self, row: "Row") -> None:
        """Puts a row back at the head of its deployment's queue."""
        self.push(row)
        queue = self._queues[row.request.deployment]
        queue.appendleft(queue.pop())

    def remove(self, row: "Row") -> None:
        """Takes a row out, wherever it is. Raises ValueError if it is not there."""
        name = row.request.deployment
        queue = self._queues.get(name, deque())
        queue.remove(row)
        if not queue:
            del self._queues[name]
            self._last_left = name

    def charge(self, deployment: str, tokens: int) -> None:
        """Says that a deployment was served so many tokens."""
        self._served[deployment] = self._served.get(deployment, 0.0) + tokens
