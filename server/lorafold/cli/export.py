"""`lorafold export`: base and adapter as one plain transformers checkpoint, made here or by a running server."""

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorafold.cli.common import DTYPES, address_option, connected, json_option
from lorafold.cli.compositions import check_source, source_options, split_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorafold_adapters import AdapterManager
    from lorafold_adapters.checkpoint import Checkpoint
    from lorafold_adapters.compose import Composition
    from lorafold_adapters.export import Exported, Order

Step = tuple[int, int] | dict[str, Any]
"""Bytes done and in all; or, at the end, what was written."""
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}


class Size(click.ParamType):  # type: ignore[type-arg]  # Generic only in newer versions.
    """A number of bytes: 4GB, 500MB, 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, at least one."""
        text = str(value).strip().lower()
        number, unit = (text[:-2], UNITS[text[-2:]]) if text[-2:] in UNITS else (text, 1)
        try:
            size = int(float(number) * unit)
        except (ValueError, OverflowError):
            size = 0
        if size < 1:
            self.fail(f"{value!r} is no size: write 4GB, 500MB or a number of bytes", param, ctx)
        return size


@click.command()
@click.option("--out", required=True, type=click.Path(), help="The folder to write; on a server, inside its own.")
@click.option("--base", metavar="MODEL", help="A folder or a hub name.")
@source_options
@click.option("--deployment", help="Let the server at --address export this deployment of its own instead.")
@click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="Of the weights; auto is the base's own.")
@click.option("--shard-size", type=Size(), default="4GB", show_default=True, help="What one file holds at most.")
@json_option
@address_option
def export(
    out: str,
    base: str | None,
    deployment: str | None,
    dtype: str,
    shard_size: int,
    as_json: bool,
    address: str,
    **source: Any,
) -> None:
    """Write a model with an adapter in it: what AutoModelForCausalLM.from_pretrained(OUT) loads.

    Give --base and --adapter, or --compose, to make it here, on the CPU; or --deployment to have a server make it,
    on its own disk.
    OUT appears whole or not at all; lorafold.json in it says what it was made from.
    """
    check_source(source)
    parts = parts_of(source)
    if deployment is not None and (base, parts, dtype) == (None, [], "auto"):
        steps = export_there(deployment, out, shard_size, address)
    elif deployment is None and base is not None and parts:
        steps = export_here(base, parts, source, Path(out), dtype, shard_size)
    else:
        raise click.UsageError("give either --base with --adapter or --compose, or --deployment without --dtype")
    done = followed(steps)
    if as_json:
        click.echo(json.dumps(done))
        return
    files = f"{len(done['files'])} file{'s' if len(done['files']) > 1 else ''}"
    click.echo(f"wrote {done['path']}: {done['tensors']} tensors, {done['bytes']:,} bytes in {files}")
    click.echo(
        f"adapter {done['adapter_digest'][:12]} on base {done['base_fingerprint'][:12]}, "
        f"delta error {done['delta_error']:.2g}"
    )


def parts_of(source: Mapping[str, Any]) -> list[tuple[Path, float]]:
    """The folders that --adapter or --part name, and their weights."""
    if source["adapter"] is not None:
        return [(Path(source["adapter"]), 1.0)]
    split = [split_part(part) for part in source["parts"]]
    return [(Path(folder), 1.0 if weight is None else weight) for folder, weight in split]


def export_here(
    base: str, parts: list[tuple[Path, float]], source: Mapping[str, Any], out: Path, dtype: str, shard_size: int
) -> Generator[Step, None, None]:
    """Loads the base and writes. Raises ClickException with what is wrong."""
    from transformers.utils import logging as transformers_logging

    from lorafold.model import load_weights
    from lorafold_adapters import AdapterManager, read_checkpoint
    from lorafold_adapters.compose import Composition
    from lorafold_adapters.errors import LorafoldError
    from lorafold_adapters.export import Progress, export_merged, free_place

    transformers_logging.disable_progress_bar()
    try:
        free_place(out)
        spec = None
        if source["compose"] is not None:
            spec = Composition(method=source["compose"], **{key: source[key] for key in ("density", "seed", "rank")})
        checkpoints = [(read_checkpoint(folder), weight) for folder, weight in parts]
        manager = AdapterManager(load_weights(base, dtype))
        order = ordered(manager, checkpoints, spec, base, out, shard_size)
        for step in export_merged(manager, order):
            yield (step.bytes_done, step.bytes_total) if isinstance(step, Progress) else summary(step)
    except (LorafoldError, OSError) as error:
        raise click.ClickException(str(error)) from error


def ordered(
    manager: "AdapterManager",
    parts: "list[tuple[Checkpoint, float]]",
    spec: "Composition | None",
    base: str,
    out: Path,
    shard_size: int,
) -> "Order":
    """What to write, once every part was checked against the base. Raises LorafoldError."""
    from lorafold.model import base_name
    from lorafold_adapters.export import Order
    from lorafold_adapters.provenance import Source, origin
    from lorafold_adapters.stamp import check_stamp

    for checkpoint, _ in parts:
        check_stamp(checkpoint, manager.base, manager.base_as)
    bound = [(manager.bind(checkpoint), weight) for checkpoint, weight in parts]
    sources = [
        Source(name=checkpoint.path.resolve().name, digest=checkpoint.digest, kind=checkpoint.kind, weight=weight)
        for checkpoint, weight in parts
    ]
    return Order(
        bound=bound[0][0] if spec is None else manager.compose(bound, spec),
        out=out,
        origin=origin(base_name(base), sources, spec),
        tokenizer=tokenizer_of(base),
        shard_size=shard_size,
    )


def export_there(deployment: str, out: str, shard_size: int, address: str) -> Generator[Step, None, None]:
    """Has a server write."""
    from lorafold.v1 import weights_pb2 as pb

    request = pb.ExportMergedRequest(deployment=deployment, path=out, max_shard_bytes=shard_size)
    with connected(address) as client:
        for message in client.stubs.weights.ExportMerged(request):
            if message.HasField("progress"):
                yield message.progress.bytes_done, message.progress.bytes_total
                continue
            done = message.exported
            yield {
                "path": done.path,
                "files": list(done.files),
                "tensors": done.tensors,
                "bytes": done.bytes,
                "adapter_digest": done.adapter_digest,
                "base_fingerprint": done.base_fingerprint,
                "delta_error": done.delta_error,
            }


def followed(steps: Generator[Step, None, None]) -> dict[str, Any]:
    """Shows how far it is, if somebody looks; the summary, which comes last."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    done: dict[str, Any] = {}
    with closing(steps), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("exporting", total=None)
        for step in steps:
            if isinstance(step, dict):
                done = step
            else:
                bar.update(task, completed=step[0], total=step[1])
    return done


def summary(done: "Exported") -> dict[str, Any]:
    """What was written, for JSON."""
    return {
        "path": str(done.folder),
        "files": list(done.files),
        "tensors": done.tensors,
        "bytes": done.nbytes,
        "adapter_digest": done.provenance["adapter_digest"],
        "base_fingerprint": done.provenance["base"]["fingerprint"],
        "delta_error": done.fidelity.delta_error,
    }


def tokenizer_of(base: str) -> "PreTrainedTokenizerBase | None":
    """The base's tokenizer; None, with a word about it, if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception as error:
        click.echo(f"the export has no tokenizer, as '{base}' has none that can be read: {error}", err=True)
        return None
