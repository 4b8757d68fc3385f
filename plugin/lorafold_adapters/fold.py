"""Writes adapters into the weights of a base, in place, and gives the base back bit for bit.

A fold starts from the base's values whatever was folded before, so going from one adapter to the next is one pass and
never goes through rounded sums. After every unfold the checksum of each restored parameter is compared with the base's.
Knows nothing of where adapters come from.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import torch
from torch import Tensor, nn

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.delta import Change
from lorafold_adapters.errors import BaseCorrupt, DeviceFull, FoldFailed
from lorafold_adapters.phases import Phases
from lorafold_adapters.undo import Rounding, Undo


class State(Enum):
    """What is known of the weights."""

    BASE = "base"
    FOLDED = "folded"
    DIRTY = "dirty"
    """A change was interrupted, or the base could not be given back."""


class Weights:
    """The parameters of one base. The only place that writes weights. Not thread-safe: one thread owns the model."""

    def __init__(
        self,
        model: nn.Module,
        make_undo: Callable[[Mapping[str, Tensor]], Undo],
        checksum: Callable[[Tensor], str],
    ) -> None:
        """`checksum` gives that of a tensor, on whatever device it is."""
        self._live, self._first = shared_once(model)
        self._undo = make_undo(self._live)
        self._checksum = checksum
        self._checksums: dict[str, str] = {}
        self._changed: set[str] = set()
        self._state = State.BASE
        self.phases = Phases(next((live.device for live in self._live.values()), torch.device("cpu")))
        """`write`, `check`, `restore` and `compare`: what changes take."""

    @property
    def state(self) -> State:
        """What is in the weights; right at any moment, after an exception or the death of a thread too."""
        return self._state

    @property
    def undo_bytes(self) -> int:
        """Memory that the undo takes now."""
        return self._undo.nbytes

    def pristine(self, name: str) -> Tensor:
        """The parameter `name` as it is in the base, on its own device; do not write to it."""
        return self._undo.pristine(self._first[name])

    def is_base(self, name: str, values: Tensor) -> bool:
        """True if `values` have the checksum that parameter `name` had in the base."""
        return self._checksum(values) == self._checksums[self._first[name]]

    def live(self, name: str) -> Tensor:
        """The parameter itself."""
        return self._live[self._first[name]]

    def first_name(self, name: str) -> str:
        """The first of the names that a parameter has."""
        return self._first[name]

    def planned(self, adapter: BoundAdapter) -> Iterator[tuple[str, Change, Tensor, Rounding]]:
        """Each parameter that a fold would change, how, its values in the base, and what writing does to values."""
        for name, change in self.changes(adapter):
            yield name, change, self._undo.pristine(name), self._undo.rounding(name)

    def extra_bytes(self, adapter: BoundAdapter) -> int:
        """Memory that the weights take while `adapter` is folded, beside the base and what the undo keeps."""
        return sum(self._undo.extra_bytes(name) for name, _ in self.changes(adapter))

    def reserve(self, adapter: BoundAdapter) -> None:
        """Takes that memory. Raises DeviceFull; nothing is changed then."""
        try:
            self._undo.reserve([name for name, _ in self.changes(adapter)])
        except torch.OutOfMemoryError as error:
            raise DeviceFull(
                f"the device's memory does not hold the {self.extra_bytes(adapter) / 1e6:,.1f} MB that folding adapter "
                f"{adapter.digest[:12]} takes beside a quantised base: serve it unmerged, or with requantise = true"
            ) from error

    def keep_checksums(self, known: Mapping[str, str]) -> None:
        """The checksums that every restore is compared with; those not `known` are taken now, from the base."""
        self._checksums = {
            name: known[name] if name in known else self._checksum(live) for name, live in self._live.items()
        }

    @torch.no_grad()
    def fold(self, adapter: BoundAdapter) -> int:
        """Makes the weights base plus `adapter`, whatever was folded before; returns the bytes written.

        Raises FoldFailed (the base was given back) or BaseCorrupt (it could not be).
        """
        before = set(self._changed)
        self._state = State.DIRTY
        try:
            self._changed.update(name for name, _ in self.changes(adapter))  # What was reserved is given back as well.
            with self.phases.part("write"):
                extents = {name: self._undo.write(name, change) for name, change in self.changes(adapter)}
            with self.phases.part("check"):
                refuse_unbounded({name: (self._undo.target(name).dtype, values) for name, values in extents.items()})
            self._give_back(before - extents.keys())
            written = sum(self._undo.target(name).nbytes for name in extents)
        except BaseException as error:
            self.restore()
            if not isinstance(error, Exception):
                raise
            raise FoldFailed(f"folding adapter {adapter.digest[:12]} failed, the base was restored: {error}") from error
        self._state = State.FOLDED
        return written

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the base back bit for bit. Raises BaseCorrupt if that fails; the state then stays dirty."""
        self._state = State.DIRTY
        self._give_back(set(self._changed))
        self._state = State.BASE

    @torch.no_grad()
    def reload(self, fresh: Mapping[str, Tensor]) -> None:
        """Makes every parameter what `fresh` holds under its name, and that the base. Raises BaseCorrupt."""
        self._state = State.DIRTY
        for name, live in self._live.items():
            live.copy_(fresh[name])
        self._undo.rebase()
        self._changed.clear()
        self._compare(self._live)
        self._state = State.BASE

    def changes(self, adapter: BoundAdapter) -> Iterator[tuple[str, Change]]:
        """The change of each parameter, once where modules share it."""
        done: set[str] = set()
        for module, update in adapter.updates.items():
            for key, change in update.changes(lambda key, module=module: self.pristine(f"{module}.{key}")).items():  # type: ignore[misc]
                name = self._first[f"{module}.{key}"]
                if name not in done:
                    done.add(name)
                    yield name, change

    def _give_back(self, names: set[str]) -> None:
        try:
            with self.phases.part("restore"):
                for name in names:
                    self._undo.restore(name)
            with self.phases.part("compare"):
                self._compare(names)
        except BaseCorrupt:
            raise
        except Exception as error:
            raise BaseCorrupt(f"the base weights could not be given back: {error}") from error
        self._changed -= names

    def _compare(self, names: set[str] | Mapping[str, Tensor]) -> None:
        wrong = sorted(name for name in names if self._checksum(self._live[name]) != self._checksums[name])
        if wrong:
            raise BaseCorrupt(
                f"{len(wrong)} tensors are not what was loaded, '{wrong[0]}' for one: the base must be loaded again"
            )


def shared_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters, each once, under the first name it has; and the first name of every name."""
    live: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    names: dict[tuple[int, torch.Size], str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = (parameter.data_ptr(), parameter.shape)
        first[name] = names.setdefault(key, name) if parameter.numel() else name
        live.setdefault(first[name], parameter)
    return live, first


def refuse_unbounded(extents: Mapping[str, tuple[torch.dtype, list[Tensor]]]) -> None:
    """Raises ValueError if a value is NaN or lies beyond what its dtype can hold."""
    names = [name for name, (_, values) in extents.items() for _ in values]
    if not names:
        return
    limit = torch.tensor([torch.finfo(dtype).max for dtype, values in extents.values() for _ in values])
    found = torch.stack([value for _, values in extents.values() for value in values]).cpu().float()
    fits = (found.abs() <= limit.unsqueeze(1)).all(dim=1)
    if not bool(fits.all()):
        name = names[int((~fits).nonzero()[0])]
        raise ValueError(f"'{name}' would have NaN or infinite values in {extents[name][0]}")
