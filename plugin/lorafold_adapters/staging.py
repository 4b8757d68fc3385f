"""The half of loading that may happen while the model runs: an adapter's tensors on the device, and what is made of
them without reading the base's weights.

On a GPU that is done on a stream of its own, which the engine's stream waits for in `Staged.wait`. On a CPU nothing is
copied.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.blocks import moved, packed
from lorafold_adapters.composed import Composed
from lorafold_adapters.paths import AdapterPath, path_of
from lorafold_adapters.routes import unrouted
from lorafold_adapters.updates import LowRank, NewRows, Update


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """An adapter that is ready to be loaded."""

    bound: BoundAdapter
    """With its tensors on the device."""
    paths: Mapping[str, AdapterPath]
    """By module: what runs beside the weights, where that does not depend on them. The others are made at loading."""
    copied: torch.cuda.Event | None = None
    """Happens when all of that is there; None where it is already."""

    def wait(self) -> None:
        """What the current stream does from now on happens after the copies, and they live as long as it needs them."""
        if self.copied is None:
            return
        stream = torch.cuda.current_stream(self.copied.device)
        stream.wait_event(self.copied)
        for tensor in (*self.bound.tensors(), *tensors_in(tuple(self.paths.values()))):
            if tensor.is_cuda:
                tensor.record_stream(stream)


class Stager:
    """Stages adapters for one device. Any thread may use it."""

    def __init__(self, device: torch.device, activations: torch.dtype) -> None:
        self._device = device
        self._activations = activations
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, bound: BoundAdapter) -> BoundAdapter:
        """A copy in memory that the device can read by itself; on a CPU the adapter itself."""
        if self._side is None:
            return bound
        return packed(bound, partial(torch.empty, dtype=torch.uint8, pin_memory=True))

    @torch.no_grad()
    def stage(self, bound: BoundAdapter, modules: Mapping[str, nn.Module]) -> Staged:
        """The adapter on the device. Raises torch.OutOfMemoryError."""
        with torch.inference_mode(False), self._beside():
            bound = self._on_device(bound)
            paths = {
                name: path_of(update, modules[name], refuse_to_read, self._activations)
                for name, update in routed_updates(bound).items()
                if not reads_base(update)
            }
            return Staged(bound=bound, paths=paths, copied=None if self._side is None else self._side.record_event())

    def _beside(self) -> AbstractContextManager[object]:
        """Inside, this thread's work on the device is queued on the side stream."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _on_device(self, bound: BoundAdapter) -> BoundAdapter:
        if self._side is not None and all(tensor.is_pinned() for tensor in bound.tensors()):
            return moved(bound, lambda block: block.to(self._device, non_blocking=True))
        return bound.to(self._device)


def routed_updates(bound: BoundAdapter) -> dict[str, Update]:
    """By module what runs beside the weights, as far as that is known; nothing if the adapter cannot run there."""
    if bound.route_refusal is not None:
        return {}
    unknown = set(unrouted(bound))
    known = {name: update for name, update in bound.updates.items() if name not in unknown}
    return {name: bound.routes[name].update if name in bound.routes else update for name, update in known.items()}


def reads_base(update: Update) -> bool:
    """True if the two-path form of the update depends on the base's values, or on the module that holds them."""
    if isinstance(update, Composed):
        return any(reads_base(part.update) for part in update.parts)
    if isinstance(update, LowRank):
        return update.magnitude_O is not None or update.new_bias_O is not None
    return not isinstance(update, NewRows)


def refuse_to_read(key: str) -> Tensor:
    """In place of the base's values, where a form does without."""
    raise AssertionError(f"'{key}' was read while the model runs")


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in dataclasses and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
