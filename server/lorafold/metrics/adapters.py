"""Where adapters are, what bringing them takes, and what deployments point at."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafold.engine.residents import Places
from lorafold.metrics.labels import LATENCY_BUCKETS, Names, short


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployed:
    """What metrics tell of a deployment."""

    adapter: str
    """Content digest."""
    policy: str
    delta_error: float | None
    """Share of its delta that a fold loses; None if it was not measured."""


class AdapterMetrics:
    """Adapters in memory, and on their way there."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._places: Places | None = None
        self._adapters = Gauge(
            "lorafold_adapters",
            "Adapters by place: on the device, in host memory, and all; the others are on disk only.",
            ["place"],
            registry=registry,
        )
        self._fetch = Histogram(
            "lorafold_adapter_fetch_seconds",
            "Bringing an adapter that requests wait for to the device, from host memory or from disk.",
            ["source"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )

    def places(self, places: Places) -> None:
        """Where adapters are now."""
        if places == self._places:
            return
        self._places = places
        self._adapters.labels("device").set(places.on_device)
        self._adapters.labels("host").set(places.on_host)
        self._adapters.labels("all").set(places.known)

    def fetched(self, seconds: float, *, from_disk: bool) -> None:
        """An adapter that requests waited for was brought, or could not be."""
        self._fetch.labels("disk" if from_disk else "host").observe(seconds)


class DeploymentMetrics(Collector):
    """What deployments point at, of those that have a label of their own."""

    def __init__(self, registry: CollectorRegistry, names: Names) -> None:
        self._names = names
        self._deployed: dict[str, Deployed] = {}
        registry.register(self)

    def deployed(self, name: str, what: Deployed) -> None:
        """A deployment is there, or points at something else."""
        self._names.add(name)
        self._deployed[name] = what

    def pointing_at(self, adapter: str) -> list[str]:
        """Names of the deployments of one adapter. Any thread may ask."""
        return [name for name, what in self._deployed.copy().items() if what.adapter == adapter]

    def forget(self, name: str) -> None:
        """It was deleted."""
        self._deployed.pop(name, None)

    def collect(self) -> Iterator[Metric]:
        """For each scrape, in whatever thread answers it."""
        deployed = self._deployed.copy()
        yield GaugeMetricFamily(
            "lorafold_deployments", "Deployments beside the base's, served or not.", value=len(deployed)
        )
        info = GaugeMetricFamily(
            "lorafold_deployment_info",
            "1 for what a deployment points at: the first 12 characters of its adapter's digest, and its policy.",
            labels=["deployment", "adapter", "policy"],
        )
        lost = GaugeMetricFamily(
            "lorafold_delta_error_ratio",
            "Share of a deployment's delta, by norm, that a fold loses to the weights' dtype; if it was measured.",
            labels=["deployment"],
        )
        for name in self._names.own():
            if name not in deployed:
                continue  # It was deleted just now.
            info.add_metric([name, short(deployed[name].adapter), deployed[name].policy], 1)
            error = deployed[name].delta_error
            if error is not None:
                lost.add_metric([name], error)
        yield from (info, lost)
