"""What the unmerged path costs, from pairs of the same decode step with and without it. Knows no model and no clock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 1000
FEWEST = 16
"""Pairs below which an interval says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """One kind of decode step."""

    batch: int
    """Rows."""
    adapters: int
    """Distinct ones among them, in turn."""
    rank: int
    context: int
    """Tokens of each row that are in the cache already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """What was measured of a cell. Seconds are of the forward step and nothing else."""

    cell: Cell
    pairs: int
    ratio: float
    """Median over the pairs: the step with low-rank paths over the step without."""
    low: float
    """Of the 95 % confidence interval of that."""
    high: float
    plain_seconds: float
    """Median of the steps without."""
    unmerged_seconds: float

    @property
    def width(self) -> float:
        """Of the interval, as a share of the ratio."""
        return (self.high - self.low) / self.ratio


@dataclass(slots=True)
class Pairs:
    """The steps of one cell so far."""

    cell: Cell
    plain: list[float] = field(default_factory=list)
    unmerged: list[float] = field(default_factory=list)
    """Seconds; the k-th of each were taken one right after the other."""

    @property
    def count(self) -> int:
        """How many are complete."""
        return min(len(self.plain), len(self.unmerged))

    def found(self, seed: int = 0) -> Overhead:
        """What they say together; at least one must be complete."""
        count = self.count
        plain, unmerged = np.asarray(self.plain[:count]), np.asarray(self.unmerged[:count])
        ratios = unmerged / plain
        low, high = interval(ratios.tolist(), seed)
        return Overhead(
            cell=self.cell,
            pairs=count,
            ratio=float(np.median(ratios)),
            low=low,
            high=high,
            plain_seconds=float(np.median(plain)),
            unmerged_seconds=float(np.median(unmerged)),
        )


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the median, by the percentile bootstrap (Efron, "Bootstrap methods: another look at
    the jackknife", 1979); of few values, everything from 0 on.
    """
    if len(values) < FEWEST:
        return 0.0, math.inf
    drawn = np.random.default_rng(seed).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)
