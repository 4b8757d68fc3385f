"""Puts adapters beside the weights: which modules they change, and which rows of a batch take them.

Knows nothing of folding. Not thread-safe, like the manager that it serves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lorafold_adapters.errors import AdapterNotLoaded, RoutingMismatch
from lorafold_adapters.kernels import Kernels, kernels_for
from lorafold_adapters.paths import AdapterPath
from lorafold_adapters.plans import Plan, plan
from lorafold_adapters.sharing import Sightings
from lorafold_adapters.slot_groups import SLOTS
from lorafold_adapters.spans import Routing
from lorafold_adapters.static_routing import StaticRouting
from lorafold_adapters.steps import Batch
from lorafold_adapters.together import Together
from lorafold_adapters.two_path import Family, Site, install, uninstall

PLANS = 8
"""Compositions whose steps are kept."""
STACK_BYTES = 1 << 30
"""Memory for the stacks of mixed batches, unless said otherwise."""


class Router:
    """The adapters beside the weights of one model."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module | None,
        *,
        stack_bytes: int,
        slots: int = SLOTS,
        kernels: Kernels | None = None,
    ) -> None:
        """`kernels` for batches of many adapters; by the device unless given, and stacks where it has none.

        `slots`: adapters that have a place in the kernels' tables at once.
        """
        self._model = model
        self._head = head
        self._sites: dict[nn.Module, Site] = {}
        device = next(model.parameters()).device
        self._together = Together(
            self._sites, kernels or kernels_for(device), stack_bytes=stack_bytes, slots=slots, device=device
        )
        self._statics: WeakSet[StaticRouting] = WeakSet()
        self._plans: dict[Routing, Plan] = {}
        self._batch = Batch()
        self._sightings = Sightings()

    @property
    def active(self) -> bool:
        """True inside `routed`."""
        return self._batch.active

    @property
    def stack_bytes(self) -> int:
        """Memory that copies for the mixed batch take now."""
        return self._together.stacks.nbytes

    def add(self, name: str, paths: Mapping[nn.Module, AdapterPath]) -> None:
        """Makes an adapter known, by what it does to which modules; forgets it again if it cannot."""
        try:
            for module, path in paths.items():
                self._sites[module] = site = install(module, is_head=module is self._head)
                site.paths[name] = path
            for family in dict.fromkeys(self._sites[module].family for module in paths):
                family.gather(name)
            at_home = {module: self._sites[module].paths[name] for module in paths}
            for follower in self._followers():
                follower.add(name, at_home)
        except BaseException:
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        """Forgets an adapter. Plans without it stay: they hold nothing of it."""
        self._plans = {routing: plan for routing, plan in self._plans.items() if not takes_part(name, routing)}
        for follower in self._followers():
            follower.drop(name)
        for module, site in list(self._sites.items()):
            if site.paths.pop(name, None) is not None:
                site.family.forget(name)
                if not site.paths:
                    uninstall(module)
                    del self._sites[module]
                    self._plans.clear()
                    self._together.clear()  # Stacks know a family's modules by their places, which shift.

    @contextmanager
    def routed(self, body: Sequence[str | None], head: Sequence[str | None] | None) -> Iterator[None]:
        """Inside, the model runs the rows with these adapters."""
        steps = self._plan(Routing.of(body, head))
        guard = partial(refuse_other_sizes, self._batch, len(body))
        hook = self._model.register_forward_pre_hook(guard, with_kwargs=True)
        self._batch.active = True
        try:
            steps.enter()
            yield
        finally:
            steps.leave()
            hook.remove()
            self._batch.active, self._batch.tokens = False, None
            if self._sightings.learn():
                self._plans.clear()
                self._together.clear()

    def static(
        self, capacity: int, max_rank: int | None, check: Callable[[set[str]], None], *, overlap: bool
    ) -> StaticRouting:
        """See `AdapterManager.static_routing`."""
        with torch.inference_mode(False):
            groups = self._together.new_groups(max_rank)
            if not groups.groups:
                raise AdapterNotLoaded("no adapter with low-rank products is loaded: load() one first")
            made = StaticRouting(groups, self._batch, self._head, check, capacity, overlap)
        self._statics.add(made)
        return made

    def graphable(self, name: str) -> bool:
        """True if an adapter is nothing but low-rank products."""
        return self._together.ranks.get(name) is not None

    def _followers(self) -> list[Together | StaticRouting]:
        """Those that want to know which adapters come and go."""
        return [self._together, *self._statics]

    def _plan(self, routing: Routing) -> Plan:
        known = self._plans.pop(routing, None)
        if known is None:
            with torch.inference_mode(False), torch.no_grad():  # Plans outlive the mode in which they are made.
                together, moved = self._together.of(routing)
                if moved:
                    self._plans.clear()
                self._sightings.open = True
                known = plan(routing, self._families(routing), together, self._batch, self._sightings)
            while len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
        self._plans[routing] = known
        return known

    def _families(self, routing: Routing) -> list[Family]:
        names = {*routing.body.names, *routing.head.names}
        touched = [site.family for site in self._sites.values() if not names.isdisjoint(site.paths)]
        return list(dict.fromkeys(touched))


def takes_part(name: str, routing: Routing) -> bool:
    """True if an adapter is in the batch."""
    return name in routing.body.names or name in routing.head.names


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
