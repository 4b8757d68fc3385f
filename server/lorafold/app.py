"""Puts the parts of a server on the network: services, health, reflection, metrics, and a graceful stop."""

import asyncio
import socket
import time
from collections.abc import Callable

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorafold.changes import Changes
from lorafold.config import Config, state_path
from lorafold.declared import bring_up
from lorafold.errors import ConfigError
from lorafold.evidence import Witness
from lorafold.exports import Exports
from lorafold.metrics.calls import CallCounter
from lorafold.own_thread import in_own_thread
from lorafold.pages import serve_pages
from lorafold.parts import SERVICES, Parts, Say, load_parts, set_health
from lorafold.recipes import folders_of
from lorafold.reconcile import reconcile
from lorafold.services.deployment import DeploymentService
from lorafold.services.generation import GenerationService
from lorafold.services.in_flight import InFlight
from lorafold.services.prompts import RequestBuilder
from lorafold.services.weights import WeightsService
from lorafold.state import State
from lorafold.state_file import StateFile
from lorafold.v1 import deployment_pb2_grpc, generation_pb2_grpc, weights_pb2_grpc
from lorafold_adapters.checkpoint import read_options
from lorafold_adapters.errors import AdapterError

log = structlog.get_logger(__name__)
PENDING, PATIENCE = 1_000_000, 3600
"""Calls that may wait for Python to look at them, and for how many seconds: gRPC cancels what is beyond (at 1000, and
after 30 s, unless told otherwise), and nobody would know why.
"""
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", PENDING),
    ("grpc.server.max_pending_requests_hard_limit", PENDING),
    ("grpc.server_max_unrequested_time_in_server", PATIENCE),
)
LAST_WORDS = 1.0
"""Seconds in which calls may still be told why they end."""


class App:
    """One running server, on the event loop that it was started on."""

    def __init__(self, parts: Parts, server: grpc.aio.Server, in_flight: InFlight) -> None:
        self.parts = parts
        self._in_flight = in_flight
        self.address = ""
        """Where gRPC listens, with the port that was really taken."""
        self.metrics_address = ""
        """Where Prometheus may ask."""
        self._server = server
        self._health = parts.health
        self._stop_metrics: Callable[[], None] = lambda: None
        self._told: float | None = None
        """When it was first told to stop."""
        self._watch = asyncio.create_task(self._watch_engine())
        every = parts.config.probe.every_minutes
        self._probing = None if every is None else asyncio.create_task(parts.overheads.in_idle_moments(60 * every))

    async def listen(self) -> None:
        """Opens the ports. Raises ConfigError if one cannot be had."""
        server = self.parts.config.server
        host = server.address.rpartition(":")[0]
        try:
            self.metrics_address, self._stop_metrics = serve_pages(server.metrics_address, self.parts.metrics.registry)
            self.address = f"{host}:{self._server.add_insecure_port(server.address)}"
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot listen on {server.address} and {server.metrics_address}: {error}") from error
        await self._server.start()

    async def wait_for_death(self) -> BaseException | None:
        """Returns when the engine has ended: None if it was told to, or else what killed it."""
        return await asyncio.shield(self.parts.died)

    async def stop(self, grace: float | None = None) -> None:
        """Takes no more requests, lets those in flight finish for `grace` seconds, then ends everything.

        May be called again, with less grace, while it runs.
        """
        grace = self.parts.config.server.grace_seconds if grace is None else grace
        self._told = time.monotonic() if self._told is None else self._told
        until = time.monotonic() + grace
        self._in_flight.close()
        if self._probing is not None:
            self._probing.cancel()
        await self._health.enter_graceful_shutdown()
        self.parts.engine.wind_down()
        if not await self._in_flight.emptied(grace):
            after = round(time.monotonic() - self._told, 2)
            log.warning("requests are cut off", requests=len(self._in_flight), after_seconds=after)
            self.parts.engine.fail_all(
                f"the server stopped before the answer was complete, {after:g} s after it was told"
            )
        await self._server.stop(max(until - time.monotonic(), LAST_WORDS))
        await in_own_thread(self.parts.engine.stop)
        await self.parts.deployments.close()
        await self._watch
        self._stop_metrics()

    async def _watch_engine(self) -> None:
        await asyncio.shield(self.parts.died)
        await self._health.enter_graceful_shutdown()


async def start_app(config: Config, say: Say = lambda _: None) -> App:
    """Loads everything and opens the port when the server can answer; `say` is told what is happening, for people.

    Raises ConfigError, ModelUnsupported or a subclass of AdapterError.
    """
    file = StateFile(state_path(config))
    try:
        return await start_from(file, config, say)
    except BaseException:
        file.close()
        raise


async def start_from(file: StateFile, config: Config, say: Say) -> App:
    """The same with the deployments that `file` remembers."""
    state = file.read()
    refuse_cheap_mistakes(config, state)
    parts = await load_parts(config, file, say)
    parts.engine.start()
    app: App | None = None
    try:
        start = time.perf_counter()
        await bring_up(parts.deployments, state, config.deployments)
        say_deployed(parts, say, time.perf_counter() - start)
        in_flight = InFlight()
        app = App(parts, make_server(parts, in_flight), in_flight)
        await set_health(parts.health, True)
        await app.listen()
    except BaseException:
        await (in_own_thread(parts.engine.stop) if app is None else app.stop(0))
        raise
    return app


def refuse_cheap_mistakes(config: Config, state: State) -> None:
    """What would otherwise be found after minutes of loading. Raises ConfigError."""
    for key in ("address", "metrics_address"):
        host, _, port = getattr(config.server, key).rpartition(":")
        try:
            with socket.create_server((host.strip("[]"), int(port))):
                pass
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} (server.{key}): {error.strerror or error}") from error
    for wanted, _ in reconcile(state, config.deployments).followed:
        try:
            for folder in folders_of(wanted.source):
                read_options(config.folder / folder)
        except AdapterError as error:
            raise ConfigError(f"deployment '{wanted.name}': {error}") from error


def say_deployed(parts: Parts, say: Say, seconds: float) -> None:
    """Tells people what is served, and how long it took to get it ready."""
    found = parts.deployments.all()
    if found:
        say(f"read and measured the adapters of {len(found)} deployments in {seconds:.1f} s")
    for made in found:
        if made.staged is None:
            say(f"kept {made.name}, but it is not served: {made.refusal}")
            continue
        facts = made.staged.facts
        say(
            f"deployed {made.name}: {made.wanted.policy.value}, {facts.kind}, adapter {made.digest[:12]}, "
            f"bound {facts.bound} of {facts.targeted} modules, base: {made.staged.origin.match}"
        )
        if facts.route_error:
            say(f"  beside the weights it is off by {facts.route_error:.3g} of its delta")
        if extra := facts.extra_bytes:
            say(f"  folding it takes {extra / 1e6:,.1f} MB beside the quantised base")


def make_server(parts: Parts, in_flight: InFlight) -> grpc.aio.Server:
    """A gRPC server with every service on it, not listening yet."""
    server = grpc.aio.server(options=OPTIONS, interceptors=[CallCounter(parts.metrics.calls)])
    builder = RequestBuilder(parts.base, parts.config.engine)
    generation = GenerationService(parts.engine, parts.deployments, builder, parts.metrics, in_flight)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
    witness = Witness(parts.deployments, parts.engine, parts.overheads)
    names = DeploymentService(parts.deployments, Changes(parts.deployments), witness, in_flight)
    deployment_pb2_grpc.add_DeploymentServiceServicer_to_server(names, server)
    exports = Exports(parts.manager, parts.engine, parts.deployments, parts.base.tokenizer, parts.config)
    weights = WeightsService(
        parts.engine, parts.deployments, exports, parts.overheads, parts.manager.base.digest, in_flight
    )
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights, server)
    health_pb2_grpc.add_HealthServicer_to_server(parts.health, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server
