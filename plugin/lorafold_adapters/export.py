"""Writes a base with an adapter folded into it as a plain transformers checkpoint, tensor by tensor.

Holds the base and one tensor at a time. Nothing is folded for it, so other adapters may be served meanwhile: whoever
owns the model says how to read it (`run`). The folder appears whole or not at all.
"""

import copy
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint_names import Group, plan_names, saved_as
from lorafold_adapters.errors import ExportExists, ExportFailed, FoldFailed, LorafoldError
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.manager import AdapterManager
from lorafold_adapters.merged import Merged
from lorafold_adapters.provenance import PROVENANCE_FILE, Origin, provenance, provenance_text
from lorafold_adapters.shards import Shard, ShardWriter, plan_shards, sync, sync_folder

SHARD_SIZE = 4 * 10**9
"""Bytes of tensors that one file holds at most, unless one tensor is larger."""
T = TypeVar("T")


class Run(Protocol):
    """Runs a function where the model may be read."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """Returns what the function returns, and raises what it raises."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far an export is."""

    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A finished export."""

    folder: Path
    files: tuple[str, ...]
    """The ones that hold tensors."""
    tensors: int
    nbytes: int
    """Of the tensors."""
    fidelity: Fidelity
    provenance: Mapping[str, Any]
    """What its lorafold.json says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What to write, and where to."""

    bound: BoundAdapter
    out: Path
    origin: Origin = field(default_factory=Origin)
    """For the provenance only."""
    tokenizer: PreTrainedTokenizerBase | None = None
    shard_size: int = SHARD_SIZE
    """Bytes of tensors in one file."""


def here(function: Callable[[], T], /) -> T:
    """A `Run` for whoever owns the model."""
    return function()


def export_merged(manager: AdapterManager, order: Order, run: Run = here) -> Generator[Progress | Exported, None, None]:
    """Writes the checkpoint, a tensor at each step; the last item is what was written. Closing it early removes all.

    Raises ExportExists, ExportFailed, ExportUnsupported, or what a fold of the adapter would raise.
    """
    out = free_place(order.out)
    fidelity = measured(manager, order.bound, run)
    merged = run(lambda: manager.merged(order.bound))
    groups = run(lambda: plan_names(manager.model, merged.live))
    shards = plan_shards({name: like for group in groups for name, like in group.saved.items()}, order.shard_size)
    facts = provenance(order.bound, manager.base, order.origin, fidelity)
    with written_whole(out, sum(shard.nbytes for shard in shards)) as partial:
        writer = ShardWriter(partial, shards)
        yield from write_tensors(manager.model, merged, groups, writer, run)
        write_configs(manager.model, order.tokenizer, partial)
        (partial / PROVENANCE_FILE).write_text(provenance_text(facts), encoding="utf-8")
    yield finished(out, shards, fidelity, facts)


def finished(out: Path, shards: list[Shard], fidelity: Fidelity, facts: Mapping[str, Any]) -> Exported:
    """The summary."""
    return Exported(
        folder=out,
        files=tuple(shard.file for shard in shards),
        tensors=sum(len(shard.offsets) for shard in shards),
        nbytes=sum(shard.nbytes for shard in shards),
        fidelity=fidelity,
        provenance=facts,
    )


def free_place(out: Path) -> Path:
    """The folder to write, links resolved. Raises ExportExists if something is there, ExportFailed for no path."""
    try:
        out = out.resolve()
        taken = (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir()))
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportFailed(f"'{out}' cannot be exported into ({error}): choose another folder") from error
    if taken:
        raise ExportExists(f"'{out}' is there already and not empty: choose another folder, or remove it")
    return out


def measured(manager: AdapterManager, bound: BoundAdapter, run: Run) -> Fidelity:
    """The adapter's fidelity, measured parameter by parameter. Raises whatever would refuse its fold."""
    if bound.fold_refusal is None:
        steps = manager.gate.measure(bound)
        try:
            while run(lambda: next(steps, None)) is not None:
                pass
        except LorafoldError:
            raise
        except Exception as error:
            raise FoldFailed(f"adapter {bound.digest[:12]} cannot be folded, nothing was changed: {error}") from error
    run(lambda: manager.gate.check(bound))
    return run(lambda: manager.gate.fidelity(bound))


def write_tensors(
    model: PreTrainedModel, merged: Merged, groups: list[Group], writer: ShardWriter, run: Run
) -> Iterator[Progress]:
    """Reads and writes one group after the other."""
    tensors_total = sum(len(group.names) for group in groups)
    bytes_total = sum(like.nbytes for group in groups for like in group.saved.values())
    tensors_done = bytes_done = 0
    for group in groups:
        values: dict[str, Tensor] = {}
        for name in group.names:
            values[name] = run(lambda name=name: merged.read(name))  # type: ignore[misc]
        for name, tensor in saved_as(model, values).items():
            writer.write(name, tensor)
            bytes_done += tensor.nbytes
        tensors_done += len(group.names)
        yield Progress(
            tensors_done=tensors_done, tensors_total=tensors_total, bytes_done=bytes_done, bytes_total=bytes_total
        )
    writer.finish()


def write_configs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Everything beside the tensors that `from_pretrained` reads."""
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        # Not its save_pretrained, which refuses settings that many models on the hub have.
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def written_whole(out: Path, nbytes: int) -> Iterator[Path]:
    """Inside, a folder beside `out` that becomes `out` at the end, or disappears. Raises ExportFailed."""
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out.parent).free) < nbytes:
            raise ExportFailed(f"'{out}' needs {nbytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f}: make room")
        partial.mkdir()
        yield partial
        sync_folder(partial)
        partial.rename(out)
        sync(out.parent)
    except LorafoldError:
        raise
    except Exception as error:
        raise ExportFailed(f"'{out}' could not be written, nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
