"""What becomes of the weights: folds, what they take and keep, and whether the base came back."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lorafold.config import BASE
from lorafold.engine.weights_state import Change
from lorafold.metrics.labels import STEP_BUCKETS, short
from lorafold_adapters.policy import Plan


class WeightsMetrics:
    """Changes of the weights and the plans behind them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._folds = Counter(
            "lorafold_weights_changes",
            "Changes of the weights by result: `folded`, `restored` (the base given back), `failed` (the base given "
            "back instead), `damaged` (it could not be) or `reloaded` (loaded anew).",
            ["result"],
            registry=registry,
        )
        self._seconds = Histogram(
            "lorafold_weights_change_seconds",
            "Folding an adapter in, in place of another one or not, or giving the base back.",
            ["result"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._phases = Histogram(
            "lorafold_weights_change_phase_seconds",
            "The parts of that: `write` the adapter, `check` what was written, `restore` what the adapter before "
            "changed and this one does not, or all, and `compare` that with the base's checksums.",
            ["phase"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._bytes = Counter("lorafold_folded_bytes", "Bytes of weights that folds have written.", registry=registry)
        self._undo = Gauge("lorafold_undo_bytes", "Memory that is held to give the base back.", registry=registry)
        self._generation = Gauge("lorafold_generation", "Grows whenever weights change.", registry=registry)
        self._folded = Gauge(
            "lorafold_folded",
            "1 for what is in the weights now: the first 12 characters of the adapter's digest, or `base`.",
            ["adapter"],
            registry=registry,
        )
        self._held = Gauge(
            "lorafold_fold_held",
            "1 while an operator holds the weights as they are, over the policy.",
            registry=registry,
        )
        self._verified = Gauge(
            "lorafold_base_verified",
            "1 if the base was whole when it was last given back or read, compared by checksum; 0 if it was not.",
            registry=registry,
        )
        self._verified_at = Gauge(
            "lorafold_base_verified_timestamp_seconds",
            "When that was found; 0 before the first time.",
            registry=registry,
        )
        self._reloads = 0
        self._reloaded = Counter(
            "lorafold_base_reloads", "How often the base was found damaged and loaded again.", registry=registry
        )
        self._decisions = Counter(
            "lorafold_policy_decisions",
            "How often the policy changed its plan, by cause.",
            ["cause"],
            registry=registry,
        )
        self._verified.set(1)
        self._folded.labels(BASE).set(1)

    def changed(self, change: Change) -> None:
        """An adapter was folded, the base given back or loaded again, or that failed."""
        result = change.result.value
        self._folds.labels(result).inc()
        self._seconds.labels(result).observe(change.seconds)
        for phase, seconds in change.phases.items():
            self._phases.labels(phase).observe(seconds)
        self._bytes.inc(change.weight_bytes)
        self._generation.set(change.state.generation)
        self._undo.set(change.state.undo_bytes)
        self._reloaded.inc(change.state.reloads - self._reloads)
        self._reloads = change.state.reloads
        self.held(change.state.pinned)
        self._folded.clear()
        self._folded.labels(short(change.state.folded or BASE)).set(1)

    def held(self, held: bool) -> None:
        """Whether an operator holds the weights."""
        self._held.set(held)

    def verified(self, whole: bool) -> None:
        """The base was compared with its checksums."""
        self._verified.set(whole)
        self._verified_at.set_to_current_time()

    def planned(self, plan: Plan) -> None:
        """The policy decided on something else than before, or for another cause."""
        self._decisions.labels(plan.cause.value).inc()
