"""How long decoding stands still between two steps of an engine, and whether the weights changed then.

Knows no engine: it is told when steps end and what they took, in seconds on one clock, and what changes took.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.replay import percentile


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """From the end of one step to the begin of the next, while there was something to do."""

    seconds: float
    changes: int
    """Of the weights, within it."""


class Timeline:
    """What an engine did."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        """Seconds of each step."""
        self.pauses: list[Pause] = []
        self.changes: list[float] = []
        """Seconds of each change of the weights."""
        self._ended: float | None = None
        self._changed = 0

    def step(self, now: float, seconds: float) -> None:
        """A step that took so long ends now."""
        if self._ended is not None:
            self.pauses.append(Pause(seconds=max(0.0, now - seconds - self._ended), changes=self._changed))
        self.steps.append(seconds)
        self._ended, self._changed = now, 0

    def change(self, seconds: float) -> None:
        """The weights changed, which took so long."""
        self.changes.append(seconds)
        self._changed += 1

    def idle(self) -> None:
        """Nobody has asked for anything: what comes until the next step is no pause."""
        self._ended, self._changed = None, 0


def over_fold_time(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Pauses, over the median time of a change of the weights.

    Around changes: their 99th percentile and the longest; the same percentile of all others. What there is none of is
    left out. Raises ValueError if the weights never changed.
    """
    changes = [seconds for timeline in timelines for seconds in timeline.changes]
    if not changes:
        raise ValueError("the weights never changed: measure for longer")
    pauses = [pause for timeline in timelines for pause in timeline.pauses]
    around = [pause.seconds for pause in pauses if pause.changes]
    others = [pause.seconds for pause in pauses if not pause.changes]
    fold = statistics.median(changes)
    found = {"p99": percentile(around, 0.99), "longest": max(around)} if around else {}
    if others:
        found["p99_of_others"] = percentile(others, 0.99)
    return {name: round(seconds / fold, 3) for name, seconds in found.items()}
