"""The kinds of undo, by the name that a configuration gives them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from lorafold_adapters.copies import Copies, MappedFiles, host_copy
from lorafold_adapters.records import Records
from lorafold_adapters.undo import Undo

UndoKind = Literal["auto", "checkpoint", "host", "device", "sparse"]


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
