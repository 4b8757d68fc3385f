"""The same numbers under vLLM's names, for those who read these: vLLM's Grafana dashboard, and the endpoint picker of
llm-d and the Gateway API inference extension. Where vLLM has one label for a model, this has the base; an adapter is
called what clients call it, its deployment.
"""

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorafold.engine.observer import Load
from lorafold.errors import EngineStopped
from lorafold.metrics.labels import LATENCY_BUCKETS
from lorafold.requests import Finished, FinishReason, Request
from lorafold_adapters.policy import Group

LENGTHS = tuple(float(10**power * step) for power in range(6) for step in (1, 2, 5))
"""Tokens."""
REASONS = {FinishReason.LENGTH: "length"}
"""vLLM calls every other end that is no failure `stop`."""
Queued = Callable[[], Mapping[Group, tuple[int, int]]]
"""Running and waiting completions, by adapter and policy; may wait for a step of the engine."""


class VllmMetrics:
    """What vLLM's dashboard asks for."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        """`model`: the value of the label `model_name`."""
        self._registry = registry
        self._model = model
        self._running = self._gauge("num_requests_running", "Completions with room in the batch.")
        self._waiting = self._gauge("num_requests_waiting", "Completions without.")
        self._cache = self._gauge("kv_cache_usage_perc", "Share of the pages for keys and values in use, 0 to 1.")
        self._prompt = self._counter("prompt_tokens", "Tokens that were read.")
        self._generated = self._counter("generation_tokens", "Tokens that were generated.")
        self._success = Counter(
            "vllm:request_success",
            "Completions that ended well: `stop` or `length`.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From arrival.")
        self._between = self._histogram("inter_token_latency_seconds", "From one token to the next.")
        self._all = self._histogram("e2e_request_latency_seconds", "From arrival to the end of a completion.")
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for room or for a turn.")
        self._prefill = self._histogram("request_prefill_time_seconds", "Reading the prompt, to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", LENGTHS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of an answer.", LENGTHS)
        self._allowed = self._histogram("request_max_num_generation_tokens", "Tokens it might have had.", LENGTHS)

    def _gauge(self, name: str, told: str) -> Gauge:
        return Gauge(f"vllm:{name}", told, ["model_name"], registry=self._registry).labels(self._model)

    def _counter(self, name: str, told: str) -> Counter:
        return Counter(f"vllm:{name}", told, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
        made = Histogram(f"vllm:{name}", told, ["model_name"], buckets=buckets, registry=self._registry)
        return made.labels(self._model)

    def load(self, load: Load) -> None:
        """What there is to do now."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._cache.set(load.cache_usage)

    def tokens(self, *, prompt: int, answer: int) -> None:
        """So many tokens were read and generated."""
        self._prompt.inc(prompt)
        self._generated.inc(answer)

    def token(self, seconds: float, *, first: bool) -> None:
        """A completion got a token."""
        (self._first if first else self._between).observe(seconds)

    def completed(self, request: Request, event: Finished) -> None:
        """A completion ended well."""
        self._success.labels(self._model, REASONS.get(event.reason, "stop")).inc()
        timings = event.timings
        self._all.observe(timings.all)
        self._queue.observe(timings.queue + timings.swap_wait)
        self._prefill.observe(timings.prefill)
        self._decode.observe(timings.decode)
        self._prompts.observe(len(request.prompt))
        self._answers.observe(event.completion_tokens)
        self._allowed.observe(request.max_tokens)


class VllmAdapters(Collector):
    """`vllm:lora_requests_info`, by which an endpoint picker finds a server that has an adapter already.

    One series, which is of the moment it is asked for; its value is that moment, in seconds since the epoch.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        queued: Queued,
        names: Callable[[str], list[str]],
        slots: int,
    ) -> None:
        """`names`: the deployments of an adapter; `slots`: how many adapters run at once."""
        self._queued = queued
        self._names = names
        self._slots = slots
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """For each scrape, in whatever thread answers it; nothing if the engine does not answer."""
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "When it was asked; which deployments have running and waiting requests, how many adapters there may be.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        try:
            rows = self._queued()
        except (EngineStopped, TimeoutError):
            return
        running = {adapter for (adapter, _), (count, _) in rows.items() if count and adapter is not None}
        waiting = {adapter for (adapter, _), (_, count) in rows.items() if count and adapter is not None}
        info.add_metric([str(self._slots), self._called(running), self._called(waiting)], time.time())
        yield info

    def _called(self, adapters: set[str]) -> str:
        return ",".join(sorted(name for adapter in adapters for name in self._names(adapter)))
