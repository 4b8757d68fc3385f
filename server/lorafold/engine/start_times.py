"""When a request could start at the soonest, so that one whose deadline is earlier is refused at once. Pure Python."""

from lorafold.engine.rows import Row
from lorafold.errors import DeadlineExceeded
from lorafold_adapters.costs import Recent

CERTAIN = 0.5
"""What is counted of the time that rows usually take: a request that might just make it is not refused."""


class StartTimes:
    """Knows how long rows lately had a place."""

    def __init__(self) -> None:
        self._served = Recent()

    def ended(self, row: Row, now: float) -> None:
        """A row came to its end."""
        if row.admitted and not row.stalled_once:
            self._served.add(now - row.admitted)

    def check(self, row: Row, *, ahead: int, places: int, now: float) -> None:
        """Raises DeadlineExceeded if a row that has `ahead` others before it cannot start in time.

        `places`: how many run at once.
        """
        served = self._served.median
        if row.request.deadline is None or served is None:
            return
        left = row.request.deadline - now
        soonest = CERTAIN * served * ahead / max(1, places)
        if soonest > left:
            raise DeadlineExceeded(
                f"{ahead} completions of '{row.request.deployment}' wait already, which takes {soonest:.1f} s at the "
                f"very least, and the deadline is in {max(0.0, left):.1f} s: allow more time, or ask another server"
            )
