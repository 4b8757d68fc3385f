"""What the client commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lorafold.client import Client

address_option = click.option(
    "--address",
    "--server",
    "address",
    default="127.0.0.1:50051",
    envvar="LORAFOLD_ADDRESS",
    show_default=True,
    show_envvar=True,
    help="Where the server listens.",
)
DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


@contextmanager
def connected(address: str) -> "Iterator[Client]":
    """A client; what the server says is wrong becomes one sentence."""
    from lorafold.client import Client, ServerError, translated

    with Client(address) as client:
        try:
            with translated():
                yield client
        except ServerError as error:
            if error.code == "UNAVAILABLE" and "connect" in str(error):
                raise click.ClickException(
                    f"no server answers at {address}: start one with 'lorafold serve'"
                ) from error
            raise click.ClickException(str(error)) from error
