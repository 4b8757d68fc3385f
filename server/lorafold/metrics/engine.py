"""What the engine does: steps, rows, cache."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lorafold.engine.observer import Load, Phase
from lorafold.metrics.labels import STEP_BUCKETS, short
from lorafold_adapters.policy import Mode
from lorafold_adapters.provenance import installed


class EngineMetrics:
    """Steps of the model, and what waits for them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._server = Gauge(
            "lorafold_server_info",
            "1 for what is served: the base as it is named, the first 12 characters of its fingerprint, its dtype.",
            ["model", "base", "dtype", "device", "version"],
            registry=registry,
        )
        self._step = Histogram(
            "lorafold_step_seconds",
            "One forward step and the choice of its tokens: `decode`, or `prefill` if any row in it reads its prompt. "
            "Time of the device on a GPU. The mode is `unmerged` if any row has a low-rank path beside the weights.",
            ["phase", "mode"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._waiting = Gauge("lorafold_requests_waiting", "Completions without room in the batch.", registry=registry)
        self._running = Gauge("lorafold_requests_running", "Completions with room in the batch.", registry=registry)
        self._cache = Gauge(
            "lorafold_kv_cache_usage_ratio",
            "Share of the pages for keys and values that running completions hold.",
            registry=registry,
        )
        self._preempted = 0
        self._preemptions = Counter(
            "lorafold_preemptions",
            "How often a completion gave up its room in the cache for others.",
            registry=registry,
        )

    def serving(self, *, model: str, base: str, dtype: str, device: str) -> None:
        """What is served, from now on. `base`: its fingerprint."""
        self._server.labels(model, short(base), dtype, device, installed("lorafold")).set(1)

    def step(self, phase: Phase, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        self._step.labels(phase.value, mode.value).observe(seconds)

    def load(self, load: Load) -> None:
        """What there is to do now."""
        self._waiting.set(load.waiting)
        self._running.set(load.running)
        self._cache.set(load.cache_usage)
        self._preemptions.inc(load.preemptions - self._preempted)
        self._preempted = load.preemptions
