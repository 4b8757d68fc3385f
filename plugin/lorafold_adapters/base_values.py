"""What the parameters of a base are worth, quantised or not and whatever is folded now, and what it was loaded as.

Knows nothing of adapters' names or of rows.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold_adapters.checksum import checksum
from lorafold_adapters.errors import BaseCorrupt
from lorafold_adapters.fold import Weights
from lorafold_adapters.identity import Fingerprint, cast_digest, tensor_digest
from lorafold_adapters.identity import fingerprint as fingerprint_of
from lorafold_adapters.quantised import dequantised, keep_as_loaded, quantised_modules, take_over
from lorafold_adapters.stand_ins import ByStorage, FoldOptions, Provenance, StandIns
from lorafold_adapters.undo import Undo
from lorafold_adapters.undo_kinds import UndoKind, make_undo
from lorafold_adapters.updates import Pristine


class BaseValues:
    """The base of one model, as it is when this is made."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        undo: UndoKind,
        source: str | Path | None,
        fingerprint: Fingerprint | None,
        options: FoldOptions,
    ) -> None:
        """See `AdapterManager`."""
        keep_as_loaded(model)
        self._model = model
        self._options = options
        self._quantised = quantised_modules(model)
        folder = Path(source or model.name_or_path or "/dev/null")
        self.weights = Weights(model, partial(self._make_undo, undo, folder if folder.is_dir() else None), checksum)
        """Writes them."""
        self.fingerprint = fingerprint or fingerprint_of(model)
        on_cpu = model.device.type == "cpu"
        self.weights.keep_checksums(self.fingerprint.tensors if on_cpu else {})

    @property
    def quantised(self) -> bool:
        """True if some of the weights are."""
        return bool(self._quantised)

    @property
    def provenance(self) -> Provenance | None:
        """What a fold into a quantised base starts from; None where no weight is quantised."""
        return self._options.provenance if self._quantised else None

    @property
    def coarse(self) -> str:
        """What rounds in a fold, for people."""
        requantised = self._quantised and self._options.requantise
        return "requantised weights" if requantised else f"{self._model.dtype} weights"

    def cast_digest(self, dtype: str) -> str:
        """See `AdapterManager.base_as`."""
        return cast_digest(self._model, dtype, self._stored)

    def pristine_of(self, module_name: str) -> Pristine:
        """Gives the values that parameters of one module have in the base, as it computes with them."""
        return lambda key: self._computed_with(f"{module_name}.{key}")

    def is_base(self, name: str, tensor: Tensor) -> bool:
        """True if a tensor holds what the base has under this name."""
        like, first = self.weights.live(name), self.weights.first_name(name)
        if tensor.shape != like.shape:
            return False
        return tensor_digest(tensor.to(like.dtype)) == self.fingerprint.tensors.get(first)

    def reload(self, fresh: nn.Module) -> None:
        """See `AdapterManager.reload`."""
        take_over(self._model, fresh)
        self.weights.reload(dict(fresh.named_parameters(remove_duplicate=False)))

    def _make_undo(self, kind: UndoKind, folder: Path | None, live: Mapping[str, Tensor]) -> Undo:
        others = make_undo(kind, live, folder)
        if not self._quantised:
            return others
        stand_ins = StandIns(self._quantised, self._model.dtype, self._options, folder)
        return ByStorage(stand_ins, self._quantised, others)

    def _computed_with(self, name: str) -> Tensor:
        """The values of a parameter that the base computes with while nothing is folded."""
        return dequantised(self._quantised[name]) if name in self._quantised else self.weights.pristine(name)

    def _stored(self, name: str) -> Tensor:
        """A parameter as a checkpoint of the base would hold it."""
        stored = self.weights.live(name) if name in self._quantised else self.weights.pristine(name)
        if not self.weights.is_base(name, stored):
            raise BaseCorrupt(f"'{name}' is not what was loaded: load the base again")
        return stored
