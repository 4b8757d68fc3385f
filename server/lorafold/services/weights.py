"""`lorafold.v1.WeightsService`: looks at the weights and changes them by hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from lorafold.config import BASE
from lorafold.deployments import Deployments
from lorafold.engine.drains import Drained, Order
from lorafold.engine.loop import Engine
from lorafold.engine.weights_state import WeightsState
from lorafold.errors import InvalidField
from lorafold.exports import Exports
from lorafold.overheads import Overheads
from lorafold.services import fold_states, overhead_messages
from lorafold.services.events import duration
from lorafold.services.fields import refuse_unknown_fields
from lorafold.services.in_flight import InFlight
from lorafold.services.status import translated
from lorafold.v1 import weights_pb2 as pb
from lorafold.v1 import weights_pb2_grpc
from lorafold_adapters.errors import AdapterUnsupported
from lorafold_adapters.export import Exported, Progress
from lorafold_adapters.policy import Side

Context = grpc.aio.ServicerContext[Any, Any]


class WeightsService(weights_pb2_grpc.WeightsServiceServicer):
    """Translates; every call is answered by the engine between two steps."""

    def __init__(
        self,
        engine: Engine,
        deployments: Deployments,
        exports: Exports,
        overheads: Overheads,
        base_fingerprint: str,
        in_flight: InFlight,
    ) -> None:
        self._engine = engine
        self._in_flight = in_flight
        self._deployments = deployments
        self._exports = exports
        self._overheads = overheads
        self._base_fingerprint = base_fingerprint

    async def GetFoldState(self, request: pb.GetFoldStateRequest, context: Context) -> pb.GetFoldStateResponse:
        """What is in the weights now, and why."""
        async with translated(context):
            refuse_unknown_fields(request)
            queued = await asyncio.wrap_future(self._engine.queued())
            weights = self._engine.weights
            state, decision, transitions, costs = await self._engine.asked(
                lambda: (weights.state, weights.decision, [*weights.transitions], fold_states.costs(weights.costs))
            )
            residents = self._engine.residents
            places, lines, under_way = await self._engine.asked(
                lambda: (residents.places, [*fold_states.queued(queued, residents.here)], self._engine.under_way)
            )
            return pb.GetFoldStateResponse(
                fold_state=self._message(state),
                decision=fold_states.decision(decision, state, queued),
                transitions=[fold_states.transition(item) for item in transitions],
                costs=costs,
                queued=lines,
                residency=fold_states.residency(places, residents.limits),
                under_way=under_way,
            )

    async def MergeAdapter(self, request: pb.MergeAdapterRequest, context: Context) -> pb.MergeAdapterResponse:
        """Folds and holds."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            refuse_unknown_fields(request)
            if request.deployment in ("", BASE):
                raise InvalidField("deployment", "name a deployment with an adapter: the base has nothing to fold")
            served = self._deployments.get(request.deployment).served
            if served.facts.fold_refusal is not None:
                raise AdapterUnsupported(f"the adapter cannot be folded: {served.facts.fold_refusal}")
            done = await self._obeyed(request, context, served.facts.digest, hold=True)
            fidelity = served.folding.fidelity
            return pb.MergeAdapterResponse(
                fold_state=self._message(done.change.state),
                fold_time=duration(done.change.seconds if done.change.weight_bytes else 0.0),
                weight_bytes=done.change.weight_bytes,
                drain=fold_states.report(done),
                delta_error=None if fidelity is None else fidelity.delta_error,
            )

    async def UnmergeAdapter(self, request: pb.UnmergeAdapterRequest, context: Context) -> pb.UnmergeAdapterResponse:
        """Gives the base back."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            refuse_unknown_fields(request)
            done = await self._obeyed(request, context, None, hold=request.hold)
            return pb.UnmergeAdapterResponse(
                fold_state=self._message(done.change.state),
                restore_time=duration(done.change.seconds),
                drain=fold_states.report(done),
            )

    async def ReleaseFoldState(
        self, request: pb.ReleaseFoldStateRequest, context: Context
    ) -> pb.ReleaseFoldStateResponse:
        """The policies decide again."""
        async with translated(context):
            refuse_unknown_fields(request)
            state = await asyncio.wrap_future(self._engine.let_go())
            return pb.ReleaseFoldStateResponse(fold_state=self._message(state))

    async def _obeyed(
        self, request: pb.MergeAdapterRequest | pb.UnmergeAdapterRequest, context: Context, folded: Side, *, hold: bool
    ) -> Drained:
        """What became of the order; it is withdrawn if the caller hangs up while requests still end for it."""
        order = Order(
            folded=folded,
            hold=hold,
            mode=fold_states.drain_mode(request.drain),
            until=fold_states.until(request, context.time_remaining(), self._engine.now()),
        )
        done = self._engine.order(order)
        try:
            return await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            self._engine.withdraw(done)
            raise

    async def VerifyBase(self, request: pb.VerifyBaseRequest, context: Context) -> pb.VerifyBaseResponse:
        """Reads every weight."""
        async with translated(context):
            refuse_unknown_fields(request)
            found = await self._engine.asked(lambda: self._engine.weights.verify())
            return pb.VerifyBaseResponse(
                restored=not found.mismatched,
                tensors_checked=found.tensors,
                mismatched=found.mismatched,
                base_fingerprint=found.base_fingerprint,
            )

    async def ExportMerged(
        self, request: pb.ExportMergedRequest, context: Context
    ) -> AsyncIterator[pb.ExportMergedResponse]:
        """Writes a checkpoint; a message for each tensor, then the summary."""
        async with translated(context):
            refuse_unknown_fields(request)
            export = self._exports.export(request.deployment, request.path, request.max_shard_bytes)
            async with aclosing(export) as steps:
                async for step in steps:
                    yield export_event(step)

    async def MeasureOverhead(
        self, request: pb.MeasureOverheadRequest, context: Context
    ) -> AsyncIterator[pb.MeasureOverheadResponse]:
        """Times pairs of steps, cell by cell."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            refuse_unknown_fields(request)
            grid = await self._overheads.grid(overhead_messages.grid(request))
            async with aclosing(self._overheads.measure(grid)) as steps:
                async for step in steps:
                    yield overhead_messages.event(step)

    async def ListOverheads(self, request: pb.ListOverheadsRequest, context: Context) -> pb.ListOverheadsResponse:
        """What was found so far."""
        async with translated(context):
            refuse_unknown_fields(request)
            found = sorted(self._overheads.known.items())
            return pb.ListOverheadsResponse(overheads=[overhead_messages.overhead(*each) for _, each in found])

    def _message(self, state: WeightsState) -> pb.FoldState:
        return pb.FoldState(
            generation=state.generation,
            adapter_digest=state.folded or "",
            deployments=self._deployments.pointing_at(state.folded) if state.folded else [],
            pinned=state.pinned,
            reason=state.reason,
            undo_bytes=state.undo_bytes,
            reloads=state.reloads,
            base_fingerprint=self._base_fingerprint,
            provenance=state.provenance,
        )


def export_event(step: Progress | Exported) -> pb.ExportMergedResponse:
    """One message of an export's stream."""
    if isinstance(step, Progress):
        progress = pb.ExportProgress(
            tensors_done=step.tensors_done,
            tensors_total=step.tensors_total,
            bytes_done=step.bytes_done,
            bytes_total=step.bytes_total,
        )
        return pb.ExportMergedResponse(progress=progress)
    summary = pb.ExportSummary(
        path=str(step.folder),
        files=step.files,
        tensors=step.tensors,
        bytes=step.nbytes,
        adapter_digest=step.provenance["adapter_digest"],
        base_fingerprint=step.provenance["base"]["fingerprint"],
        delta_error=step.fidelity.delta_error,
    )
    return pb.ExportMergedResponse(exported=summary)
