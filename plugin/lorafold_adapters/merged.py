"""Any tensor of a base as it would be with an adapter folded, computed beside the weights: nothing is folded for it.

The same arithmetic as a fold, in the same chunks, rounded once. Knows nothing of files.
"""

import torch
from torch import Tensor

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.delta import Change, chunks
from lorafold_adapters.errors import BaseCorrupt, FoldFailed
from lorafold_adapters.fold import Weights, refuse_unbounded
from lorafold_adapters.undo import extent


class Merged:
    """Reads one base with one adapter in it. Called where the model may be read: its thread, between two steps."""

    def __init__(self, model: torch.nn.Module, weights: Weights, adapter: BoundAdapter) -> None:
        self._weights = weights
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._saved: dict[str, Tensor] = model.state_dict()
        self._changes = dict(weights.changes(adapter))

    @property
    def live(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint may hold, as it is now; for names, shapes and which ones share memory."""
        return dict(self._saved)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """The tensor `name` of `live` with the adapter in it, on the CPU, in memory of its own.

        Raises FoldFailed, or BaseCorrupt if the base is not what was loaded.
        """
        if name not in self._parameters:
            return self._saved[name].to("cpu", copy=True)
        base = self._weights.pristine(name).detach()
        if not self._weights.is_base(name, base):
            raise BaseCorrupt(f"'{name}' is not what was loaded: load the base again")
        change = self._changes.get(self._weights.first_name(name))
        if change is None:
            return base.to("cpu", copy=True)
        try:
            return folded(name, base, change).cpu()
        except (ValueError, RuntimeError) as error:
            raise FoldFailed(f"'{name}' could not be computed, nothing was changed: {error}") from error


def folded(name: str, base: Tensor, change: Change) -> Tensor:
    """What a fold writes into a parameter that holds `base`. Raises ValueError for values its dtype cannot hold."""
    values = torch.empty_like(base)
    extents = []
    for rows in chunks(base, change):
        in_place = base.dtype == torch.float32
        out = values[rows] if in_place else torch.empty(base[rows].shape, dtype=torch.float32, device=base.device)
        change.forward(base[rows], rows, out)
        extents.append(extent(out))
        if not in_place:
            values[rows].copy_(out)
    refuse_unbounded({name: (base.dtype, extents)})
    return values
