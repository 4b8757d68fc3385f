"""`lorafold bench`: what serving costs on a running server, with its own model, adapters and hardware."""

from typing import TYPE_CHECKING

import click
from google.protobuf.json_format import MessageToJson

from lorafold.cli.common import address_option, connected, json_option
from lorafold.cli.status import ms

if TYPE_CHECKING:
    from lorafold.v1.weights_pb2 import MeasureOverheadResponse, Overhead, OverheadCell


class Numbers(click.ParamType[list[int]]):
    """Several numbers."""

    name = "n,n,.."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """`1,8,32`."""
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers, such as 1,8,32", param, ctx)


@click.group()
def bench() -> None:
    """Measure a running server."""


@bench.command()
@click.option("--batches", type=Numbers(), default=[], help="Rows of a step; 1, 8 and the server's most unless given.")
@click.option("--adapters", type=Numbers(), default=[], help="Distinct adapters in it; 1 and 8 unless given.")
@click.option("--ranks", type=Numbers(), default=[], help="Those that are deployed, or 16, unless given.")
@click.option("--contexts", type=Numbers(), default=[], help="Tokens before the step's own; 128 unless given.")
@click.option("--precision", type=float, help="How narrow an interval ends a cell; 0.04 of the ratio unless given.")
@click.option("--max-pairs", type=int, help="How many pairs end it; 200 unless given.")
@json_option
@address_option
def overhead(
    batches: list[int],
    adapters: list[int],
    ranks: list[int],
    contexts: list[int],
    precision: float | None,
    max_pairs: int | None,
    as_json: bool,
    address: str,
) -> None:
    """Measure what the unmerged path costs: the same decode step with low-rank paths and without, in turn.

    Requests go on meanwhile; where there are some, it takes its time.
    """
    from lorafold.v1 import weights_pb2 as pb

    request = pb.MeasureOverheadRequest(batches=batches, adapters=adapters, ranks=ranks, contexts=contexts)
    if precision is not None:
        request.precision = precision
    if max_pairs is not None:
        request.max_pairs = max_pairs
    refused = 0
    with connected(address) as client:
        for message in client.stubs.weights.MeasureOverhead(request):
            tell(message, as_json)
            refused += message.HasField("refusal")
    if refused:
        raise click.ClickException(f"{counted(refused, 'combination')} could not be measured")


def tell(message: "MeasureOverheadResponse", as_json: bool) -> None:
    """One line on stdout for what is done, on stderr for how far it is."""
    if as_json:
        click.echo(MessageToJson(message, indent=None, preserving_proto_field_name=True))
    elif message.HasField("overhead"):
        click.echo(line_of(message.overhead))
    elif message.HasField("refusal"):
        click.echo(f"{cell_in_words(message.refusal.cell)}: not measured: {message.refusal.reason}")
    elif message.HasField("progress"):
        far = message.progress
        click.echo(
            f"cell {far.cells_done + 1} of {far.cells_total}, {cell_in_words(far.cell)}: {far.pairs} pairs", err=True
        )


def line_of(found: "Overhead") -> str:
    """One finding."""
    return (
        f"{cell_in_words(found.cell)}: unmerged over merged {found.ratio:.3f} "
        f"[{found.low:.3f}, {found.high:.3f}], {ms(found.plain_step)} and {ms(found.unmerged_step)}, "
        f"{found.pairs} pairs"
    )


def cell_in_words(cell: "OverheadCell") -> str:
    """For people."""
    return (
        f"{counted(cell.batch, 'row')}, {counted(cell.adapters, 'adapter')} of rank {cell.rank}, "
        f"{cell.context} tokens before"
    )


def counted(count: int, what: str) -> str:
    """`1 row`, `8 rows`."""
    return f"{count} {what}{'s' * (count != 1)}"
