"""`lorafold weights`: what is folded into the base of a running server, and whether the base is intact."""

import click
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from lorafold.cli.common import address_option, connected


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


@weights.command()
@click.argument("deployment")
@address_option
def merge(deployment: str, address: str) -> None:
    """Fold DEPLOYMENT's adapter and hold it; everybody else waits until 'unmerge'.

    Takes over from another deployment that is held.
    """
    from lorafold.v1 import weights_pb2 as pb

    with connected(address) as client:
        show(client.stubs.weights.MergeAdapter(pb.MergeAdapterRequest(deployment=deployment)))


@weights.command()
@address_option
def unmerge(address: str) -> None:
    """Give the base back bit for bit, and the weights to the policies."""
    from lorafold.v1 import weights_pb2 as pb

    with connected(address) as client:
        show(client.stubs.weights.UnmergeAdapter(pb.UnmergeAdapterRequest()))


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


def show(message: Message) -> None:
    """Prints a response as JSON."""
    click.echo(MessageToJson(message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True))
