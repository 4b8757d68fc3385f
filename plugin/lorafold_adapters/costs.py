"""What steps and changes of the weights cost on this machine, as running medians. Knows no model.

A step is *plain* if it runs the weights as they are, the base's or folded ones, and *two-path* if any of its rows has a
low-rank path beside them. What the latter costs depends on how many adapters are in the batch, too.
"""

from collections import deque
from itertools import pairwise
from statistics import median, median_low

from lorafold_adapters.overhead import Overhead

REMEMBERED = 31
"""Samples of a median: what a machine does now counts, not what it did an hour ago."""
ASSUMED_OVERHEAD = 2.0
"""Two-path over plain until both were measured; only says that it is worth finding out."""


class Recent:
    """The median of the samples that came last; of two the lower one, as the first is often a cold one."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=REMEMBERED)
        self._median: float | None = None

    def add(self, sample: float) -> None:
        """One more."""
        self._samples.append(sample)
        self._median = None

    @property
    def median(self) -> float | None:
        """None before the first sample."""
        if self._median is None and self._samples:
            self._median = median_low(self._samples)
        return self._median


class StepCosts:
    """Seconds of a decode step of one kind, by its number of rows."""

    def __init__(self) -> None:
        self._by_bucket: dict[int, tuple[Recent, Recent]] = {}
        """Rows and seconds of the steps in each bucket."""

    def add(self, rows: int, seconds: float) -> None:
        """One step ran."""
        count, took = self._by_bucket.setdefault(bucket(rows), (Recent(), Recent()))
        count.add(rows)
        took.add(seconds)

    def at(self, rows: int) -> float | None:
        """Between two measured numbers of rows on a line, outside of them the nearest one's; None if none is."""
        points = sorted((count.median or 0.0, took.median or 0.0) for count, took in self._by_bucket.values())
        if not points:
            return None
        for (before, low), (after, high) in pairwise(points):
            if before <= rows <= after:
                return low + (high - low) * (rows - before) / (after - before)
        return points[0][1] if rows < points[0][0] else points[-1][1]

    def covers(self, rows: int) -> bool:
        """True if steps of so many rows, or of fewer and of more, were measured."""
        return bool(self._by_bucket) and min(self._by_bucket) <= bucket(rows) <= max(self._by_bucket)

    def measured(self) -> dict[int, float]:
        """Median seconds by bucket."""
        return {rows: took.median or 0.0 for rows, (_, took) in sorted(self._by_bucket.items())}


def known(own: StepCosts, other: StepCosts, ratio: float, rows: int) -> float | None:
    """Seconds of a step of one kind: measured, or those of the other kind times `ratio`; None if neither is."""
    beside = other.at(rows)
    if beside is None or own.covers(rows) or (own.measured() and not other.covers(rows)):
        return own.at(rows)
    return beside * ratio


def bucket(rows: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, rows - 1).bit_length()


class Costs:
    """Everything that a policy asks about time, in seconds."""

    def __init__(self) -> None:
        self.plain = StepCosts()
        """Steps of folded rows and the base's."""
        self.two_path = StepCosts()
        """Steps with adapters beside the weights."""
        self._by_adapters: dict[int, StepCosts] = {}
        """The same, apart for each bucket of the number of adapters in them."""
        self._changes: dict[tuple[bool, bool], Recent] = {}
        self._added: dict[tuple[int, int], float] = {}
        """Seconds that low-rank paths were found to add to a step, by bucket of its rows and of its adapters."""
        self._cold = False
        """True if no step has run since the weights changed."""

    def step(self, *, adapters: int, rows: int, seconds: float) -> None:
        """One step that only decoded, with so many adapters beside the weights.

        The first one after the weights changed does not count: it finds nothing in the processor's caches.
        """
        if self._cold:
            self._cold = False
            return
        if not adapters:
            self.plain.add(rows, seconds)
            return
        self.two_path.add(rows, seconds)
        self._by_adapters.setdefault(bucket(adapters), StepCosts()).add(rows, seconds)

    def measured(self, found: Overhead) -> None:
        """Pairs of steps were timed: they count where no such step of requests was."""
        seconds = found.unmerged_seconds - found.plain_seconds
        self._added[bucket(found.cell.batch), bucket(found.cell.adapters)] = max(0.0, seconds)

    def changed(self, *, was_folded: bool, is_folded: bool, seconds: float) -> None:
        """The weights were changed: folded, given back, or one adapter for another."""
        self._cold = True
        self._changes.setdefault((was_folded, is_folded), Recent()).add(seconds)

    def plain_seconds(self, rows: int) -> float | None:
        """Of a step of folded rows; None while nothing was measured.

        It is never longer than with one adapter beside the weights. What says so was measured while the machine had
        other work, and would never be measured again by a policy that believed it and folded nothing.
        """
        found = known(self.plain, self.two_path, 1 / self.overhead(rows), rows)
        alone = self._by_adapters.get(1)
        beside = alone.at(rows) if alone is not None and alone.covers(rows) else None
        if found is None or beside is None:
            return found
        added = self._added.get((bucket(rows), 1), 0.0)
        return min(found, max(beside - added, beside / ASSUMED_OVERHEAD))

    def two_path_seconds(self, rows: int, adapters: int) -> float | None:
        """Of a step of rows with so many adapters beside the weights; None while nothing was measured."""
        alike = self._by_adapters.get(bucket(adapters))
        if alike is not None and alike.covers(rows):
            return alike.at(rows)
        added, plain = self._added.get((bucket(rows), bucket(adapters))), self.plain.at(rows)
        if added is not None and plain is not None and self.plain.covers(rows):
            return plain + added
        return known(self.two_path, self.plain, self.overhead(rows), rows)

    def overhead(self, rows: int) -> float:
        """Two-path over plain: in steps of about so many rows, or else in all that were measured both ways."""
        plain, beside = self.plain.measured(), self.two_path.measured()
        ratios = {rows: beside[rows] / plain[rows] for rows in plain.keys() & beside.keys()}
        if bucket(rows) in ratios:
            return ratios[bucket(rows)]
        return median(ratios.values()) if ratios else ASSUMED_OVERHEAD

    @property
    def fold_seconds(self) -> float:
        """Folding an adapter into the base; 0 until it was measured."""
        return self._change(was_folded=False, is_folded=True)

    @property
    def restore_seconds(self) -> float:
        """Giving the base back; 0 until it was measured."""
        return self._change(was_folded=True, is_folded=False)

    @property
    def swap_seconds(self) -> float:
        """One adapter for another; what giving back and folding take until it was measured."""
        return self._change(was_folded=True, is_folded=True) or self.fold_seconds + self.restore_seconds

    def _change(self, *, was_folded: bool, is_folded: bool) -> float:
        known = self._changes.get((was_folded, is_folded))
        return 0.0 if known is None else known.median or 0.0
