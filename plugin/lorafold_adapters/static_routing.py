"""Routing that a CUDA graph can capture: which row has which adapter is in a buffer on the device, and nothing else
changes between one step and the next.

A graph that was captured inside `routed` may be replayed for any mix of the adapters that are covered. Rows without an
adapter get exactly the base's outputs. Knows nothing of graphs.

Shapes in the names: N tokens, O out-features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafold_adapters.errors import AdapterInUse, RoutingMismatch
from lorafold_adapters.paths import AdapterPath
from lorafold_adapters.sharing import version_of
from lorafold_adapters.slot_groups import Group, SlotGroups
from lorafold_adapters.steps import Batch
from lorafold_adapters.two_path import Patch, Site, enter, leave

NOBODY = -1
"""The slot of the base."""


class StaticRouting:
    """Adapters of up to `capacity` rows of one token each. Made by `AdapterManager.static_routing`."""

    def __init__(
        self,
        groups: SlotGroups,
        batch: Batch,
        head: nn.Module | None,
        check: Callable[[set[str]], None],
        capacity: int,
        overlap: bool,
    ) -> None:
        """`check` raises if these adapters may not be routed now; `batch` says whether rows are routed."""
        self.capacity = capacity
        self.groups = groups
        self._batch = batch
        self._check = check
        self._set: tuple[Sequence[str | None], Sequence[str | None]] = ((), ())
        device = self._device = groups.groups[0].tables.a_FS.device
        beside = overlap and device.type == "cuda"
        self._side: torch.cuda.Stream | None = torch.cuda.Stream(device) if beside else None  # type: ignore[no-untyped-call]
        self._slots_2N = torch.full((2, capacity), NOBODY, dtype=torch.int32, device=device)
        self._buffer = torch.empty(self._numbers(), dtype=torch.float32, device=device)
        self._runs = [
            _GroupRun(self, group, self._slots_2N[1 if group.modules[0] is head else 0]) for group in groups.groups
        ]
        self._patches = [Patch.of(step.site, step) for run in self._runs for step in run.steps]

    def covers(self, adapters: Sequence[str | None]) -> bool:
        """True if a batch of these rows can run inside `routed`.

        Not so for adapters that replace modules or embeddings, that change modules which no adapter changed when this
        was made, whose rank is larger than any was then, or beyond the number of slots: `AdapterManager.routed` runs
        those, or a new static routing with graphs captured anew.
        """
        return len(adapters) <= self.capacity and self.groups.covers(adapters)

    def set(self, adapters: Sequence[str | None], head: Sequence[str | None] | None = None) -> None:
        """Writes down which row has which adapter, for all steps and replays from now on; None is the base.

        `head` names those of the positions that reach the output embedding, where they are others. Rows beyond are the
        base's. Raises RoutingMismatch if the rows are not covered, AdapterNotLoaded, or AdapterInUse while an adapter
        is folded.
        """
        rows, head = tuple(adapters), tuple(adapters if head is None else head)
        self._check({name for name in (*rows, *head) if name is not None})
        if not (self.covers(rows) and self.covers(head)):
            raise RoutingMismatch(f"the {len(rows)} rows do not fit this static routing: ask covers() first")
        if (rows, head) != self._set:
            lists = [self.groups.slots_of(one) + [NOBODY] * (self.capacity - len(one)) for one in (rows, head)]
            self._slots_2N.copy_(torch.tensor(lists, dtype=torch.int32))
            self._set = (rows, head)

    def add(self, name: str, paths: Mapping[nn.Module, AdapterPath]) -> None:
        """An adapter was loaded."""
        self.groups.add(name, paths)

    def drop(self, name: str) -> None:
        """An adapter was dropped; rows that still name it are the base's."""
        self.groups.drop(name)
        self._set = ((), ())

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Inside, `model(...)` runs the low-rank paths of whatever `set` says when it runs, one token a row.

        Raises AdapterInUse while an adapter is folded; `model(...)` raises RoutingMismatch for more rows than
        `capacity`.
        """
        self._check(set())
        if self._batch.active:
            raise AdapterInUse("rows are routed now: leave routed() first")
        self._batch.active = True
        try:
            enter(self._patches)
            yield
        finally:
            leave(self._patches)
            for run in self._runs:
                run.forget()
            self._batch.active = False

    def _numbers(self) -> int:
        """Of the largest group's partial sums."""
        parts = self.groups.kernels.parts
        return max(parts(group.inputs) * self.capacity * group.columns for group in self.groups.groups)

    def start(self, group: Group, inputs: Tensor, slot_N: Tensor) -> Tensor:
        """Multiplies by the A's of a group; beside what follows, until `finish`, if work overlaps."""
        inputs_NI = inputs.reshape(-1, inputs.shape[-1])
        tokens = len(inputs_NI)
        if tokens > self.capacity:
            raise RoutingMismatch(f"a layer got {tokens} tokens; this static routing was made for {self.capacity}")
        if self._side is None:
            return group.shrunk(self.groups.kernels, inputs_NI, slot_N[:tokens], self._buffer)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            return group.shrunk(self.groups.kernels, inputs_NI, slot_N[:tokens], self._buffer)

    def finish(self, group: Group, shrunk_PNR: Tensor, slot_N: Tensor, outputs: Sequence[Tensor]) -> None:
        """Adds the products with the B's to the outputs of all of a group's modules, in place."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        flat = [(place, tensor.view(-1, tensor.shape[-1])) for place, tensor in enumerate(outputs)]
        self.groups.kernels.expand(shrunk_PNR, slot_N[: shrunk_PNR.shape[1]], group.tables, flat)


class _GroupRun:
    """One group inside `routed`: the first module to get the inputs computes for its siblings too."""

    def __init__(self, routing: StaticRouting, group: Group, slot_N: Tensor) -> None:
        self._routing = routing
        self._group = group
        self._slot_N = slot_N
        self.steps = [_GroupStep(self, Site(module, is_head=False)) for module in group.modules]
        self.forget()

    def forget(self) -> None:
        """Lets go of what was computed for siblings."""
        self._inputs: Tensor | None = None
        self._version = NOBODY
        self._ready: dict[_GroupStep, Tensor] = {}

    def of(self, step: "_GroupStep", inputs: Tensor) -> Tensor:
        """The adapted outputs of one module."""
        if inputs is self._inputs and version_of(inputs) == self._version and step in self._ready:
            outputs = self._ready.pop(step)
        else:
            self._inputs, self._version = inputs, version_of(inputs)
            shrunk_PNR = self._routing.start(self._group, inputs, self._slot_N)
            self._ready = {sibling: sibling.site.base(inputs).contiguous() for sibling in self.steps}
            self._routing.finish(self._group, shrunk_PNR, self._slot_N, list(self._ready.values()))
            outputs = self._ready.pop(step)
        if not self._ready:
            self.forget()
        return outputs


class _GroupStep:
    """One module of a group inside `routed`."""

    def __init__(self, run: _GroupRun, site: Site) -> None:
        self._run = run
        self.site = site

    def forward(self, inputs: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """See `Step`."""
        return self._run.of(self, inputs)
