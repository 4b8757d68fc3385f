"""Two ways to give a parameter back bit for bit: a copy of it, or a record of what rounding would not give back.

Either carries out a change in place, chunk by chunk. An exception between any two lines leaves enough behind to restore
the parameter. Knows single parameters only; which ones an adapter changes is `fold.py`'s business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from lorafold_adapters.checksum import checksum
from lorafold_adapters.delta import Change, chunks

UndoKind = Literal["auto", "checkpoint", "host", "device", "sparse"]


class Undo(Protocol):
    """Changes parameters, and gives them back."""

    def write(self, name: str, change: Change) -> list[Tensor]:
        """Makes parameter `name` the base with `change` in it, whatever it was; returns the extents of the values.

        An extent is the smallest and the largest value before rounding, fp32 [2]; both are NaN if any value is.
        """
        ...

    def restore(self, name: str) -> None:
        """Makes it the base's again; does nothing if it is."""
        ...

    def pristine(self, name: str) -> Tensor:
        """The base's values, on the parameter's device; not to be written to."""
        ...

    def rebase(self) -> None:
        """Forgets everything: the parameters now are the base's."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory it holds now, beside the parameters."""
        ...


def make_undo(kind: UndoKind, live: Mapping[str, Tensor], source: Path | None) -> Undo:
    """The undo that `kind` names. `auto`: the checkpoint's files for parameters on the CPU, host memory for others.

    `source` is the folder of the base's safetensors files; without one, `checkpoint` keeps copies in host memory.
    """
    if kind == "sparse":
        return Records(live)
    if kind == "device":
        return Copies(live, lambda name: live[name].detach().clone())
    on_cpu = all(tensor.device.type == "cpu" for tensor in live.values())
    if source is not None and (kind == "checkpoint" or (kind == "auto" and on_cpu)):
        return Copies(live, MappedFiles(source, live))
    return Copies(live, lambda name: host_copy(live[name]))


class Scratch:
    """Buffers that are used again and again: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, chunk: Tensor, role: str = "new", dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of this role in the shape of `chunk`, on its device; its contents are whatever they were."""
        buffer = self._buffers.get((role, dtype))
        if buffer is None or buffer.device != chunk.device or buffer.numel() < chunk.numel():
            buffer = self._buffers[role, dtype] = torch.empty(chunk.numel(), dtype=dtype, device=chunk.device)
        return buffer[: chunk.numel()].view(chunk.shape)

    def rounded(self, values: Tensor, role: str, dtype: torch.dtype) -> Tensor:
        """`values` in `dtype`: themselves if they have it, or else in the buffer of this role."""
        return values if values.dtype == dtype else self.like(values, role, dtype).copy_(values)


def extent(values: Tensor) -> Tensor:
    """Smallest and largest value, [2]; stays on the device, so that nobody waits for it."""
    return torch.stack(torch.aminmax(values))


class Copies:
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
            if mapped.dtype == live.dtype and torch.equal(mapped, live.detach().cpu()):
                mapped.is_mapped = True  # type: ignore[attr-defined]
                return mapped
        return host_copy(live)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one chunk was before it was changed, beyond what its change gives back."""

    change: Change
    memo: Tensor | None
    """What `forward` left for `backward`."""
    index: Tensor | None
    """Flat places in the chunk, int32; None: `values` is the whole chunk."""
    values: Tensor
    checksum: str
    """Of the chunk."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in (self.values, self.index, self.memo) if tensor is not None)


class Records:
    """Keeps, chunk by chunk, the elements that subtracting the change again would not give back (facts: 0.5-16 %)."""

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        self._live = live
        self._records: dict[str, dict[tuple[int, int], Record]] = {}
        self._pending: tuple[str, slice, Tensor] | None = None
        """The chunk that is being written, and its base values: whether it was written is not known."""
        self._scratch = Scratch()

    def write(self, name: str, change: Change) -> list[Tensor]:
        """See `Undo`."""
        self._settle()
        live = self._live[name]
        plan = list(chunks(live, change))
        records = self._records.setdefault(name, {})
        if records.keys() - {(rows.start, rows.stop) for rows in plan}:
            self.restore(name)
        return [self._write_chunk(name, rows, change) for rows in plan]

    def restore(self, name: str) -> None:
        """See `Undo`."""
        self._settle()
        records = self._records.get(name, {})
        for start, stop in list(records):
            rows = slice(start, stop)
            base = self._base(name, rows)
            self._pending = (name, rows, base)
            self._live[name][rows].copy_(base)
            del records[start, stop]
            self._pending = None
        self._records.pop(name, None)

    def pristine(self, name: str) -> Tensor:
        """See `Undo`."""
        live = self._live[name]
        if not self._records.get(name):
            return live
        self._settle()
        base = live.clone()
        for start, stop in self._records[name]:
            base[start:stop] = self._base(name, slice(start, stop))
        return base

    def rebase(self) -> None:
        """See `Undo`."""
        self._records.clear()
        self._pending = None

    @property
    def nbytes(self) -> int:
        """See `Undo`."""
        return sum(record.nbytes for records in self._records.values() for record in records.values())

    def _write_chunk(self, name: str, rows: slice, change: Change) -> Tensor:
        live = self._live[name][rows]
        base = self._base(name, rows)
        out = self._scratch.like(live)
        memo = change.forward(base, rows, out)
        folded = self._scratch.rounded(out, "folded", live.dtype)
        record = self._record(change, base, folded, rows, memo)
        self._pending = (name, rows, base)
        live.copy_(folded)
        self._records[name][rows.start, rows.stop] = record
        self._pending = None
        return extent(out)

    def _record(self, change: Change, base: Tensor, folded: Tensor, rows: slice, memo: Tensor | None) -> Record:
        back = self._backward(change, folded, rows, memo, "back")
        lost = (bits(back) != bits(base)).flatten()
        index = lost.nonzero().flatten()
        short = index.numel() * (4 + base.element_size()) < base.nbytes
        return Record(
            change=change,
            memo=memo if short else None,
            index=index.to(torch.int32) if short else None,
            values=base.flatten()[index] if short else base.clone(),
            checksum=checksum(base),
        )

    def _base(self, name: str, rows: slice) -> Tensor:
        """A copy of the base's values of a chunk. Raises ArithmeticError if they cannot be had from its record."""
        live = self._live[name][rows]
        record = self._records.get(name, {}).get((rows.start, rows.stop))
        if record is None:
            return self._scratch.like(live, "base", live.dtype).copy_(live)
        if record.index is None:
            return record.values
        base = self._backward(record.change, live, rows, record.memo, "base")
        base.view(-1)[record.index.long()] = record.values
        if checksum(base) != record.checksum:
            raise ArithmeticError(f"the record of '{name}' does not give back rows {rows.start} to {rows.stop}")
        return base

    def _backward(self, change: Change, folded: Tensor, rows: slice, memo: Tensor | None, role: str) -> Tensor:
        out = self._scratch.like(folded, role)
        change.backward(folded, rows, out, memo)
        return self._scratch.rounded(out, role, folded.dtype)

    def _settle(self) -> None:
        """Gives a chunk back that an exception caught half-way; its old record, if any, is used up by that."""
        if self._pending is not None:
            name, rows, base = self._pending
            self._live[name][rows].copy_(base)
            self._records.get(name, {}).pop((rows.start, rows.stop), None)
            self._pending = None


def bits(values: Tensor) -> Tensor:
    """The values as integers, so that NaN equals itself and 0 differs from -0."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
