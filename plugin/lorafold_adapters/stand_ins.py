"""Folds into quantised weights: a layer with the folded values stands in for the quantised one, which stays as it is.

Undoing takes the stand-in away. A stand-in is put in and taken away by one assignment, so an exception anywhere leaves
either. Knows single weights only, by the names they have in the base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorafold_adapters.delta import Change, chunks
from lorafold_adapters.errors import BaseMismatch
from lorafold_adapters.quantised import Dense, bytes_of, compute_dtype, dequantised, requantised, shape_of
from lorafold_adapters.undo import Rounding, Scratch, Undo, extent

Provenance = Literal["dequantised base", "16-bit checkpoint"]
"""What a fold into a quantised base starts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldOptions:
    """How adapters are folded into a quantised base."""

    requantise: bool = False
    """Quantise the folded weights again: no more memory than the base takes, but it can lose the adapter."""
    provenance: Provenance = "dequantised base"
    """What the adapter is added to: what the quantised weights are worth, or the weights they were made from."""


class StandIns:
    """The `Undo` of quantised weights."""

    def __init__(
        self, modules: Mapping[str, nn.Module], activations: torch.dtype, options: FoldOptions, source: Path | None
    ) -> None:
        """`modules`: by the names of their weights. `source`: the folder of the 16-bit checkpoint's safetensors files.

        Raises BaseMismatch if the provenance is `16-bit checkpoint` and the folder does not have every weight.
        """
        self._modules = modules
        self._activations = activations
        self._requantise = options.requantise
        self._dense: dict[str, Tensor] = {}
        self._checkpoint = None if options.provenance == "dequantised base" else DenseFiles(source, modules)
        self._scratch = Scratch()

    def reserve(self, names: Iterable[str]) -> None:
        """See `Undo`."""
        if self._requantise:
            return
        made = {}
        for name in names:
            if name not in self._dense:
                made[name] = torch.empty(self.target(name).shape, dtype=self.target(name).dtype, device=self._at(name))
        self._dense.update(made)

    def write(self, name: str, change: Change) -> list[Tensor]:
        """See `Undo`."""
        module, base_OI = self._modules[name], self.pristine(name)
        dense_OI = self._dense.get(name)
        if dense_OI is None:
            dense_OI = torch.empty(base_OI.shape, dtype=self.target(name).dtype, device=base_OI.device)
        extents = []
        for rows in chunks(base_OI, change):
            out = self._scratch.like(base_OI[rows])
            change.forward(base_OI[rows], rows, out)
            extents.append(extent(out))
            dense_OI[rows].copy_(out)
        if self._requantise:
            module.__dict__["forward"] = requantised(module, dense_OI)
        else:
            self._dense[name] = dense_OI
            module.__dict__["forward"] = Dense(module, dense_OI)
        return extents

    def restore(self, name: str) -> None:
        """See `Undo`."""
        self._modules[name].__dict__.pop("forward", None)
        self._dense.pop(name, None)

    def pristine(self, name: str) -> Tensor:
        """What a fold starts from, in fp32."""
        if self._checkpoint is not None:
            return self._checkpoint(name).to(self._at(name)).float()
        return dequantised(self._modules[name])

    def target(self, name: str) -> Tensor:
        """See `Undo`; on the meta device."""
        module = self._modules[name]
        dtype = compute_dtype(module, self._activations)
        return torch.empty(shape_of(module), dtype=dtype, device="meta")

    def rounding(self, name: str) -> Rounding:
        """See `Undo`."""
        module, dtype = self._modules[name], self.target(name).dtype
        if not self._requantise:
            return Rounding(function=lambda exact: exact.to(dtype))
        return Rounding(function=lambda exact: dequantised(requantised(module, exact.to(dtype))), whole=True)

    def extra_bytes(self, name: str) -> int:
        """See `Undo`."""
        return bytes_of(self._modules[name]) if self._requantise else self.target(name).nbytes

    def rebase(self) -> None:
        """See `Undo`."""
        for name in self._modules:
            self.restore(name)

    @property
    def nbytes(self) -> int:
        """The dense copies, or the second quantised ones."""
        folded = [name for name, module in self._modules.items() if "forward" in module.__dict__]
        return sum(self.extra_bytes(name) for name in self._dense.keys() | set(folded))

    def _at(self, name: str) -> torch.device:
        weight = self._modules[name].weight
        assert isinstance(weight, Tensor)
        return weight.device


class DenseFiles:
    """The weights of a checkpoint that was not quantised, out of its safetensors files."""

    def __init__(self, folder: Path | None, modules: Mapping[str, nn.Module]) -> None:
        """Raises BaseMismatch if a weight is not there or has another shape."""
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")) if folder else ():
            with safe_open(str(file), framework="pt") as opened:
                shapes = {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            fitting = {name for name, shape in shapes.items() if name in modules and shape == shape_of(modules[name])}
            self._files.update(dict.fromkeys(fitting, file))
        missing = sorted(modules.keys() - self._files.keys())
        if missing:
            raise BaseMismatch(
                f"'{missing[0]}' is not in the safetensors files of '{folder}' with the base's shape: "
                "name the folder of the 16-bit checkpoint, or fold into the dequantised base"
            )

    def __call__(self, name: str) -> Tensor:
        """The values, on the CPU."""
        with safe_open(str(self._files[name]), framework="pt") as opened:
            values: Tensor = opened.get_tensor(name)
        return values


class ByStorage:
    """Quantised weights to one `Undo`, all other parameters to another."""

    def __init__(self, quantised: StandIns, names: Iterable[str], others: Undo) -> None:
        self._quantised, self._names, self._others = quantised, frozenset(names), others

    def _of(self, name: str) -> Undo:
        return self._quantised if name in self._names else self._others

    def reserve(self, names: Iterable[str]) -> None:
        """See `Undo`."""
        self._quantised.reserve(name for name in names if name in self._names)

    def write(self, name: str, change: Change) -> list[Tensor]:
        """See `Undo`."""
        return self._of(name).write(name, change)

    def restore(self, name: str) -> None:
        """See `Undo`."""
        self._of(name).restore(name)

    def pristine(self, name: str) -> Tensor:
        """See `Undo`."""
        return self._of(name).pristine(name)

    def target(self, name: str) -> Tensor:
        """See `Undo`."""
        return self._of(name).target(name)

    def rounding(self, name: str) -> Rounding:
        """See `Undo`."""
        return self._of(name).rounding(name)

    def extra_bytes(self, name: str) -> int:
        """See `Undo`."""
        return self._of(name).extra_bytes(name)

    def rebase(self) -> None:
        """See `Undo`."""
        self._quantised.rebase()
        self._others.rebase()

    @property
    def nbytes(self) -> int:
        """See `Undo`."""
        return self._quantised.nbytes + self._others.nbytes
