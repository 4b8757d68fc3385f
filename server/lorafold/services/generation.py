"""`lorafold.v1.GenerationService`: one request or one stream at a time."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc.aio

from lorafold.config import BASE
from lorafold.deployments import Deployments
from lorafold.engine.loop import Engine
from lorafold.metrics import Metrics
from lorafold.metrics.labels import UNKNOWN
from lorafold.requests import Finished, Request
from lorafold.services import events
from lorafold.services.fields import refuse_unknown_fields, required
from lorafold.services.in_flight import InFlight
from lorafold.services.mailbox import Mailbox
from lorafold.services.prompts import RequestBuilder
from lorafold.services.status import code_and_reason, translated
from lorafold.v1 import generation_pb2 as pb
from lorafold.v1 import generation_pb2_grpc
from lorafold_adapters.errors import LorafoldError

Context = grpc.aio.ServicerContext[Any, Any]
CANCELLED = "cancelled"
"""The outcome of a request whose caller went away."""
NO_TIME = 0.1
"""Seconds that a deadline seems to be away here when it has passed for the caller, whose clock started earlier."""


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Translates; the engine does the work."""

    def __init__(
        self,
        engine: Engine,
        deployments: Deployments,
        builder: RequestBuilder,
        metrics: Metrics,
        in_flight: InFlight,
    ) -> None:
        self._engine = engine
        self._in_flight = in_flight
        self._deployments = deployments
        self._builder = builder
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """The whole answer at once."""
        response = pb.GenerateResponse()
        async with translated(context), self._answer(request, context) as answer:
            async for message in answer:
                while len(response.completions) <= message.index:
                    response.completions.add(index=len(response.completions))
                events.add(response.completions[message.index], message)
        return response

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        """The answer as it is decoded."""
        async with translated(context), self._answer(request, context) as answer:
            async for message in answer:
                yield message

    @asynccontextmanager
    async def _answer(
        self, message: pb.GenerateRequest | pb.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[AsyncIterator[pb.StreamGenerateResponse]]:
        """The messages of an answer; whoever leaves before its end cancels it. Raises EngineStopped while stopping."""
        with self._in_flight.one():
            async with aclosing(self._messages(message, context)) as messages:
                yield messages

    async def _messages(
        self, message: pb.GenerateRequest | pb.StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """Submits the request and yields its messages; leaving before all completions ended, however, cancels them."""
        name, outcome, left = UNKNOWN, CANCELLED, 0
        request_id = uuid.uuid4().hex
        inbox = Mailbox(partial(self._engine.resume, request_id))
        try:
            request = await self._request(message, request_id, context)
            name, left = request.deployment, request.n
            self._engine.submit(request, inbox.put, inbox.stalled)
            while left:
                event = await inbox.take()
                if isinstance(event, Finished):
                    left -= 1
                    self._metrics.completed(request, event)
                    outcome = outcome if left else event.reason.value
                for part in events.messages(request, event):
                    yield part
        except LorafoldError as error:
            outcome = code_and_reason(error)[1].lower()
            raise
        finally:
            if left:
                self._engine.cancel(request_id)
            self._metrics.requests.request_ended(name, why_cancelled(context) if outcome == CANCELLED else outcome)

    async def _request(
        self, message: pb.GenerateRequest | pb.StreamGenerateRequest, request_id: str, context: Context
    ) -> Request:
        self._builder.check_size(message.spec)
        refuse_unknown_fields(message)
        required(message, "spec")
        self._deployments.resolve(message.spec.deployment or BASE)
        prompt = await self._builder.tokens(message.spec)
        # Again, and no await from here to the inbox: the deployment may point elsewhere, or be gone, by now.
        target = self._deployments.resolve(message.spec.deployment or BASE)
        return self._builder.build(
            message.spec, request_id, prompt, target, self._engine.now(), context.time_remaining()
        )


def why_cancelled(context: Context) -> str:
    """Whether a caller's time was up, or it hung up before."""
    remaining = context.time_remaining()
    return "deadline_exceeded" if remaining is not None and remaining < NO_TIME else CANCELLED
