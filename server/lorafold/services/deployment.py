"""`lorafold.v1.DeploymentService`: names and what they point at."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc.aio

from lorafold.advice import advise
from lorafold.changes import Changes
from lorafold.deployments import Deployments
from lorafold.evidence import Witness
from lorafold.progress import Progress
from lorafold.services.deployment_messages import POLICIES, change_of, message_of, progress_of, wanted_of
from lorafold.services.fields import refuse_unknown_fields, required
from lorafold.services.in_flight import InFlight
from lorafold.services.status import translated
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import deployment_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE, MAX_PAGE = 50, 1000


class DeploymentService(deployment_pb2_grpc.DeploymentServiceServicer):
    """Translates. Changes go on to their end even if the caller hangs up."""

    def __init__(self, deployments: Deployments, changes: Changes, witness: Witness, in_flight: InFlight) -> None:
        self._witness = witness
        self._in_flight = in_flight
        self._deployments = deployments
        self._changes = changes
        self._tasks: set[asyncio.Task[Any]] = set()

    async def CreateDeployment(
        self, request: pb.CreateDeploymentRequest, context: Context
    ) -> pb.CreateDeploymentResponse:
        """Callable once this returns."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            refuse_unknown_fields(request)
            required(request, "deployment")
            made = await asyncio.shield(self._kept(self._changes.create(wanted_of(request.deployment))))
            return pb.CreateDeploymentResponse(deployment=message_of(made))

    async def GetDeployment(self, request: pb.GetDeploymentRequest, context: Context) -> pb.GetDeploymentResponse:
        """One by its name."""
        async with translated(context):
            refuse_unknown_fields(request)
            return pb.GetDeploymentResponse(deployment=message_of(self._deployments.get(request.name)))

    async def ListDeployments(self, request: pb.ListDeploymentsRequest, context: Context) -> pb.ListDeploymentsResponse:
        """A page of them in the order of their names; a page token is the last name of the page before."""
        async with translated(context):
            refuse_unknown_fields(request)
            size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
            rest = [item for item in self._deployments.all() if item.name > request.page_token]
            more = rest[size - 1].name if len(rest) > size else ""
            return pb.ListDeploymentsResponse(
                deployments=[message_of(item) for item in rest[:size]], next_page_token=more
            )

    async def UpdateDeployment(
        self, request: pb.UpdateDeploymentRequest, context: Context
    ) -> pb.UpdateDeploymentResponse:
        """The hot swap."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            change = change_of(request)
            update = self._changes.update(request.deployment.name, change, request.deployment.etag)
            return pb.UpdateDeploymentResponse(deployment=message_of(await asyncio.shield(self._kept(update))))

    async def StreamUpdateDeployment(
        self, request: pb.StreamUpdateDeploymentRequest, context: Context
    ) -> AsyncIterator[pb.StreamUpdateDeploymentResponse]:
        """The hot swap, and what becomes of the adapter of before; a message for each step."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            change = change_of(request)
            steps: asyncio.Queue[Progress | None] = asyncio.Queue()
            update = self._changes.update(
                request.deployment.name, change, request.deployment.etag, steps.put_nowait, drain=True
            )
            task = self._kept(update)
            task.add_done_callback(lambda _: steps.put_nowait(None))
            while (step := await steps.get()) is not None:
                yield pb.StreamUpdateDeploymentResponse(progress=progress_of(step))
            yield pb.StreamUpdateDeploymentResponse(deployment=message_of(task.result()))

    async def RollbackDeployment(
        self, request: pb.RollbackDeploymentRequest, context: Context
    ) -> pb.RollbackDeploymentResponse:
        """Back to what was before the last update."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            refuse_unknown_fields(request)
            made = await asyncio.shield(self._kept(self._changes.rollback(request.name, request.etag)))
            return pb.RollbackDeploymentResponse(deployment=message_of(made))

    async def DeleteDeployment(
        self, request: pb.DeleteDeploymentRequest, context: Context
    ) -> pb.DeleteDeploymentResponse:
        """Requests in flight finish first."""
        async with translated(context):
            self._in_flight.refuse_once_closed()
            refuse_unknown_fields(request)
            await asyncio.shield(self._kept(self._changes.delete(request.name, request.etag)))
            return pb.DeleteDeploymentResponse()

    async def AdviseDeployment(
        self, request: pb.AdviseDeploymentRequest, context: Context
    ) -> pb.AdviseDeploymentResponse:
        """Which policy would suit it."""
        async with translated(context):
            refuse_unknown_fields(request)
            known = await self._witness.evidence(request.name)
            advice = advise(known)
            return pb.AdviseDeploymentResponse(
                policy=POLICIES[advice.policy],
                lines=advice.lines,
                moments=known.moments,
                alone=known.alone,
                overhead_ratio=None if known.overhead is None else known.overhead.ratio,
            )

    def _kept(self, change: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """A task that goes on if nobody waits for it any more."""
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # Seen, even if nobody waits.
        return task
