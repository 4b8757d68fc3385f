"""What gRPC servers are usually counted by: calls and messages by service and method, under the names that
go-grpc-prometheus gave them. The packages for Python's asyncio are not kept up.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry, Counter, Histogram

from lorafold.metrics.labels import LATENCY_BUCKETS

BY = ["grpc_type", "grpc_service", "grpc_method"]
Labels = tuple[str, str, str]
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Behaviour = Callable[[Any, Context], Any]
AS_GO_SPELLS = {"OK": "OK", "CANCELLED": "Canceled"}
CODES = {code.value[0]: AS_GO_SPELLS.get(code.name, code.name.title().replace("_", "")) for code in grpc.StatusCode}


class CallMetrics:
    """Calls by how they ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("grpc_server_started", "Calls that began.", BY, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls that ended.", [*BY, "grpc_code"], registry=registry)
        self._received = Counter("grpc_server_msg_received", "Messages from clients.", BY, registry=registry)
        self._sent = Counter("grpc_server_msg_sent", "Messages to clients.", BY, registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "From begin to end of a call.",
            BY,
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )

    @contextmanager
    def call(self, labels: Labels, context: Context) -> Iterator[Callable[[], None]]:
        """Around one call with one message from the client; gives what to call for each message to it."""
        self._started.labels(*labels).inc()
        self._received.labels(*labels).inc()
        start, code = time.perf_counter(), "OK"
        try:
            yield self._sent.labels(*labels).inc
        except (asyncio.CancelledError, GeneratorExit):
            code = "Canceled"
            raise
        except BaseException:
            code = "Unknown"
            raise
        finally:
            told = context.code()
            self._handled.labels(*labels, spelled(told) if told else code).inc()
            self._seconds.labels(*labels).observe(time.perf_counter() - start)


class CallCounter(grpc.aio.ServerInterceptor):
    """Counts the calls of methods that take one message; those of others, reflection, it leaves alone."""

    def __init__(self, metrics: CallMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        kind, make = ("unary", grpc.unary_unary_rpc_method_handler)
        behaviour: Any = handler.unary_unary
        if handler.response_streaming:
            kind, make = ("server_stream", grpc.unary_stream_rpc_method_handler)
            behaviour = handler.unary_stream
        _, service, method = str(handler_call_details.method).split("/", 2)
        counted = (self._stream if inspect.isasyncgenfunction(behaviour) else self._unary)(
            behaviour, (kind, service, method)
        )
        return make(counted, handler.request_deserializer, handler.response_serializer)

    def _unary(self, behaviour: Behaviour, labels: Labels) -> Behaviour:
        async def counted(request: Any, context: Context) -> Any:
            with self._metrics.call(labels, context) as sent:
                response = await behaviour(request, context)
                sent()
                return response

        return counted

    def _stream(self, behaviour: Behaviour, labels: Labels) -> Behaviour:
        async def counted(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._metrics.call(labels, context) as sent:
                async with aclosing(behaviour(request, context)) as messages:
                    async for message in messages:
                        sent()
                        yield message

        return counted


def spelled(code: grpc.StatusCode | int) -> str:
    """As Go spells it: `InvalidArgument`."""
    return CODES.get(code.value[0] if isinstance(code, grpc.StatusCode) else code, "Unknown")
