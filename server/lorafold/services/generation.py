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
from lorafold.requests import Event, Finished, Request, Started
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
        async with translated(context), aclosing(self._messages(request, context)) as answer:
            async for message in answer:
                while len(response.completions) <= message.index:
                    response.completions.add(index=len(response.completions))
                events.add(response.completions[message.index], message)
        return response

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        """The answer as it is decoded."""
        async with translated(context), aclosing(self._messages(request, context)) as answer:
            async for message in answer:
                yield message

    async def _messages(
        self, message: pb.GenerateRequest | pb.StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """Submits the request and yields its messages; leaving before all completions ended, however, cancels them."""
        name, outcome, left = "unknown", "cancelled", 0
        request_id = uuid.uuid4().hex
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            request = await self._request(message, request_id, context)
            name, left = request.deployment, request.n
            self._engine.submit(request, lambda event: loop.call_soon_threadsafe(inbox.put_nowait, event))
            while left:
                event = await inbox.get()
                if isinstance(event, Started) and event.index == 0:
                    self._metrics.first_token(event.provenance.mode, event.seconds)
                if isinstance(event, Finished):
                    left -= 1
                    outcome = outcome if left else event.reason.value
                for part in events.messages(request, event):
                    yield part
        except LorafoldError as error:
            outcome = code_and_reason(error)[1].lower()
            raise
        finally:
            if left:
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
