"""Gets an adapter ready to serve: reads, checks and binds it in a worker thread, measures it, puts it on the device.

Everything else goes on meanwhile. Knows no names: `deployments.py` points them at what is staged here.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from lorafold.engine.loop import Engine
from lorafold.own_thread import in_own_thread
from lorafold.progress import Progress, Stage, Tell, nobody
from lorafold.recipes import Recipe, Source, folders_of
from lorafold.stamps import StampCheck
from lorafold.state import Version
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import read_checkpoint
from lorafold_adapters.errors import AdapterChanged, AdapterUnsupported, BaseMismatch, DeltaLost
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
class Reading:
    """An adapter that was read, checked and bound."""

    bound: BoundAdapter
    match: Match
    """What the adapter's stamp says about the base."""
    ingredients: tuple[Ingredient, ...]
    """The adapters it is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """An adapter on the device, ready to serve."""

    reading: Reading
    folding: Folding

    @property
    def bound(self) -> BoundAdapter:
        """The adapter."""
        return self.reading.bound

    def path(self, policy: PolicyKind) -> PolicyKind:
        """The policy that its requests follow: an adapter that has only one mode is served in that."""
        if policy is PolicyKind.AUTO and self.folding.refusal is not None:
            return PolicyKind.UNMERGED
        if policy is PolicyKind.AUTO and self.bound.route_refusal is not None:
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
        self._binding = asyncio.Lock()

    @property
    def base(self) -> str:
        """Fingerprint of the base that adapters are checked against."""
        return self._manager.base.digest

    async def read(self, source: Source, tell: Tell = nobody) -> Reading:
        """Reads, checks and binds an adapter, or each part of a composition, and compares stamps with the base.

        Raises a subclass of AdapterError.
        """
        if not isinstance(source, Recipe):
            bound, match = await self._read_folder(source, tell)
            ingredient = Ingredient(name=Path(source).name, digest=bound.digest, kind=bound.kind)
            return Reading(bound=bound, match=match, ingredients=(ingredient,))
        parts = [await self._read_folder(part.path, tell) for part in source.parts]
        ingredients = tuple(
            Ingredient(name=Path(part.path).name, digest=bound.digest, kind=bound.kind, weight=part.weight)
            for (bound, _), part in zip(parts, source.parts, strict=True)
        )
        weighted = [(bound, part.weight) for (bound, _), part in zip(parts, source.parts, strict=True)]
        bound = await self._with_routes(await in_own_thread(self._manager.compose, weighted, source.spec))
        return Reading(bound=bound, match=least_sure(match for _, match in parts), ingredients=ingredients)

    async def read_again(self, version: Version, tell: Tell = nobody) -> Reading:
        """Reads what was served before.

        Raises AdapterChanged if it is not there any more, BaseMismatch if it was deployed on another base and nothing
        says that it fits this one, or a subclass of AdapterError.
        """
        reading = await self.read(version.wanted.source, tell)
        if reading.bound.digest != version.digest:
            where = ", ".join(f"'{folder}'" for folder in folders_of(version.wanted.source))
            raise AdapterChanged(
                f"what was served is adapter {version.digest[:12]}, {where} now makes {reading.bound.digest[:12]}: put "
                "it back, or update the deployment to take what is there"
            )
        if reading.match is Match.UNSTAMPED and version.base != self.base:
            raise BaseMismatch(
                f"it was deployed on base {version.base[:12]}, this server holds {self.base[:12]}, and it has no stamp "
                "that says it fits: stamp it, or update the deployment"
            )
        return reading

    async def put(self, reading: Reading, policy: PolicyKind, tell: Tell = nobody) -> Staged:
        """Measures what a fold keeps of the adapter if the policy folds it, and loads it; `release` ends that.

        Raises AdapterUnsupported or DeltaLost if the policy demands a mode that the adapter does not have.
        """
        bound = reading.bound
        if policy is PolicyKind.UNMERGED and bound.route_refusal is not None:
            raise AdapterUnsupported(f"the adapter cannot run unmerged: {bound.route_refusal}; deploy it merged")
        folding = Folding(refusal=bound.fold_refusal)
        if policy is not PolicyKind.UNMERGED:
            folding = await self._measured(bound, tell)
        if folding.refusal is not None and (policy is PolicyKind.MERGED or bound.route_refusal is not None):
            await asyncio.wrap_future(self._engine.call(lambda: self._manager.gate.check(bound)))
        elif folding.refusal is not None and policy is PolicyKind.AUTO:
            log.warning("adapter stays unmerged", adapter=bound.digest, reason=folding.refusal)
        await asyncio.wrap_future(self._engine.call(lambda: self._engine.weights.acquire(bound)))
        tell(Progress(stage=Stage.STAGED))
        return Staged(reading=reading, folding=folding)

    def release(self, staged: Staged) -> None:
        """One deployment less points at it: it leaves the device when its last request has ended."""
        self._engine.call(lambda: self._engine.weights.release(staged.bound.digest))

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

    async def _read_folder(self, path: str, tell: Tell) -> tuple[BoundAdapter, Match]:
        async with self._binding:
            checkpoint = await in_own_thread(read_checkpoint, self._folder / path)
            tell(Progress(stage=Stage.READ))
            bound = await in_own_thread(self._manager.bind, checkpoint)
            match = await in_own_thread(self._stamps.check, checkpoint)
        tell(Progress(stage=Stage.BOUND))
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
        gate = self._manager.gate
        total = await asyncio.wrap_future(self._engine.call(lambda: gate.parameters(bound)))
        parameters, done = gate.measure(bound), 0
        while await asyncio.wrap_future(self._engine.call(lambda: next(parameters, None))) is not None:
            done += 1
            tell(Progress(stage=Stage.MEASURED, done=done, total=total))
        fidelity = await asyncio.wrap_future(self._engine.call(lambda: gate.fidelity(bound)))
        try:
            await asyncio.wrap_future(self._engine.call(lambda: gate.check(bound)))
        except DeltaLost as error:
            return Folding(fidelity=fidelity, refusal=str(error))
        return Folding(fidelity=fidelity)


def least_sure(matches: Iterable[Match]) -> Match:
    """What the stamps of several adapters say together."""
    found = set(matches)
    return next(match for match in (Match.UNSTAMPED, Match.OTHER_DTYPE, Match.SAME) if match in found)
