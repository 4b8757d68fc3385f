"""Prometheus collectors on a registry that is passed in. Knows no tensors."""

from prometheus_client import CollectorRegistry

from lorafold.config import MetricsConfig
from lorafold.engine.observer import Load, Phase
from lorafold.engine.residents import Places
from lorafold.engine.weights_state import Change
from lorafold.metrics.adapters import AdapterMetrics, DeploymentMetrics
from lorafold.metrics.calls import CallMetrics
from lorafold.metrics.engine import EngineMetrics
from lorafold.metrics.labels import Names
from lorafold.metrics.overhead import OverheadMetrics
from lorafold.metrics.requests import RequestMetrics
from lorafold.metrics.vllm import VllmMetrics
from lorafold.metrics.weights import WeightsMetrics
from lorafold.requests import Finished, Request
from lorafold_adapters.policy import Mode, Plan

DEPLOYMENTS = MetricsConfig().deployments


class Metrics:
    """Everything that the server counts. Implements `Observer` and `WeightsObserver` of the engine."""

    def __init__(self, registry: CollectorRegistry, deployments: int = DEPLOYMENTS, *, vllm_model: str = "") -> None:
        """`deployments`: how many have a label of their own. `vllm_model`: counted under vLLM's names too, as that."""
        self.registry = registry
        self._names = Names(deployments)
        self.requests = RequestMetrics(registry, self._names)
        self.engine = EngineMetrics(registry)
        self.weights = WeightsMetrics(registry)
        self.adapters = AdapterMetrics(registry)
        self.vllm = VllmMetrics(registry, vllm_model) if vllm_model else None
        self.overhead = OverheadMetrics(registry)
        self.calls = CallMetrics(registry)
        self.deployments = DeploymentMetrics(registry, self._names)

    def step(self, phase: Phase, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        self.engine.step(phase, mode, seconds)

    def tokens(self, deployment: str, mode: Mode, *, prompt: int, answer: int) -> None:
        """So many tokens of prompts were read, and of answers generated."""
        self.requests.tokens(deployment, mode, prompt=prompt, answer=answer)
        if self.vllm is not None:
            self.vllm.tokens(prompt=prompt, answer=answer)

    def token(self, deployment: str, mode: Mode, seconds: float, *, first: bool) -> None:
        """A completion got a token."""
        self.requests.token(deployment, mode, seconds, first=first)
        if self.vllm is not None:
            self.vllm.token(seconds, first=first)

    def completed(self, request: Request, event: Finished) -> None:
        """A completion ended well."""
        self.requests.completed(request.deployment, event.provenance.mode, event.timings)
        if self.vllm is not None:
            self.vllm.completed(request, event)

    def load(self, load: Load) -> None:
        """What there is to do now."""
        self.engine.load(load)
        if self.vllm is not None:
            self.vllm.load(load)

    def places(self, places: Places) -> None:
        """Where adapters are now."""
        self.adapters.places(places)

    def planned(self, plan: Plan) -> None:
        """The policy decided on something else than before, or for another cause."""
        self.weights.planned(plan)

    def changed(self, change: Change) -> None:
        """The weights were changed, or that failed."""
        self.weights.changed(change)

    def held(self, held: bool) -> None:
        """Whether an operator holds the weights."""
        self.weights.held(held)

    def verified(self, whole: bool) -> None:
        """The base was compared with its checksums."""
        self.weights.verified(whole)

    def forget(self, deployment: str) -> None:
        """It was deleted: its series end, and another one may have its label."""
        self.deployments.forget(deployment)
        if self._names.forget(deployment):
            self.requests.forget(deployment)
