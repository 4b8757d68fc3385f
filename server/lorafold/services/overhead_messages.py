"""The messages of `WeightsService` about what the unmerged path costs."""

from google.protobuf.timestamp_pb2 import Timestamp

from lorafold.errors import InvalidField
from lorafold.overheads import Grid, Step
from lorafold.services.events import duration
from lorafold.v1 import weights_pb2 as pb
from lorafold_adapters.overhead import FEWEST, Cell, Overhead

MOST_PAIRS = 1000


def grid(request: pb.MeasureOverheadRequest) -> Grid:
    """What is asked for. Raises InvalidField."""
    asked = Grid()
    precision = request.precision if request.HasField("precision") else asked.precision
    if not 0 < precision < 1:
        raise InvalidField("precision", f"is {precision:g}: give a share between 0 and 1")
    pairs = request.max_pairs if request.HasField("max_pairs") else asked.max_pairs
    if not FEWEST <= pairs <= MOST_PAIRS:
        raise InvalidField("max_pairs", f"is {pairs}: give {FEWEST} to {MOST_PAIRS}; fewer say nothing of the interval")
    return Grid(
        batches=distinct(request.batches),
        adapters=distinct(request.adapters),
        ranks=distinct(request.ranks),
        contexts=distinct(request.contexts),
        precision=precision,
        max_pairs=pairs,
    )


def distinct(values: object) -> list[int]:
    """Each once, in the order in which they were given."""
    return list(dict.fromkeys(values))  # type: ignore[call-overload]


def event(step: Step) -> pb.MeasureOverheadResponse:
    """One message of a measurement's stream."""
    if step.refusal:
        refusal = pb.OverheadRefusal(cell=cell_message(step.cell), reason=step.refusal)
        return pb.MeasureOverheadResponse(refusal=refusal)
    if step.overhead is not None:
        return pb.MeasureOverheadResponse(overhead=overhead(step.overhead, step.at))
    progress = pb.OverheadProgress(
        cell=cell_message(step.cell), cells_done=step.done, cells_total=step.total, pairs=step.pairs
    )
    return pb.MeasureOverheadResponse(progress=progress)


def cell_message(cell: Cell) -> pb.OverheadCell:
    """One kind of step."""
    return pb.OverheadCell(batch=cell.batch, adapters=cell.adapters, rank=cell.rank, context=cell.context)


def overhead(found: Overhead, at: float) -> pb.Overhead:
    """What was found, and when, in seconds since the epoch."""
    return pb.Overhead(
        cell=cell_message(found.cell),
        pairs=found.pairs,
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        plain_step=duration(found.plain_seconds),
        unmerged_step=duration(found.unmerged_seconds),
        measured_at=Timestamp(seconds=int(at), nanos=int(at % 1 * 1e9)),
    )
