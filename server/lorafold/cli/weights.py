"""`lorafold weights`: what is folded into the base of a running server, and whether the base is intact."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from lorafold.cli.common import address_option, connected

if TYPE_CHECKING:
    from lorafold.v1.weights_pb2 import MergeAdapterRequest, UnmergeAdapterRequest

Request = TypeVar("Request", "MergeAdapterRequest", "UnmergeAdapterRequest")


@click.group()
def weights() -> None:
    """See, fold and verify the weights by hand."""


@weights.command()
@address_option
def state(address: str) -> None:
    """Show which adapter is folded, and why."""
    from lorafold.v1 import weights_pb2 as pb

    with connected(address) as client:
        show(client.stubs.weights.GetFoldState(pb.GetFoldStateRequest()))


def drain_options(command: Callable[..., None]) -> Callable[..., None]:
    """What becomes of requests in flight."""
    mode = click.option(
        "--drain",
        type=click.Choice(["wait", "park", "two_path"]),
        default="park",
        show_default=True,
        help="Requests in flight that cannot run then: finish first, wait with their KV kept, or go on unmerged.",
    )
    timeout = click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds to get it done.")
    return mode(timeout(command))


@weights.command()
@click.argument("deployment")
@drain_options
@address_option
def merge(deployment: str, drain: str, timeout: float | None, address: str) -> None:
    """Fold DEPLOYMENT's adapter and hold it; everybody else waits until 'unmerge' or 'release'.

    Takes over from another deployment that is held. If --timeout passes first, nothing is changed.
    """
    from lorafold.v1 import weights_pb2 as pb

    request = pb.MergeAdapterRequest(deployment=deployment)
    with connected(address) as client:
        show(client.stubs.weights.MergeAdapter(with_drain(request, drain, timeout)))


@weights.command()
@click.option("--hold", is_flag=True, help="Hold the base: merged deployments wait until 'release'.")
@drain_options
@address_option
def unmerge(hold: bool, drain: str, timeout: float | None, address: str) -> None:
    """Give the base back bit for bit, and the weights to the policies.

    If --timeout passes first, nothing is changed.
    """
    from lorafold.v1 import weights_pb2 as pb

    request = pb.UnmergeAdapterRequest(hold=hold)
    with connected(address) as client:
        show(client.stubs.weights.UnmergeAdapter(with_drain(request, drain, timeout)))


@weights.command()
@address_option
def release(address: str) -> None:
    """Let the policies decide again; nothing is changed now."""
    from lorafold.v1 import weights_pb2 as pb

    with connected(address) as client:
        show(client.stubs.weights.ReleaseFoldState(pb.ReleaseFoldStateRequest()))


@weights.command()
@click.pass_context
@address_option
def verify(context: click.Context, address: str) -> None:
    """Compare every weight with what was loaded; exit status 1 if one differs.

    Gives the base back for it, between two steps, and then folds again what was held.
    """
    from lorafold.v1 import weights_pb2 as pb

    with connected(address) as client:
        found = client.stubs.weights.VerifyBase(pb.VerifyBaseRequest())
    show(found)
    context.exit(0 if found.restored else 1)


def with_drain(request: Request, mode: str, timeout: float | None) -> Request:
    """The request, with what becomes of others in flight."""
    from lorafold.v1 import weights_pb2 as pb

    modes = {"wait": pb.DRAIN_MODE_WAIT, "park": pb.DRAIN_MODE_PARK, "two_path": pb.DRAIN_MODE_TWO_PATH}
    request.drain = modes[mode]
    if timeout is not None:
        request.drain_timeout.FromMicroseconds(round(timeout * 1e6))
    return request


def show(message: Message) -> None:
    """Prints a response as JSON."""
    click.echo(MessageToJson(message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True))
