"""The messages of `WeightsService` about what is folded, why, and what became of requests in flight."""

from collections.abc import Callable, Iterable, Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from lorafold.engine.drains import Drained, DrainMode
from lorafold.engine.residents import Places
from lorafold.engine.weights_state import Transition, WeightsState
from lorafold.errors import InvalidField
from lorafold.services.events import duration
from lorafold.v1 import weights_pb2 as pb
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import Cause, Group, Plan, Side
from lorafold_adapters.residency import UNLIMITED, Limits

LONGEST_TIMEOUT = 366 * 86400.0
"""Seconds."""
MODES: dict[int, DrainMode] = {
    pb.DRAIN_MODE_UNSPECIFIED: DrainMode.PARK,
    pb.DRAIN_MODE_WAIT: DrainMode.WAIT,
    pb.DRAIN_MODE_PARK: DrainMode.PARK,
    pb.DRAIN_MODE_TWO_PATH: DrainMode.TWO_PATH,
}


def drain_mode(value: int) -> DrainMode:
    """Raises InvalidField."""
    if value not in MODES:
        raise InvalidField("drain", f"{value} is no drain mode: use one of the DrainMode enum")
    return MODES[value]


def until(
    request: pb.MergeAdapterRequest | pb.UnmergeAdapterRequest, remaining: float | None, now: float
) -> float | None:
    """When the call is given up, on the engine's clock. Raises InvalidField."""
    limits = [] if remaining is None else [remaining]
    if request.HasField("drain_timeout"):
        timeout = request.drain_timeout.seconds + request.drain_timeout.nanos / 1e9
        if not 0 < timeout <= LONGEST_TIMEOUT or abs(request.drain_timeout.nanos) >= 10**9:
            raise InvalidField(
                "drain_timeout", f"is {timeout:g} s: give a positive time of at most a year, or leave it out"
            )
        limits.append(timeout)
    return now + min(limits) if limits else None


def decision(plan: Plan | None, state: WeightsState, groups: Mapping[Group, tuple[int, int]]) -> pb.Decision | None:
    """What the policy wants; None while nobody has requests, and while an operator holds the weights."""
    if plan is None or not groups or state.pinned or plan.cause is Cause.HELD:
        return None
    return pb.Decision(adapter_digest=plan.folded or "", cause=plan.cause.value, reason=plan.reason)


def transition(item: Transition) -> pb.Transition:
    """One change of the weights."""
    time = Timestamp()
    time.FromDatetime(item.time)
    return pb.Transition(
        time=time,
        generation=item.generation,
        adapter_digest=item.folded or "",
        reason=item.reason,
        took=duration(item.seconds),
    )


def costs(known: Costs) -> pb.Costs:
    """What was measured so far."""
    plain, two_path = known.plain.measured(), known.two_path.measured()
    return pb.Costs(
        fold=duration(known.fold_seconds),
        restore=duration(known.restore_seconds),
        swap=duration(known.swap_seconds),
        steps=[
            pb.StepCost(rows=rows, plain=duration(plain.get(rows, 0.0)), two_path=duration(two_path.get(rows, 0.0)))
            for rows in sorted(plain.keys() | two_path.keys())
        ],
    )


def queued(groups: Mapping[Group, tuple[int, int]], here: Callable[[Side], bool]) -> Iterable[pb.QueuedRows]:
    """Completions by adapter and policy; `here`: whether an adapter is on the device."""
    for (adapter, kind), (running, waiting) in groups.items():
        yield pb.QueuedRows(
            adapter_digest=adapter or "", policy=kind.value, running=running, waiting=waiting, on_device=here(adapter)
        )


def residency(places: Places, limits: Limits) -> pb.Residency:
    """Where adapters are."""
    return pb.Residency(
        known=places.known,
        on_device=places.on_device,
        device_slots=limits.device_slots,
        device_bytes=places.device_bytes,
        device_budget_bytes=0 if limits.device_bytes == UNLIMITED else limits.device_bytes,
        on_host=places.on_host,
        host_bytes=places.host_bytes,
        host_budget_bytes=limits.host_bytes,
        fetches=places.fetches,
    )


def report(done: Drained) -> pb.DrainReport:
    """What became of completions in flight."""
    return pb.DrainReport(drained=done.drained, parked=done.parked, two_path=done.unmerged, took=duration(done.seconds))
