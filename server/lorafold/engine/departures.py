"""Tells whoever waits for it how adapters leave the device. Looked at between steps; knows no weights, only rows."""

from collections.abc import Callable
from dataclasses import dataclass

from lorafold.engine.scheduler import Scheduler

Tell = Callable[[int | None], object]


@dataclass(slots=True)
class Watch:
    """One who waits."""

    adapter: str
    tell: Tell
    told: int | None = None


class Departures:
    """All who wait. Every method runs on the engine's thread."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    def watch(self, adapter: str, tell: Tell) -> None:
        """`tell` hears how many requests run on `adapter`, at the next look and at every change, and None at the end.

        The end is when the adapter has left the device, a deployment points at it again, or the engine stops.
        """
        self._watches.append(Watch(adapter, tell))

    def look(self, scheduler: Scheduler, leaving: Callable[[str], bool]) -> None:
        """Tells what has changed. Costs nothing while nobody waits."""
        for watch in list(self._watches):
            if not leaving(watch.adapter):
                self._watches.remove(watch)
                watch.tell(None)
                continue
            count = len({row.request.id for row in scheduler.rows if row.request.adapter == watch.adapter})
            if count != watch.told:
                watch.told = count
                watch.tell(count)

    def close(self) -> None:
        """Tells everybody that it is over."""
        for watch in self._watches:
            watch.tell(None)
        self._watches = []
