"""Which graph a decode step replays: the bare model's, or one that adds the low-rank paths of whatever adapters.

Knows adapters by name only; the plugin's static routing knows where their tensors are.
"""

from collections.abc import Sequence

import structlog
import torch
from torch import Tensor

from lorafold.engine.graphs import BARE, DecodeGraphs
from lorafold.engine.step import Part
from lorafold_adapters import AdapterManager
from lorafold_adapters.static_routing import StaticRouting

log = structlog.get_logger(__name__)


class GraphedDecode:
    """Runs decode steps as graphs wherever that can be done."""

    def __init__(self, graphs: DecodeGraphs, manager: AdapterManager) -> None:
        self._graphs = graphs
        self._manager = manager
        self._routing: StaticRouting | None = None
        self._eager: set[str] = set()
        """Adapters that no graph can serve: more than low-rank products, or beyond the number of slots."""
        self._ran_eagerly = False

    def warm_up(self) -> None:
        """Records the graphs of the bare model."""
        self._graphs.record_all()

    def run(self, ids: Sequence[int], parts: Sequence[Part], adapters: Sequence[str | None]) -> Tensor | None:
        """Logits [rows, V], fp32, valid until the next call; None if this batch has to run eagerly."""
        if len(ids) > self._graphs.max_batch or self._eager.intersection(adapters):
            return None
        if not any(adapters):
            return self._graphs.run(ids, parts, BARE)
        if not self._ran_eagerly:  # Which layers share an input shows when they run.
            self._ran_eagerly = True
            return None
        routing = self._routing_for(adapters)
        if routing is None:
            return None
        routing.set(adapters)
        try:
            return self._graphs.run(ids, parts, routing, routing.routed)
        except torch.AcceleratorError:
            raise  # The device's context is lost.
        except RuntimeError as error:
            log.warning("the two-path forward has no graphs", error=str(error).split("\n")[0])
            self._eager |= self._manager.adapters.keys()
            return None

    def _routing_for(self, adapters: Sequence[str | None]) -> StaticRouting | None:
        """The static routing that covers the adapters: the one there is, or a new one without graphs yet."""
        if self._routing is not None and self._routing.covers(adapters):
            return self._routing
        self._eager &= self._manager.adapters.keys()
        names = {name for name in adapters if name is not None}
        others = {name for name in names if not self._manager.graphable([name])}
        if not others:
            self._renew(adapters)
            if self._routing is not None and self._routing.covers(adapters):
                return self._routing
            others = {name for name in names if not self._covered(name)}
        self._eager |= others
        return None

    def _renew(self, adapters: Sequence[str | None]) -> None:
        """Makes a static routing anew, and takes it if it covers the adapters, or if there is none yet."""
        routing = self._manager.static_routing(self._graphs.max_batch)
        if self._routing is None or routing.covers(adapters):
            log.info("the two-path forward is recorded anew", adapters=len(self._manager.adapters))
            self._graphs.forget(self._routing)
            self._routing = routing

    def _covered(self, name: str) -> bool:
        return self._routing is not None and self._routing.covers([name])


def graphs_work(device: torch.device, quantised: bool) -> bool:
    """False where a graph would be left with tensors that moved: folds into quantised weights make new ones."""
    return device.type == "cuda" and not quantised
