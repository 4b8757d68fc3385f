"""A server in this process whose engine is watched: when its steps end, and when its weights change."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from prometheus_client import CollectorRegistry

from bench.pauses import Timeline
from bench.serving import running
from lorafold import parts
from lorafold.app import App
from lorafold.config import Config
from lorafold.engine.observer import Load, Phase
from lorafold.engine.weights_state import Change
from lorafold.metrics import DEPLOYMENTS, Metrics
from lorafold_adapters.policy import Mode


class Watched(Metrics):
    """The server's metrics, that keep a timeline too. Told on the engine's thread."""

    def __init__(self, registry: CollectorRegistry, deployments: int = DEPLOYMENTS, *, vllm_model: str = "") -> None:
        super().__init__(registry, deployments, vllm_model=vllm_model)
        self.timeline = Timeline()

    def begin(self) -> Timeline:
        """A new timeline, which grows from now on. Only while no request is there."""
        self.timeline = Timeline()
        return self.timeline

    def step(self, phase: Phase, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        self.timeline.step(time.monotonic(), seconds)
        super().step(phase, mode, seconds)

    def changed(self, change: Change) -> None:
        """An adapter was folded, or the base given back."""
        self.timeline.change(change.seconds, folds=change.state.folded is not None)
        super().changed(change)

    def load(self, load: Load) -> None:
        """What there is to do now; told after every step."""
        self.timeline.answered(time.monotonic())
        if not load.waiting and not load.running:
            self.timeline.idle()
        super().load(load)


@contextmanager
def watched(config: Config) -> Iterator[tuple[App, Watched]]:
    """The server, and what watches its engine."""
    with patch.object(parts, "Metrics", Watched), running(config) as app:
        metrics = app.parts.metrics
        assert isinstance(metrics, Watched)
        yield app, metrics
