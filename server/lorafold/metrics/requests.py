"""What requests get and how long they wait for it. All times are the engine's, none is a network's."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from lorafold.metrics.labels import LATENCY_BUCKETS, Names
from lorafold.requests import Timings
from lorafold_adapters.policy import Mode

BY = ("deployment", "mode")


class RequestMetrics:
    """Requests and their tokens, by deployment and by how they were computed."""

    def __init__(self, registry: CollectorRegistry, names: Names) -> None:
        self._names = names
        self._requests = Counter(
            "lorafold_requests",
            "Requests that ended, by outcome: a finish reason, the reason of an error, or `cancelled`.",
            ["deployment", "outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "lorafold_tokens",
            "Tokens that were read (`prompt`; those found in the cache are not) and generated (`answer`).",
            [*BY, "kind"],
            registry=registry,
        )
        self._first = self._histogram(
            registry, "time_to_first_token", "From the arrival of a request to the first token of each completion."
        )
        self._between = self._histogram(
            registry, "inter_token", "From one token of a completion to its next, whatever happened between them."
        )
        self._queue = self._histogram(
            registry, "queue", "How long a completion waited for room in the batch, its turn apart."
        )
        self._swap_wait = self._histogram(
            registry,
            "swap_wait",
            "How long a completion waited because others had their turn, or weights were changed.",
        )
        self._prefill = self._histogram(
            registry, "request_prefill", "How long a completion took from its start to its first token, its turn apart."
        )
        self._decode = self._histogram(
            registry, "request_decode", "How long a completion took from its first token to its last, its turn apart."
        )
        self._all = self._histogram(registry, "request", "From the arrival of a request to the end of each completion.")

    @staticmethod
    def _histogram(registry: CollectorRegistry, name: str, told: str) -> Histogram:
        return Histogram(f"lorafold_{name}_seconds", told, BY, buckets=LATENCY_BUCKETS, registry=registry)

    def tokens(self, deployment: str, mode: Mode, *, prompt: int, answer: int) -> None:
        """So many tokens of prompts were read, and of answers generated."""
        name = self._names.label(deployment)
        if prompt:
            self._tokens.labels(name, mode.value, "prompt").inc(prompt)
        if answer:
            self._tokens.labels(name, mode.value, "answer").inc(answer)

    def token(self, deployment: str, mode: Mode, seconds: float, *, first: bool) -> None:
        """A completion got a token, so long after its last one, or for the first one after its request's arrival."""
        histogram = self._first if first else self._between
        histogram.labels(self._names.label(deployment), mode.value).observe(seconds)

    def completed(self, deployment: str, mode: Mode, timings: Timings) -> None:
        """A completion ended well."""
        labels = self._names.label(deployment), mode.value
        self._queue.labels(*labels).observe(timings.queue)
        self._swap_wait.labels(*labels).observe(timings.swap_wait)
        self._prefill.labels(*labels).observe(timings.prefill)
        self._decode.labels(*labels).observe(timings.decode)
        self._all.labels(*labels).observe(timings.all)

    def request_ended(self, deployment: str, outcome: str) -> None:
        """`outcome` is the finish reason of the completion that ended last, a gRPC status name, or `cancelled`."""
        self._requests.labels(self._names.label(deployment), outcome).inc()

    def forget(self, deployment: str) -> None:
        """It was deleted: its series end."""
        histograms = (self._first, self._between, self._queue, self._swap_wait, self._prefill, self._decode, self._all)
        for metric in (self._requests, self._tokens, *histograms):
            metric.remove_by_labels({"deployment": deployment})
