"""Gets an adapter that was read ready to serve: measures it and puts it on the device, while everything else goes on.

Knows no names: `deployments.py` points them at what is staged here.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

import structlog

from lorafold.deployment_config import DeploymentConfig
from lorafold.engine.loop import Engine
from lorafold.metrics import Metrics
from lorafold.own_thread import in_background, in_own_thread
from lorafold.progress import Progress, Stage, Tell, nobody
from lorafold.reading import Origin, Reader, Reading
from lorafold.recipes import Source
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterCorrupt, AdapterUnsupported, DeltaLost, LorafoldError
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.policy import PolicyKind

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """What folding an adapter would come to."""

    fidelity: Fidelity | None = None
    """None if it was not measured, as nothing folds the adapter."""
    refusal: str | None = None
    """Why the adapter is not folded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a bound adapter, without its tensors."""

    digest: str
    kind: str
    """For people, e.g. `LORA+dora`."""
    targeted: int
    """How many modules its files have tensors for."""
    bound: int
    """How many of those have a place in the base."""
    fold_refusal: str | None
    route_refusal: str | None
    """Why it cannot be folded, or run beside the weights; None if it can."""
    route_error: float | None
    """How far it is off beside the weights; None if it is exact there."""
    extra_bytes: int
    """What folding it takes beside a quantised base."""

    @classmethod
    def of(cls, bound: BoundAdapter, extra_bytes: int) -> Self:
        """Everything but the tensors."""
        return cls(
            digest=bound.digest,
            kind=bound.kind,
            targeted=bound.targeted,
            bound=bound.bound,
            fold_refusal=bound.fold_refusal,
            route_refusal=bound.route_refusal,
            route_error=bound.route_error,
            extra_bytes=extra_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """An adapter that is ready to serve. Its tensors come and go (`engine.residents`)."""

    facts: Facts
    origin: Origin
    folding: Folding
    pinned: bool

    def path(self, policy: PolicyKind) -> PolicyKind:
        """The policy that its requests follow: an adapter that has only one mode is served in that."""
        if policy is PolicyKind.AUTO and self.folding.refusal is not None:
            return PolicyKind.UNMERGED
        if policy is PolicyKind.AUTO and self.facts.route_refusal is not None:
            return PolicyKind.MERGED
        return policy


class Staging:
    """Readies the adapters of one server."""

    def __init__(self, manager: AdapterManager, engine: Engine, reader: Reader, metrics: Metrics) -> None:
        self.reader = reader
        self._metrics = metrics
        self._manager = manager
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        engine.residents.fetch = self.fetch

    async def again(self, staged: Staged) -> Reading:
        """The same adapter, from whatever memory it is in, or read again.

        Raises AdapterChanged if it is not there any more, or a subclass of AdapterError.
        """
        digest = staged.facts.digest
        bound = await self._engine.asked(lambda: self._engine.residents.bound(digest))
        if bound is not None:
            return Reading(bound=bound, origin=staged.origin)
        return await self.reader.read_same(staged.origin.source, digest)

    def fetch(self, digest: str, source: Source, bound: BoundAdapter | None) -> None:
        """Implements `engine.residents.Fetch`."""
        asyncio.run_coroutine_threadsafe(self._fetch(digest, source, bound), self._loop)

    async def _fetch(self, digest: str, source: Source, bound: BoundAdapter | None) -> None:
        begun, from_disk = self._loop.time(), bound is None
        try:
            if bound is None:
                reading = await self.reader.read_same(source, digest, urgent=True)
                bound = await in_own_thread(self._manager.pinned, reading.bound)
            here, staged = bound, await in_own_thread(self._manager.stage, bound)
            await self._engine.asked(lambda: self._engine.residents.arrived(here, staged))
        except Exception as error:
            told = error if isinstance(error, LorafoldError) else AdapterCorrupt(f"the adapter cannot be read: {error}")
            log.error("adapter cannot be brought", adapter=digest, reason=str(error), exc_info=told is not error)
            self._engine.call(lambda: self._engine.lost(digest, told))
        self._metrics.adapters.fetched(self._loop.time() - begun, from_disk=from_disk)

    async def put(
        self, reading: Reading, wanted: DeploymentConfig, tell: Tell = nobody, *, instead_of: Iterable[Staged] = ()
    ) -> Staged:
        """Measures what a fold keeps of the adapter if the policy folds it, and loads it; `release` ends that.

        `instead_of`: what is released once this is in force. Raises AdapterUnsupported or DeltaLost if the policy
        demands a mode that the adapter does not have, or DeviceFull.
        """
        bound, policy = reading.bound, wanted.policy
        if policy is PolicyKind.UNMERGED and bound.route_refusal is not None:
            raise AdapterUnsupported(f"the adapter cannot run unmerged: {bound.route_refusal}; deploy it merged")
        folding = Folding(refusal=bound.fold_refusal)
        if policy is not PolicyKind.UNMERGED:
            folding = await self._measured(bound, tell)
        if folding.refusal is not None and (policy is PolicyKind.MERGED or bound.route_refusal is not None):
            await self._engine.asked(lambda: self._manager.gate.check(bound))
        elif folding.refusal is not None and policy is PolicyKind.AUTO:
            log.warning("adapter stays unmerged", adapter=bound.digest, reason=folding.refusal)
        await self._acquire(reading, pinned=wanted.pinned, instead_of=instead_of)
        tell(Progress(stage=Stage.STAGED))
        facts = Facts.of(bound, self._manager.extra_bytes(bound))
        return Staged(facts=facts, origin=reading.origin, folding=folding, pinned=wanted.pinned)

    async def _acquire(self, reading: Reading, *, pinned: bool, instead_of: Iterable[Staged]) -> None:
        """Stages the adapter beside the engine's steps, unless it is there; the rest is done between two of them."""
        source, residents, bound, staged = reading.origin.source, self._engine.residents, reading.bound, None
        if not await self._engine.asked(lambda: residents.here(bound.digest)):
            bound = await in_background(self._manager.pinned, bound)
            staged = await in_background(self._manager.stage, bound)
        leaves = [before.facts.digest for before in instead_of if before.pinned]
        work = partial(residents.acquire, bound, source, staged=staged, pinned=pinned, instead_of=leaves)
        await self._engine.asked(work)

    def release(self, staged: Staged) -> None:
        """One deployment less points at it: it leaves the device when its last request has ended."""
        digest, source, pinned = staged.facts.digest, staged.origin.source, staged.pinned
        self._engine.call(lambda: self._engine.residents.release(digest, source, pinned=pinned))

    async def departing(self, digest: str) -> AsyncGenerator[int, None]:
        """How many requests still run on an adapter, now and whenever that changes; ends once its memory is free.

        Ends at once if a deployment points at it.
        """
        loop = asyncio.get_running_loop()
        counts: asyncio.Queue[int | None] = asyncio.Queue()

        def tell(count: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # The loop was closed: nobody waits any more.
                loop.call_soon_threadsafe(counts.put_nowait, count)

        self._engine.watch(digest, tell)
        while (count := await counts.get()) is not None:
            yield count

    async def _measured(self, bound: BoundAdapter, tell: Tell) -> Folding:
        """What a fold would keep; measured parameter by parameter, with steps of the engine between them."""
        if bound.fold_refusal is not None:
            return Folding(refusal=bound.fold_refusal)
        gate, done = self._manager.gate, 0
        parameters = gate.measure(bound)

        def measure_one() -> Folding | None:
            return None if next(parameters, None) is not None else self._folding(bound)

        while (folding := await self._engine.asked(measure_one)) is None:
            done += 1
            tell(Progress(stage=Stage.MEASURED, done=done, total=gate.parameters(bound)))
        return folding

    def _folding(self, bound: BoundAdapter) -> Folding:
        """Of an adapter that was measured. On the engine's thread."""
        fidelity = self._manager.gate.fidelity(bound)
        try:
            self._manager.gate.check(bound)
        except DeltaLost as error:
            return Folding(fidelity=fidelity, refusal=str(error))
        return Folding(fidelity=fidelity)
