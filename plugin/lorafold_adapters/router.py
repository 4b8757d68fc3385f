"""Puts adapters beside the weights: which modules they change, and which rows of a batch take them.

Knows nothing of folding. Not thread-safe, like the manager that it serves.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorafold_adapters.errors import RoutingMismatch
from lorafold_adapters.layout import Layout
from lorafold_adapters.paths import AdapterPath
from lorafold_adapters.plans import Plan, Stacked, plan
from lorafold_adapters.sharing import Sightings
from lorafold_adapters.spans import Routing, Span, Spans
from lorafold_adapters.stacks import Stacks, stackable
from lorafold_adapters.steps import Batch
from lorafold_adapters.two_path import Family, Site, install, uninstall

PLANS = 8
"""Compositions whose steps are kept."""
STACK_BYTES = 1 << 30
"""Memory for the stacks of mixed batches, unless said otherwise."""


class Router:
    """The adapters beside the weights of one model."""

    def __init__(self, model: nn.Module, head: nn.Module | None, stack_bytes: int) -> None:
        self._model = model
        self._head = head
        self._sites: dict[nn.Module, Site] = {}
        self._ranks: dict[str, int] = {}
        self._stacks = Stacks(stack_bytes)
        self._plans: dict[Routing, Plan] = {}
        self._batch = Batch()
        self._sightings = Sightings()
        self.active = False
        """True inside `routed`."""

    @property
    def stack_bytes(self) -> int:
        """Memory that copies for the mixed batch take now."""
        return self._stacks.nbytes

    def add(self, name: str, paths: Mapping[nn.Module, AdapterPath]) -> None:
        """Makes an adapter known, by what it does to which modules."""
        for module, path in paths.items():
            self._sites[module] = site = install(module, is_head=module is self._head)
            site.paths[name] = path
        families = {id(self._sites[module].family): self._sites[module].family for module in paths}
        for family in families.values():
            family.gather(name)
        ranks = [path.rank for family in families.values() for path in family.low_rank(name).values()]
        self._ranks[name] = max(ranks, default=0)
        self._plans.clear()

    def drop(self, name: str) -> None:
        """Forgets an adapter."""
        self._plans.clear()
        if name in self._stacks.slots:
            self._stacks.clear()
        del self._ranks[name]
        for module, site in list(self._sites.items()):
            if site.paths.pop(name, None) is not None:
                site.family.forget(name)
                if not site.paths:
                    uninstall(module)
                    del self._sites[module]

    @contextmanager
    def routed(self, body: Sequence[str | None], head: Sequence[str | None] | None) -> Iterator[None]:
        """Inside, the model runs the rows with these adapters."""
        steps = self._plan(routing_of(body, head))
        guard = partial(refuse_other_sizes, self._batch, len(body))
        hook = self._model.register_forward_pre_hook(guard, with_kwargs=True)
        self.active = True
        try:
            steps.enter()
            yield
        finally:
            steps.leave()
            hook.remove()
            self.active, self._batch.tokens = False, None
            if self._sightings.learn():
                self._forget_compositions()

    def _forget_compositions(self) -> None:
        self._plans.clear()
        self._stacks.clear()

    def _plan(self, routing: Routing) -> Plan:
        known = self._plans.pop(routing, None)
        if known is None:
            stacked = self._stacked(routing)
            known = plan(routing, self._families(routing), stacked, self._batch, self._sightings)
            while len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
        self._plans[routing] = known
        return known

    def _stacked(self, routing: Routing) -> Stacked | None:
        body, head = routing.body.units_of(), routing.head.units_of()
        names = stackable(self._ranks, {name: len(units) for name, units in body.items()})
        if not names:
            return None
        if set(names) != set(self._stacks.slots):
            self._plans.clear()  # They use the stacks as they were.
            if not self._stacks.arrange(names, self._families(routing)):
                return None
        slots, device = self._stacks.slots, next(self._model.parameters()).device
        at_head = not head.keys().isdisjoint(slots)
        head_layout = Layout(slots, head, device) if at_head else None
        return Stacked(stacks=self._stacks, body=Layout(slots, body, device), head=head_layout)

    def _families(self, routing: Routing) -> list[Family]:
        names = {*routing.body.names, *routing.head.names}
        touched = [site.family for site in self._sites.values() if not names.isdisjoint(site.paths)]
        return list(dict.fromkeys(touched))


def routing_of(body: Sequence[str | None], head: Sequence[str | None] | None) -> Routing:
    """The spans; where one adapter has every unit, any number of them is one, so that one plan does for all."""
    spans = one_unit(Spans.of(body))
    return Routing(body=spans, head=spans if head is None else one_unit(Spans.of(head)))


def one_unit(spans: Spans) -> Spans:
    """The spans, or one of one unit where an adapter has them all."""
    return Spans(units=1, spans=(Span(0, 1, spans.spans[0].adapter),)) if spans.whole else spans


def refuse_other_sizes(
    batch: Batch, routed: int, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """A forward pre-hook: raises RoutingMismatch unless the model is given `routed` rows, or as many tokens.

    Tells the layers how many tokens there are.
    """
    candidates = (keywords.get("input_ids"), keywords.get("inputs_embeds"), *inputs)
    given = next((value for value in candidates if isinstance(value, Tensor)), None)
    if given is not None and routed not in (given.shape[0], given.shape[0] * given.shape[1]):
        raise RoutingMismatch(
            f"{routed} rows were routed, the batch has {given.shape[0]}: name an adapter, or None, for each row"
        )
    batch.tokens = None if given is None else given.shape[0] * given.shape[1]
