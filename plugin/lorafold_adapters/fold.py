"""Writes adapters into the weights of a base and gives the base back bit for bit.

Every tensor is copied to host memory before it is first changed; a new fold starts from those copies, so going from
one adapter to the next never passes through rounded sums, and undoing one is a plain copy. Writes happen in place.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lorafold_adapters.binding import BoundAdapter, LowRank, Replaced
from lorafold_adapters.delta import folded_weight, low_rank_delta
from lorafold_adapters.errors import BaseCorrupt, FoldFailed


class Weights:
    """The parameters of one base, and copies of those that were ever changed.

    The only place that writes weights. Not thread-safe: one thread owns the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = dict(model.named_parameters(remove_duplicate=False))
        self._pristine: dict[str, Tensor] = {}
        self._changed: set[str] = set()

    def pristine(self, name: str) -> Tensor:
        """The parameter `name` as it is in the base, on its own device; do not write to it."""
        live = self._live[name]
        return self._pristine[name].to(live.device) if name in self._changed else live

    @property
    def changed(self) -> bool:
        """True while any parameter may differ from the base."""
        return bool(self._changed)

    @torch.no_grad()
    def fold(self, adapter: BoundAdapter) -> int:
        """Makes the weights base plus `adapter`, whatever was folded before; returns the bytes written.

        Raises FoldFailed (the base was given back) or BaseCorrupt (it could not be).
        """
        before = set(self._changed)
        try:
            written = sum(self._write(name, new) for name, new in self._folded(adapter, before))
            self._give_back(before)
        except Exception as error:
            self.restore()
            raise FoldFailed(f"folding adapter {adapter.digest[:12]} failed, the base was restored: {error}") from error
        return written

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the base back bit for bit. Raises BaseCorrupt if that fails."""
        try:
            self._give_back(set(self._changed))
        except Exception as error:
            raise BaseCorrupt(f"the base weights could not be given back: {error}") from error

    def _folded(self, adapter: BoundAdapter, untouched: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Each changed parameter's name and new value; takes the names off `untouched` as it goes."""
        for module, update in adapter.updates.items():
            for key, new in self._updated(module, update):
                untouched.discard(f"{module}.{key}")
                yield f"{module}.{key}", new

    def _updated(self, module: str, update: LowRank | Replaced) -> Iterator[tuple[str, Tensor]]:
        if isinstance(update, Replaced):
            yield from update.parameters.items()
            return
        weight_OI = self.pristine(f"{module}.weight")
        a_RI, b_OR = update.a_RI.to(weight_OI.device), update.b_OR.to(weight_OI.device)
        magnitude_O = None if update.magnitude_O is None else update.magnitude_O.to(weight_OI.device)
        yield "weight", folded_weight(weight_OI, low_rank_delta(a_RI, b_OR, update.scaling), magnitude_O)
        if update.bias_O is not None:
            bias_O = self.pristine(f"{module}.bias")
            yield "bias", bias_O.float() + update.bias_O.to(bias_O.device).float() * update.scaling

    def _write(self, name: str, new: Tensor) -> int:
        live = self._live[name]
        rounded = new.to(live)
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"'{name}' would have NaN or infinite values in {live.dtype}")
        if name not in self._pristine:
            self._pristine[name] = host_copy(live)
        self._changed.add(name)
        live.copy_(rounded)
        return live.nbytes

    def _give_back(self, names: set[str]) -> None:
        for name in names:
            self._live[name].copy_(self._pristine[name])
            self._changed.discard(name)


def host_copy(live: Tensor) -> Tensor:
    """A copy of a parameter in host memory, page-locked where the parameter is on a GPU."""
    copy = torch.empty(live.shape, dtype=live.dtype, device="cpu", pin_memory=live.is_cuda)
    return copy.copy_(live.detach())
