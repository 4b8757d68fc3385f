"""What the unmerged path costs, as it was measured in pairs of steps, and what measuring took."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafold_adapters.overhead import Cell, Overhead

BY = ["batch", "adapters", "rank", "context"]


class OverheadMetrics(Collector):
    """The last finding of each cell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._found: dict[Cell, tuple[Overhead, float]] = {}
        self._seconds = Counter(
            "lorafold_probe_seconds", "Time of the engine that went into such pairs.", registry=registry
        )
        registry.register(self)

    def ran(self, seconds: float) -> None:
        """Steps were timed."""
        self._seconds.inc(seconds)

    def found(self, overhead: Overhead) -> None:
        """A cell was measured."""
        self._found[overhead.cell] = overhead, time.monotonic()

    def collect(self) -> Iterator[Metric]:
        """For each scrape, in whatever thread answers it."""
        told = {
            "": "A decode step with low-rank paths over the same step without, median of pairs: 1 is for free.",
            "_low": "The lower end of its 95 % confidence interval.",
            "_high": "The upper end.",
        }
        families = {
            key: GaugeMetricFamily(f"lorafold_unmerged_overhead_ratio{key}", text, labels=BY)
            for key, text in told.items()
        }
        age = GaugeMetricFamily("lorafold_unmerged_overhead_age_seconds", "Since it was measured.", labels=BY)
        for cell, (found, at) in self._found.copy().items():
            labels = [str(getattr(cell, name)) for name in BY]
            families[""].add_metric(labels, found.ratio)
            families["_low"].add_metric(labels, found.low)
            families["_high"].add_metric(labels, found.high)
            age.add_metric(labels, time.monotonic() - at)
        yield from (*families.values(), age)
