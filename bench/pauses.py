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
    changing: float = 0.0
    """Seconds of it in which the weights changed."""


class Timeline:
    """What an engine did."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        """Seconds of each step."""
        self.pauses: list[Pause] = []
        self.changes: list[float] = []
        """Seconds of each change of the weights."""
        self.folds: list[float] = []
        """Seconds of each of those that put an adapter in."""
        self._ended: float | None = None
        self._answering = False
        self._changing = 0.0

    def step(self, now: float, seconds: float) -> None:
        """A step that took so long ends now."""
        if self._ended is not None:
            self.pauses.append(Pause(seconds=max(0.0, now - seconds - self._ended), changing=self._changing))
        self.steps.append(seconds)
        self._ended, self._answering, self._changing = now, True, 0.0

    def answered(self, now: float) -> None:
        """The answers of the last step have been told, which belongs to it, or nothing has happened since."""
        if self._answering:
            self._ended, self._answering = now, False

    def change(self, seconds: float, *, folds: bool) -> None:
        """The weights changed, which took so long; `folds`: an adapter is in them now."""
        self.changes.append(seconds)
        self.folds.extend([seconds] * folds)
        self._changing += seconds

    def idle(self) -> None:
        """Nobody has asked for anything: what comes until the next step is no pause."""
        self._ended, self._changing = None, 0.0


def over_fold_time(timelines: Sequence[Timeline]) -> dict[str, float]:
    """How much longer decoding stood still than the weights took to change.

    Of the pauses with a change, over the time of that change: median, 99th percentile and longest. Over the median
    fold: the longest of them (`longest_over_median_fold`), and the 99th percentile of those without (`p99_of_others`).
    Raises ValueError if nothing was ever folded.
    """
    pauses = [pause for timeline in timelines for pause in timeline.pauses]
    around = [pause for pause in pauses if pause.changing]
    others = [pause.seconds for pause in pauses if not pause.changing]
    folds = [seconds for timeline in timelines for seconds in timeline.folds]
    if not folds or not around:
        raise ValueError("nothing was ever folded between two steps: measure for longer")
    fold = statistics.median(folds)
    over = [pause.seconds / pause.changing for pause in around]
    found = {
        "median": statistics.median(over),
        "p99": percentile(over, 0.99),
        "longest": max(over),
        "longest_over_median_fold": max(pause.seconds for pause in around) / fold,
        "p99_of_others": percentile(others, 0.99) / fold if others else 0.0,
    }
    return {name: round(value, 3) for name, value in found.items()}
