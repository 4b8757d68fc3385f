"""`docs/metrics.md`, from the code: `python -m lorafold.metrics.document > docs/metrics.md`."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from lorafold.metrics.adapters import AdapterMetrics, DeploymentMetrics
from lorafold.metrics.calls import CallMetrics
from lorafold.metrics.engine import EngineMetrics
from lorafold.metrics.labels import LATENCY_BUCKETS, STEP_BUCKETS, Names
from lorafold.metrics.overhead import OverheadMetrics
from lorafold.metrics.requests import RequestMetrics
from lorafold.metrics.vllm import VllmAdapters, VllmMetrics
from lorafold.metrics.weights import WeightsMetrics

SECTIONS: dict[str, Callable[[CollectorRegistry], object]] = {
    "Requests": lambda registry: RequestMetrics(registry, Names(0)),
    "Engine": EngineMetrics,
    "Weights": WeightsMetrics,
    "Adapters": AdapterMetrics,
    "Deployments": lambda registry: DeploymentMetrics(registry, Names(0)),
    "What the unmerged path costs": OverheadMetrics,
    "gRPC": CallMetrics,
    'With `compat = "vllm"` in `[metrics]`': lambda registry: (
        VllmMetrics(registry, "model"),
        VllmAdapters(registry, queued=dict, names=lambda _: [], slots=1),
    ),
}
INTRODUCTION = f"""# Metrics

Prometheus asks at `http://<server.metrics_address>/metrics`. This page is written by the code that counts
(`python -m lorafold.metrics.document`), and a test compares them.

- `mode` is `base`, `merged` (the adapter is in the weights) or `unmerged` (it is computed beside them).
- `deployment` is a name that clients call; `metrics.deployments` of them have a label of their own, those that are
  asked for first, and the rest is `other`. The series of a deployment end when it is deleted.
- All times are seconds. The buckets are {", ".join(f"{bucket:g}" for bucket in STEP_BUCKETS)} for steps and
  changes of the weights; for what somebody waits for they go on to {LATENCY_BUCKETS[-1]:g}.
- A histogram `x` has the series `x_bucket`, `x_sum` and `x_count`; a counter's ends in `_total`.
"""


class Recording(CollectorRegistry):
    """Remembers what is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.collectors: list[Collector] = []

    def register(self, collector: Collector) -> None:
        """See CollectorRegistry."""
        self.collectors.append(collector)
        super().register(collector)


def document() -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *(f"## {title}\n\n{table(make)}" for title, make in SECTIONS.items())])


def table(make: Callable[[CollectorRegistry], object]) -> str:
    """A line for each metric of one family."""
    rows = [f"| `{name}` | {kind} | {labels} | {text} |" for name, kind, labels, text in described(make)]
    return "\n".join(["| metric | type | labels | what it tells |", "|---|---|---|---|", *rows, ""])


def described(make: Callable[[CollectorRegistry], object]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, labels and text of each metric of one family."""
    registry = Recording()
    make(registry)
    for collector in registry.collectors:
        for metric in collector.collect():
            labels: tuple[str, ...] = getattr(collector, "_labelnames", getattr(metric, "_labelnames", ()))
            name = metric.name + "_total" * (metric.type == "counter")
            yield name, metric.type, ", ".join(f"`{label}`" for label in labels), metric.documentation


if __name__ == "__main__":
    print(document(), end="")
