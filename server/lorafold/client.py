"""A client for a lorafold server, blocking (`Client`) and asyncio (`AsyncClient`). Needs no torch.

>>> with Client("127.0.0.1:50051") as client:
...     for text in client.stream("some text", deployment="upper"):
...         print(text, end="", flush=True)
...     print(client.generate("some text", deployment="upper").text)
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from lorafold.client_errors import ServerError, translated
from lorafold.client_messages import Answer, Options, Prompt, make_spec, whole
from lorafold.v1 import deployment_pb2_grpc, generation_pb2_grpc, weights_pb2_grpc
from lorafold.v1 import generation_pb2 as pb

__all__ = ["Answer", "AsyncClient", "Client", "Options", "ServerError", "TextStream", "translated"]


class Stubs:
    """What both clients have: one stub per service, for every call of `lorafold.v1`."""

    def __init__(self, channel: Any) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.deployments = deployment_pb2_grpc.DeploymentServiceStub(channel)
        self.weights = weights_pb2_grpc.WeightsServiceStub(channel)


class TextStream:
    """An answer that is still being generated: iterate over its text, then read `answer`.

    With `n` above 1 the text is that of the first completion; `pieces` has everybody's.
    """

    def __init__(self, call: Any) -> None:
        self.answer = Answer()
        """Grows while the stream is read; complete after its end."""
        self._call = call

    def __iter__(self) -> Iterator[str]:
        return (text for index, text in self.pieces() if index == 0)

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(index of the completion, more of its text), as they come."""
        with translated():
            for event in self._call:
                yield self._add(event)

    async def __aiter__(self) -> AsyncIterator[str]:
        async for index, text in self.apieces():
            if index == 0:
                yield text

    async def apieces(self) -> AsyncIterator[tuple[int, str]]:
        """`pieces`, for `async for`."""
        with translated():
            async for event in self._call:
                yield self._add(event)

    def _add(self, event: pb.StreamGenerateResponse) -> tuple[int, str]:
        others = self.answer.others
        others.extend(Answer(index=index) for index in range(len(others) + 1, event.index + 1))
        return event.index, [self.answer, *others][event.index].add(event)

    def cancel(self) -> None:
        """Tells the server to stop working on it."""
        self._call.cancel()


class Client:
    """Blocking client. Every method raises ServerError."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self._channel = grpc.insecure_channel(address)
        self.stubs = Stubs(self._channel)
        """For the calls that have no method here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def generate(self, prompt: Prompt, *, deployment: str = "base", **options: Any) -> Answer:
        """The whole answer. `prompt` is text, token ids, or (role, content) messages; `options` as in `Options`."""
        given = Options(**options)
        request = pb.GenerateRequest(spec=make_spec(prompt, deployment, given))
        with translated():
            return whole(self.stubs.generation.Generate(request, timeout=given.timeout))

    def stream(self, prompt: Prompt, *, deployment: str = "base", **options: Any) -> TextStream:
        """The answer piece by piece."""
        given = Options(**options)
        request = pb.StreamGenerateRequest(spec=make_spec(prompt, deployment, given))
        return TextStream(self.stubs.generation.StreamGenerate(request, timeout=given.timeout))


class AsyncClient:
    """asyncio client. Every method raises ServerError."""

    def __init__(self, address: str = "127.0.0.1:50051") -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self.stubs: Any = Stubs(self._channel)
        """For the calls that have no method here; each returns an awaitable."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def generate(self, prompt: Prompt, *, deployment: str = "base", **options: Any) -> Answer:
        """The whole answer; as `Client.generate`."""
        given = Options(**options)
        request = pb.GenerateRequest(spec=make_spec(prompt, deployment, given))
        with translated():
            return whole(await self.stubs.generation.Generate(request, timeout=given.timeout))

    def stream(self, prompt: Prompt, *, deployment: str = "base", **options: Any) -> TextStream:
        """The answer piece by piece, for `async for`."""
        given = Options(**options)
        request = pb.StreamGenerateRequest(spec=make_spec(prompt, deployment, given))
        return TextStream(self.stubs.generation.StreamGenerate(request, timeout=given.timeout))
