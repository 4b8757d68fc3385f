"""Prometheus collectors on a registry that is passed in. Knows no tensors and no gRPC."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lorafold.engine.residents import Places
from lorafold.engine.weights_state import Change
from lorafold_adapters.policy import Mode, Plan

STEP_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
MAX_DEPLOYMENTS = 100
"""Distinct values of the `deployment` label; later ones count as `other`."""


class Metrics:
    """What the server counts. Implements `engine.observer.Observer`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._labelled: set[str] = set()
        self._requests = Counter(
            "lorafold_requests", "Requests that ended, by outcome.", ["deployment", "outcome"], registry=registry
        )
        self._tokens = Counter(
            "lorafold_tokens", "Tokens read (prompt) and generated (answer).", ["mode", "kind"], registry=registry
        )
        self._step = Histogram(
            "lorafold_step_seconds",
            "One forward step and its sampling, in the engine.",
            ["mode"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._first = Histogram(
            "lorafold_time_to_first_token_seconds",
            "From arrival to the first token, in the engine.",
            ["mode"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._fold = Histogram(
            "lorafold_weights_change_seconds",
            "Folding an adapter in, or giving the base back.",
            ["to"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._waiting = Gauge("lorafold_requests_waiting", "Requests without a place in the batch.", registry=registry)
        self._running = Gauge("lorafold_requests_running", "Requests with a place in the batch.", registry=registry)
        self._preempted = 0
        self._preemptions = Counter(
            "lorafold_preemptions", "How often a request gave up its room in the cache for others.", registry=registry
        )
        self._reloads = Gauge(
            "lorafold_base_reloads", "How often the base was found damaged and loaded again.", registry=registry
        )
        self._decisions = Counter(
            "lorafold_policy_decisions",
            "How often the policy changed its plan, by cause.",
            ["cause"],
            registry=registry,
        )
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
        self._generation = Gauge("lorafold_generation", "Grows whenever weights change.", registry=registry)

    def step(self, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        self._step.labels(mode.value).observe(seconds)

    def tokens(self, mode: Mode, *, prompt: int, answer: int) -> None:
        """So many tokens of a prompt were read, and of an answer generated."""
        self._tokens.labels(mode.value, "prompt").inc(prompt)
        self._tokens.labels(mode.value, "answer").inc(answer)

    def queues(self, waiting: int, running: int, preemptions: int) -> None:
        """How many rows there are now, and how often one ever gave up its room."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._preemptions.inc(preemptions - self._preempted)
        self._preempted = preemptions

    def adapters(self, places: Places) -> None:
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

    def changed(self, change: Change) -> None:
        """An adapter was folded, or the base given back."""
        self._generation.set(change.state.generation)
        self._reloads.set(change.state.reloads)
        self._fold.labels("base" if change.state.folded is None else "adapter").observe(change.seconds)

    def planned(self, plan: Plan) -> None:
        """The policy decided on something else than before, or for another cause."""
        self._decisions.labels(plan.cause.value).inc()

    def first_token(self, mode: Mode, seconds: float) -> None:
        """A request got its first token."""
        self._first.labels(mode.value).observe(seconds)

    def request_ended(self, deployment: str, outcome: str) -> None:
        """`outcome` is the finish reason of the completion that ended last, a gRPC status name, or `cancelled`."""
        if deployment not in self._labelled and len(self._labelled) >= MAX_DEPLOYMENTS:
            deployment = "other"
        self._labelled.add(deployment)
        self._requests.labels(deployment, outcome).inc()
