"""Safetensors files whose tensors are written one at a time, in any order: sizes are known before values are.

The library's own writer wants all tensors of a file in memory at once. Knows nothing of models.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's names of the dtypes that checkpoints of language models have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file: which tensors, and where each lies in it."""

    file: str
    header: bytes
    """What the file begins with: length and table of contents."""
    offsets: Mapping[str, int]
    """Where each tensor's bytes begin, from the start of the file."""
    nbytes: int
    """Of the tensors alone."""


def plan_shards(tensors: Mapping[str, Tensor], shard_size: int) -> list[Shard]:
    """Packs tensors, given by dtype and shape alone, into files of at most `shard_size` bytes of tensors, in order.

    A tensor that is larger than that gets a file of its own.
    """
    packs: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if packs[-1] and used + tensor.nbytes > shard_size:
            packs.append({})
            used = 0
        packs[-1][name] = tensor
        used += tensor.nbytes
    total = len(packs)
    names = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    return [
        make_shard(name, pack) for name, pack in zip(names if total > 1 else ["model.safetensors"], packs, strict=True)
    ]


def make_shard(file: str, tensors: Mapping[str, Tensor]) -> Shard:
    """Lays tensors out, those of wide elements first, so that each begins at a multiple of its element's size."""
    contents: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        tensor = tensors[name]
        starts[name], end = end, end + tensor.nbytes
        contents[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    table = json.dumps(contents, separators=(",", ":")).encode()
    table += b" " * (-len(table) % 8)
    header = len(table).to_bytes(8, "little") + table
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file=file, header=header, offsets=offsets, nbytes=end)


class ShardWriter:
    """The files of one checkpoint in one folder, while their tensors arrive."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        """Makes the files, at their full size. Raises OSError."""
        self._folder = folder
        self._shards = shards
        self._of = {name: shard for shard in shards for name in shard.offsets}
        self._missing = set(self._of)
        for shard in shards:
            with (folder / shard.file).open("xb") as handle:
                handle.write(shard.header)
                handle.truncate(len(shard.header) + shard.nbytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts the values of one tensor, which lies on the CPU, where they belong. Raises OSError."""
        shard = self._of[name]
        self._missing.remove(name)
        with (self._folder / shard.file).open("r+b") as handle:
            handle.seek(shard.offsets[name])
            handle.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Writes the index, if there is more than one file. Raises OSError."""
        assert not self._missing, f"never written: {sorted(self._missing)[:3]}"
        if len(self._shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in self._shards)},
            "weight_map": {name: shard.file for name, shard in sorted(self._of.items())},
        }
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Returns when everything in `folder` is on the disk. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
