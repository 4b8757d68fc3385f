"""`lorafold.v1.GenerationService`: one request or one stream at a time."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from lorafold.config import BASE
from lorafold.deployments import Deployments
from lorafold.engine.loop import Engine
from lorafold.metrics import Metrics
from lorafold.requests import Delta, Event, Failed, Finished, Request, Started
from lorafold.services import events
from lorafold.services.fields import refuse_unknown_fields, required
from lorafold.services.prompts import RequestBuilder
from lorafold.services.status import code_and_reason, translated
from lorafold.v1 import generation_pb2 as pb
from lorafold.v1 import generation_pb2_grpc
from lorafold_adapters.errors import LorafoldError

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Translates; the engine does the work."""

    def __init__(self, engine: Engine, deployments: Deployments, builder: RequestBuilder, metrics: Metrics) -> None:
        self._engine = engine
        self._deployments = deployments
        self._builder = builder
        self._metrics = metrics

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """The whole answer at once."""
        response = pb.GenerateResponse()
        async with translated(context), aclosing(self._events(request, context)) as answer:
            async for asked, event in answer:
                if isinstance(event, Started):
                    response.started.CopyFrom(events.started(asked, event))
                elif isinstance(event, Delta):
                    part = events.delta(event)
                    response.text += part.text
                    response.token_ids.extend(part.token_ids)
                    response.logprobs.extend(part.logprobs)
                elif isinstance(event, Finished):
                    response.text += event.text
                    response.finished.CopyFrom(events.finished(asked, event))
        return response

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        """The answer as it is decoded."""
        async with translated(context), aclosing(self._events(request, context)) as answer:
            async for asked, event in answer:
                if isinstance(event, Started):
                    yield pb.StreamGenerateResponse(started=events.started(asked, event))
                elif isinstance(event, Delta):
                    yield pb.StreamGenerateResponse(delta=events.delta(event))
                elif isinstance(event, Finished):
                    if event.text:
                        yield pb.StreamGenerateResponse(delta=pb.Delta(text=event.text))
                    yield pb.StreamGenerateResponse(finished=events.finished(asked, event))

    async def _events(
        self, message: pb.GenerateRequest | pb.StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[tuple[Request, Event], None]:
        """Submits the request and yields its events; leaving early, for whatever reason, cancels it."""
        name, outcome = "unknown", "cancelled"
        request_id = uuid.uuid4().hex
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            request = await self._request(message, request_id, context)
            name = request.deployment
            self._engine.submit(request, lambda event: loop.call_soon_threadsafe(inbox.put_nowait, event))
            async for event in until_last(inbox):
                if isinstance(event, Started):
                    self._metrics.first_token(event.provenance.mode, event.seconds)
                if isinstance(event, Finished):
                    outcome = event.reason.value
                yield request, event
        except LorafoldError as error:
            outcome = code_and_reason(error)[1].lower()
            raise
        finally:
            if outcome == "cancelled":
                self._engine.cancel(request_id)
            self._metrics.request_ended(name, outcome)

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


async def until_last(inbox: "asyncio.Queue[Event]") -> AsyncIterator[Event]:
    """The events of one request. Raises the error of a failed one."""
    while True:
        event = await inbox.get()
        if isinstance(event, Failed):
            raise event.error
        yield event
        if isinstance(event, Finished):
            return
