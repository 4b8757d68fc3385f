"""A client for a lorafold server, blocking (`Client`) and asyncio (`AsyncClient`). Needs no torch.

>>> with Client("127.0.0.1:50051") as client:
...     for text in client.stream("some text", deployment="upper"):
...         print(text, end="", flush=True)
...     print(client.generate("some text", deployment="upper").text)
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from lorafold.v1 import deployment_pb2_grpc, generation_pb2_grpc, weights_pb2_grpc
from lorafold.v1 import generation_pb2 as pb

Messages = Iterable[tuple[str, str]]
Prompt = str | Sequence[int] | Messages


class ServerError(Exception):
    """The server refused a call, or could not be reached."""

    def __init__(self, code: str, message: str, reason: str = "", field: str = "") -> None:
        super().__init__(message)
        self.code = code
        """gRPC status, e.g. `NOT_FOUND`."""
        self.reason = reason
        """For programs, e.g. `DEPLOYMENT_NOT_FOUND`; empty if the server did not say."""
        self.field = field
        """The request field that is wrong, if one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What may be said about a request beside its prompt; None leaves it to the server."""

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    timeout: float | None = None
    """Seconds; the server stops working on the request then."""


@dataclass(slots=True)
class Answer:
    """A generated text and what generated it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    started: pb.Started = field(default_factory=pb.Started)
    finished: pb.Finished = field(default_factory=pb.Finished)

    @property
    def finish_reason(self) -> str:
        """`end_of_sequence`, `stop_string` or `length`."""
        return pb.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_").lower()

    @property
    def mode(self) -> str:
        """By which path the last token was computed: `base`, `merged` or `unmerged`."""
        return pb.Mode.Name(self.finished.answered_by.mode).removeprefix("MODE_").lower()

    def add(self, event: pb.StreamGenerateResponse) -> str:
        """Takes one message of a stream; returns the text in it."""
        if event.HasField("started"):
            self.started = event.started
        elif event.HasField("finished"):
            self.finished = event.finished
        self.text += event.delta.text
        self.token_ids.extend(event.delta.token_ids)
        self.logprobs.extend(event.delta.logprobs)
        return event.delta.text


class Stubs:
    """What both clients have: one stub per service, for every call of `lorafold.v1`."""

    def __init__(self, channel: Any) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.deployments = deployment_pb2_grpc.DeploymentServiceStub(channel)
        self.weights = weights_pb2_grpc.WeightsServiceStub(channel)


class TextStream:
    """An answer that is still being generated: iterate over its text, then read `answer`."""

    def __init__(self, call: Any) -> None:
        self.answer = Answer()
        """Grows while the stream is read; complete after its end."""
        self._call = call

    def __iter__(self) -> Iterator[str]:
        with translated():
            for event in self._call:
                yield self.answer.add(event)

    async def __aiter__(self) -> AsyncIterator[str]:
        with translated():
            async for event in self._call:
                yield self.answer.add(event)

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


def make_spec(prompt: Prompt, deployment: str, options: Options) -> pb.GenerationSpec:
    """The request message. Raises ServerError for values that no message can hold."""
    try:
        stop = [options.stop] if isinstance(options.stop, str) else options.stop
        spec = pb.GenerationSpec(deployment=deployment, stop=stop)
        if isinstance(prompt, str):
            spec.text = prompt
        else:
            for item in prompt:
                if isinstance(item, tuple):
                    role, content = item
                    spec.messages.add(role=role, content=content)
                else:
                    spec.token_ids.append(item)
        for name in ("max_tokens", "logprobs"):
            if (value := getattr(options, name)) is not None:
                setattr(spec, name, value)
        for name in ("temperature", "top_k", "top_p", "seed"):
            if (value := getattr(options, name)) is not None:
                setattr(spec.sampling, name, value)
    except (ValueError, TypeError) as error:
        raise ServerError("INVALID_ARGUMENT", f"the request cannot be written: {error}") from error
    return spec


def whole(response: pb.GenerateResponse) -> Answer:
    """A unary answer."""
    return Answer(
        text=response.text,
        token_ids=list(response.token_ids),
        logprobs=list(response.logprobs),
        started=response.started,
        finished=response.finished,
    )


@contextmanager
def translated() -> Iterator[None]:
    """Inside, a failed call raises ServerError."""
    try:
        yield
    except grpc.RpcError as error:
        raise server_error(error) from error


def server_error(error: Any) -> ServerError:
    """A failed call as ServerError, with what the server's details say."""
    reason = field_name = ""
    for detail in status_details(error):
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field_name = bad.field_violations[0].field
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not reason:
        message = "the timeout passed before the answer was complete: allow more time or fewer max_tokens; "
        message += "'lorafold weights state' says if a held adapter keeps others waiting"
    return ServerError(error.code().name, message, reason, field_name)


def status_details(error: Any) -> Sequence[Any]:
    """The details of the `google.rpc.Status` of a failed call; none if it has no readable one."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
