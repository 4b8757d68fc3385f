"""Which adapter is in the weights, right whichever line an exception struck last, and what may not happen meanwhile.

Knows adapters by the names that the manager has for them.
"""

from dataclasses import dataclass

from torch import nn

from lorafold_adapters.base_values import BaseValues
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterInUse, BaseCorrupt
from lorafold_adapters.fold import State
from lorafold_adapters.stand_ins import Provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldState:
    """What is in the weights now."""

    folded: str | None
    """Name of the folded adapter; None: the weights are the base's."""
    generation: int
    """Grows whenever weights change."""
    dirty: bool
    """True if a change was interrupted or the base could not be given back: nothing may run on the weights."""
    undo_bytes: int
    """Memory that is held to give the base back, dense copies of quantised weights included."""
    provenance: Provenance | None
    """What a fold into a quantised base starts from; None where no weight is quantised."""


class Folded:
    """The adapter in the weights of one base."""

    def __init__(self, base: BaseValues) -> None:
        self._base = base
        self._weights = base.weights
        self._name: str | None = None
        self._generation = 0

    @property
    def state(self) -> FoldState:
        """See `FoldState`."""
        return FoldState(
            folded=self.name,
            generation=self._generation,
            dirty=self._dirty,
            undo_bytes=self._weights.undo_bytes,
            provenance=self._base.provenance,
        )

    @property
    def name(self) -> str | None:
        """The folded adapter."""
        return self._name if self._weights.state is State.FOLDED else None

    def fold(self, name: str, bound: BoundAdapter) -> int:
        """See `Weights.fold`; `name` is what the adapter is known as."""
        self._name, self._generation = None, self._generation + 1
        written = self._weights.fold(bound)
        self._name = name
        return written

    def restore(self) -> bool:
        """Gives the base back bit for bit; False if nothing was folded. Raises BaseCorrupt if it cannot."""
        if self._weights.state is State.BASE:
            return False
        self._generation += 1
        self._weights.restore()
        self._name = None
        return True

    def reload(self, fresh: nn.Module) -> None:
        """See `AdapterManager.reload`."""
        self._name, self._generation = None, self._generation + 1
        self._base.reload(fresh)

    def refuse_dirty(self) -> None:
        """Raises BaseCorrupt if it is not known what is in the weights, or which adapter."""
        if self._dirty:
            raise BaseCorrupt(
                "the weights are neither the base's nor an adapter's: unmerge_adapter() or reload() first"
            )

    def refuse_folded(self, what: str) -> None:
        """Raises AdapterInUse if an adapter is folded; `what` says what to do about it. Raises BaseCorrupt too."""
        self.refuse_dirty()
        if self.name is not None:
            raise AdapterInUse(f"adapter '{self.name}' is folded: {what}")

    @property
    def _dirty(self) -> bool:
        return self._weights.state is State.DIRTY or (self._weights.state is State.FOLDED and self._name is None)
