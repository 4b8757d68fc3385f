"""`lorafold stamp`: writes down which base an adapter was trained on, by the base's content."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorafold.cli.common import json_option

if TYPE_CHECKING:
    from lorafold_adapters.stamp import Stamp


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", required=True, metavar="MODEL", help="What it was trained on: a folder or a hub name.")
@click.option("--force", is_flag=True, help="Replace a stamp for another base, or one that cannot be read.")
@json_option
def stamp(adapter: Path, base: str, force: bool, as_json: bool) -> None:
    """Write into the folder ADAPTER which base it was trained on.

    A server refuses a stamped adapter on any other base. Reads the whole base, on the CPU, in the dtype of its
    checkpoint; run it where the adapter was trained, with what it was trained on.
    """
    from transformers.utils import logging as transformers_logging

    from lorafold_adapters.errors import LorafoldError
    from lorafold_adapters.stamp import write_stamp

    transformers_logging.disable_progress_bar()
    try:
        made, modules = stamp_for(adapter, base, force)
        file = write_stamp(adapter, made)
    except (LorafoldError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        written = {"file": str(file), "adapter_digest": made.adapter, "base_digest": made.base, "dtype": made.dtype}
        click.echo(json.dumps({**written, "bound_modules": modules}))
        return
    click.echo(f"wrote {file}")
    click.echo(f"adapter {made.adapter[:12]} on base {made.base[:12]} ({made.name}, {made.dtype}), {modules} modules")


def stamp_for(adapter: Path, base: str, force: bool) -> "tuple[Stamp, int]":
    """The stamp, and how many modules of the base the adapter changes.

    Raises AdapterError for an adapter that does not fit or has a stamp that must not be replaced, or ModelUnsupported.
    """
    from lorafold.model import load_weights
    from lorafold_adapters import AdapterManager, read_checkpoint
    from lorafold_adapters.stamp import make_stamp, read_stamp

    checkpoint = read_checkpoint(adapter)
    before = None if force else read_stamp(adapter)
    model = load_weights(base)
    manager = AdapterManager(model)
    bound = manager.bind(checkpoint)
    if before is not None and before.base != manager.base.digest:
        raise click.ClickException(
            f"'{adapter}' has a stamp for base {before.base[:12]}… and this is {manager.base.digest[:12]}…: "
            "give --force if the stamp is wrong"
        )
    name = Path(base).resolve().name if Path(base).is_dir() else base
    return make_stamp(checkpoint, model, manager.base, name), bound.bound
