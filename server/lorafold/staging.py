"""Gets an adapter ready to serve: reads, checks and binds it in a worker thread, measures it, puts it on the device.

Everything else goes on meanwhile. Knows no names: `deployments.py` points them at what is staged here.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import structlog

from lorafold.config import DeploymentConfig
from lorafold.engine.loop import Engine
from lorafold.own_thread import in_background, in_own_thread
from lorafold.progress import Progress, Stage, Tell, nobody
from lorafold.recipes import Recipe, Source, folders_of
from lorafold.stamps import StampCheck
from lorafold.state import Version
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import read_checkpoint
from lorafold_adapters.errors import (
    AdapterChanged,
    AdapterCorrupt,
    AdapterUnsupported,
    BaseMismatch,
    DeltaLost,
    LorafoldError,
)
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.provenance import Source as Ingredient
from lorafold_adapters.routes import unrouted
from lorafold_adapters.stamp import Match

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
class Reading:
    """An adapter that was read, checked and bound."""

    bound: BoundAdapter
    origin: "Origin"

    @property
    def digest(self) -> str:
        """Content digest of the adapter."""
        return self.bound.digest


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where an adapter comes from."""

    source: Source
    match: Match
    """What the adapter's stamp says about the base."""
    ingredients: tuple[Ingredient, ...]
    """The adapters it is made of."""


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

    def __init__(self, manager: AdapterManager, engine: Engine, stamps: StampCheck, folder: Path) -> None:
        """`folder`: where relative paths start."""
        self._manager = manager
        self._engine = engine
        self._stamps = stamps
        self._folder = folder.absolute()
        self._reading = {urgent: asyncio.Lock() for urgent in (True, False)}
        """One adapter is read at a time, and one more that requests wait for."""
        self._loop = asyncio.get_running_loop()
        engine.residents.fetch = self.fetch

    @property
    def base(self) -> str:
        """Fingerprint of the base that adapters are checked against."""
        return self._manager.base.digest

    async def read(self, source: Source, tell: Tell = nobody, *, urgent: bool = False) -> Reading:
        """Reads, checks and binds an adapter, or each part of a composition, and compares stamps with the base.

        `urgent` if requests wait for it; otherwise it takes second place to everything else.

        Raises a subclass of AdapterError.
        """
        if not isinstance(source, Recipe):
            bound, match = await self._read_folder(source, tell, urgent)
            ingredient = Ingredient(name=Path(source).name, digest=bound.digest, kind=bound.kind)
            return Reading(bound=bound, origin=Origin(source=source, match=match, ingredients=(ingredient,)))
        parts = [await self._read_folder(part.path, tell, urgent) for part in source.parts]
        ingredients = tuple(
            Ingredient(name=Path(part.path).name, digest=bound.digest, kind=bound.kind, weight=part.weight)
            for (bound, _), part in zip(parts, source.parts, strict=True)
        )
        weighted = [(bound, part.weight) for (bound, _), part in zip(parts, source.parts, strict=True)]
        bound = await self._with_routes(await in_own_thread(self._manager.compose, weighted, source.spec))
        match = least_sure(match for _, match in parts)
        return Reading(bound=bound, origin=Origin(source=source, match=match, ingredients=ingredients))

    async def read_again(self, version: Version, tell: Tell = nobody) -> Reading:
        """Reads what was served before.

        Raises AdapterChanged if it is not there any more, BaseMismatch if it was deployed on another base and nothing
        says that it fits this one, or a subclass of AdapterError.
        """
        reading = await self._read_same(version.wanted.source, version.digest, tell)
        if reading.origin.match is Match.UNSTAMPED and version.base != self.base:
            raise BaseMismatch(
                f"it was deployed on base {version.base[:12]}, this server holds {self.base[:12]}, and it has no stamp "
                "that says it fits: stamp it, or update the deployment"
            )
        return reading

    async def again(self, staged: Staged) -> Reading:
        """The same adapter, from whatever memory it is in, or read again.

        Raises AdapterChanged if it is not there any more, or a subclass of AdapterError.
        """
        digest = staged.facts.digest
        bound = await asyncio.wrap_future(self._engine.call(lambda: self._engine.residents.bound(digest)))
        if bound is not None:
            return Reading(bound=bound, origin=staged.origin)
        return await self._read_same(staged.origin.source, digest)

    def fetch(self, digest: str, source: Source, bound: BoundAdapter | None) -> None:
        """Implements `engine.residents.Fetch`."""
        asyncio.run_coroutine_threadsafe(self._fetch(digest, source, bound), self._loop)

    async def _fetch(self, digest: str, source: Source, bound: BoundAdapter | None) -> None:
        try:
            if bound is None:
                reading = await self._read_same(source, digest, urgent=True)
                bound = await in_own_thread(self._manager.pinned, reading.bound)
            here, staged = bound, await in_own_thread(self._manager.stage, bound)
            await asyncio.wrap_future(self._engine.call(lambda: self._engine.residents.arrived(here, staged)))
        except Exception as error:
            told = error if isinstance(error, LorafoldError) else AdapterCorrupt(f"the adapter cannot be read: {error}")
            log.error("adapter cannot be brought", adapter=digest, reason=str(error), exc_info=told is not error)
            self._engine.call(lambda: self._engine.lost(digest, told))

    async def _read_same(self, source: Source, digest: str, tell: Tell = nobody, *, urgent: bool = False) -> Reading:
        """Raises AdapterChanged if it has another digest, or a subclass of AdapterError."""
        reading = await self.read(source, tell, urgent=urgent)
        if reading.digest != digest:
            where = ", ".join(f"'{folder}'" for folder in folders_of(source))
            raise AdapterChanged(
                f"what was served is adapter {digest[:12]}, {where} now makes {reading.digest[:12]}: put it back, or "
                "update the deployment to take what is there"
            )
        return reading

    async def put(self, reading: Reading, wanted: DeploymentConfig, tell: Tell = nobody) -> Staged:
        """Measures what a fold keeps of the adapter if the policy folds it, and loads it; `release` ends that.

        Raises AdapterUnsupported or DeltaLost if the policy demands a mode that the adapter does not have, or
        DeviceFull.
        """
        bound, policy = reading.bound, wanted.policy
        if policy is PolicyKind.UNMERGED and bound.route_refusal is not None:
            raise AdapterUnsupported(f"the adapter cannot run unmerged: {bound.route_refusal}; deploy it merged")
        folding = Folding(refusal=bound.fold_refusal)
        if policy is not PolicyKind.UNMERGED:
            folding = await self._measured(bound, tell)
        if folding.refusal is not None and (policy is PolicyKind.MERGED or bound.route_refusal is not None):
            await asyncio.wrap_future(self._engine.call(lambda: self._manager.gate.check(bound)))
        elif folding.refusal is not None and policy is PolicyKind.AUTO:
            log.warning("adapter stays unmerged", adapter=bound.digest, reason=folding.refusal)
        await self._acquire(reading, pinned=wanted.pinned)
        tell(Progress(stage=Stage.STAGED))
        facts = Facts.of(bound, self._manager.extra_bytes(bound))
        return Staged(facts=facts, origin=reading.origin, folding=folding, pinned=wanted.pinned)

    async def _acquire(self, reading: Reading, *, pinned: bool) -> None:
        """Stages the adapter beside the engine's steps, unless it is there; the rest is done between two of them."""
        source, residents, bound, staged = reading.origin.source, self._engine.residents, reading.bound, None
        if not await asyncio.wrap_future(self._engine.call(lambda: residents.here(bound.digest))):
            bound = await in_background(self._manager.pinned, bound)
            staged = await in_background(self._manager.stage, bound)
        work = partial(residents.acquire, bound, source, staged=staged, pinned=pinned)
        await asyncio.wrap_future(self._engine.call(work))

    def release(self, staged: Staged) -> None:
        """One deployment less points at it: it leaves the device when its last request has ended."""
        digest, pinned = staged.facts.digest, staged.pinned
        self._engine.call(lambda: self._engine.residents.release(digest, pinned=pinned))

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

    async def _read_folder(self, path: str, tell: Tell, urgent: bool) -> tuple[BoundAdapter, Match]:
        async with self._reading[urgent]:
            return await (in_own_thread if urgent else in_background)(self._read_now, path, tell)

    def _read_now(self, path: str, tell: Tell) -> tuple[BoundAdapter, Match]:
        checkpoint = read_checkpoint(self._folder / path)
        self._loop.call_soon_threadsafe(tell, Progress(stage=Stage.READ))
        bound = self._manager.bind(checkpoint)
        match = self._stamps.check(checkpoint)
        self._loop.call_soon_threadsafe(tell, Progress(stage=Stage.BOUND))
        return bound, match

    async def _with_routes(self, bound: BoundAdapter) -> BoundAdapter:
        """Module by module between steps of the engine, which would stand still for all of them."""
        routes = {}
        for module in unrouted(bound):
            work = partial(self._manager.route, bound, module)
            routes[module] = await asyncio.wrap_future(self._engine.call(work))
        return self._manager.with_routes(bound, routes)

    async def _measured(self, bound: BoundAdapter, tell: Tell) -> Folding:
        """What a fold would keep; measured parameter by parameter, with steps of the engine between them."""
        if bound.fold_refusal is not None:
            return Folding(refusal=bound.fold_refusal)
        gate, done = self._manager.gate, 0
        parameters = gate.measure(bound)

        def measure_one() -> Folding | None:
            return None if next(parameters, None) is not None else self._folding(bound)

        while (folding := await asyncio.wrap_future(self._engine.call(measure_one))) is None:
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


def least_sure(matches: Iterable[Match]) -> Match:
    """What the stamps of several adapters say together."""
    found = set(matches)
    return next(match for match in (Match.UNSTAMPED, Match.OTHER_DTYPE, Match.SAME) if match in found)
