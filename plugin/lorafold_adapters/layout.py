"""Brings the tokens of stacked adapters together, slot by slot, and back to their places.

Shapes in the names: N tokens of the batch, G slots, P tokens of the adapter that has most, C channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Layout:
    """Which tokens of a batch are whose, in the order of the slots."""

    __slots__ = ("_gather", "_places", "_rows", "_start", "_stop", "each", "slots")

    def __init__(self, slots: Sequence[str], units_of: Mapping[str, Sequence[int]], device: torch.device) -> None:
        units = [list(units_of.get(name, ())) for name in slots]
        self.slots = len(slots)
        self.each = max(len(own) for own in units)
        """Tokens of the adapter that has most; the others are filled up."""
        rows = [row for own in units for row in own]
        self._start, self._stop = rows[0], rows[0] + len(rows)
        self._gather: Tensor | None = None
        if len(rows) != self.slots * self.each or rows != list(range(self._start, self._stop)):
            filled = [(own + [own[0] if own else rows[0]] * self.each)[: self.each] for own in units]
            places = [slot * self.each + turn for slot, own in enumerate(units) for turn in range(len(own))]
            self._gather = torch.tensor(filled, device=device).flatten()
            self._rows = torch.tensor(rows, device=device)
            self._places = None if len(places) == self.slots * self.each else torch.tensor(places, device=device)

    def taken(self, all_NC: Tensor) -> Tensor:
        """The tokens [G, P, C]; a view if they are in order."""
        if self._gather is None:
            return all_NC[self._start : self._stop].view(self.slots, self.each, -1)
        return all_NC.index_select(0, self._gather).view(self.slots, self.each, -1)

    def put_back(self, changed_GPC: Tensor, all_NC: Tensor) -> None:
        """Writes what `taken` gave, changed in place, to where it came from."""
        if self._gather is None:
            return
        changed = changed_GPC.view(-1, changed_GPC.shape[-1])
        if self._places is not None:
            changed = changed.index_select(0, self._places)
        all_NC.index_copy_(0, self._rows, changed)
