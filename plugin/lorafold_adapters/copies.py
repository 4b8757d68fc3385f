"""The undo by copies: host memory, device memory, or the base's own files mapped into memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

from lorafold_adapters.checksum import checksum
from lorafold_adapters.delta import Change, chunks
from lorafold_adapters.undo import InPlace, Scratch, extent


class Copies(InPlace):
    """Keeps each parameter as it was before its first change; later folds start from there."""

    def __init__(self, live: Mapping[str, Tensor], copy: Callable[[str], Tensor]) -> None:
        self._live = live
        self._copy = copy
        self._kept: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self._scratch = Scratch()

    def write(self, name: str, change: Change) -> list[Tensor]:
        """See `Undo`."""
        live = self._live[name]
        if name not in self._kept:
            self._kept[name] = self._copy(name)
        self._changed.add(name)
        base = self._kept[name].to(live.device, non_blocking=True)
        extents = []
        for rows in chunks(live, change):
            out = live[rows] if live.dtype == torch.float32 else self._scratch.like(live[rows])
            change.forward(base[rows], rows, out)
            extents.append(extent(out))
            if out.dtype != live.dtype:
                live[rows].copy_(out)
        return extents

    def restore(self, name: str) -> None:
        """See `Undo`."""
        if name in self._changed:
            self._live[name].copy_(self._kept[name])
            self._changed.discard(name)

    def pristine(self, name: str) -> Tensor:
        """See `Undo`."""
        live = self._live[name]
        return self._kept[name].to(live.device) if name in self._changed else live

    def rebase(self) -> None:
        """See `Undo`."""
        self._kept.clear()
        self._changed.clear()

    @property
    def nbytes(self) -> int:
        """Mapped files do not count: the system takes their pages back when it needs them."""
        return sum(tensor.nbytes for tensor in self._kept.values() if not getattr(tensor, "is_mapped", False))


def host_copy(live: Tensor) -> Tensor:
    """A copy of a parameter in host memory, page-locked where the parameter is on a GPU."""
    copy = torch.empty(live.shape, dtype=live.dtype, device="cpu", pin_memory=live.is_cuda)
    return copy.copy_(live.detach())


class MappedFiles:
    """Gives parameters out of the base's safetensors files, mapped into memory: no copy, no extra memory.

    A parameter that no file holds bit for bit (loading converted or cast it) is copied to host memory.
    """

    def __init__(self, folder: Path, live: Mapping[str, Tensor]) -> None:
        self._live = live
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as opened:
                self._files.update(dict.fromkeys(opened.keys(), file))
        self._opened: dict[Path, safe_open] = {}

    def __call__(self, name: str) -> Tensor:
        """The values of parameter `name`, which is the base's now."""
        live = self._live[name]
        if (file := self._files.get(name)) is not None:
            if file not in self._opened:
                self._opened[file] = safe_open(str(file), framework="pt")
            mapped = cast(Tensor, self._opened[file].get_tensor(name))  # type: ignore[no-untyped-call]
            if mapped.dtype == live.dtype and checksum(mapped) == checksum(live.detach().cpu()):
                mapped.is_mapped = True  # type: ignore[attr-defined]
                return mapped
        return host_copy(live)
