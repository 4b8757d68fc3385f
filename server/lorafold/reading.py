"""Reads, checks and binds adapters in worker threads, from one folder or as a composition of several.

Knows no names, and puts nothing on the device.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorafold.engine.loop import Engine
from lorafold.own_thread import in_background, in_own_thread
from lorafold.progress import Progress, Stage, Tell, nobody
from lorafold.recipes import Recipe, Source, folders_of
from lorafold.stamps import StampCheck
from lorafold.state import Version
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import read_checkpoint
from lorafold_adapters.errors import AdapterChanged, BaseMismatch
from lorafold_adapters.provenance import Source as Ingredient
from lorafold_adapters.routes import unrouted
from lorafold_adapters.stamp import Match


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where an adapter comes from."""

    source: Source
    match: Match
    """What the adapter's stamp says about the base."""
    ingredients: tuple[Ingredient, ...]
    """The adapters it is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """An adapter that was read, checked and bound."""

    bound: BoundAdapter
    origin: Origin

    @property
    def digest(self) -> str:
        """Content digest of the adapter."""
        return self.bound.digest


class Reader:
    """Reads the adapters of one server."""

    def __init__(self, manager: AdapterManager, engine: Engine, stamps: StampCheck, folder: Path) -> None:
        """`folder`: where relative paths start."""
        self._manager = manager
        self._engine = engine
        self._stamps = stamps
        self._folder = folder.absolute()
        self._reading = {urgent: asyncio.Lock() for urgent in (True, False)}
        """One adapter is read at a time, and one more that requests wait for."""
        self._loop = asyncio.get_running_loop()

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
        reading = await self.read_same(version.wanted.source, version.digest, tell)
        if reading.origin.match is Match.UNSTAMPED and version.base != self.base:
            raise BaseMismatch(
                f"it was deployed on base {version.base[:12]}, this server holds {self.base[:12]}, and it has no stamp "
                "that says it fits: stamp it, or update the deployment"
            )
        return reading

    async def read_same(self, source: Source, digest: str, tell: Tell = nobody, *, urgent: bool = False) -> Reading:
        """Reads what had this digest. Raises AdapterChanged if it has another now, or a subclass of AdapterError."""
        reading = await self.read(source, tell, urgent=urgent)
        if reading.digest != digest:
            where = ", ".join(f"'{folder}'" for folder in folders_of(source))
            raise AdapterChanged(
                f"what was served is adapter {digest[:12]}, {where} now makes {reading.digest[:12]}: put it back, or "
                "update the deployment to take what is there"
            )
        return reading

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
            routes[module] = await self._engine.asked(work)
        return self._manager.with_routes(bound, routes)


def least_sure(matches: Iterable[Match]) -> Match:
    """What the stamps of several adapters say together."""
    found = set(matches)
    return next(match for match in (Match.UNSTAMPED, Match.OTHER_DTYPE, Match.SAME) if match in found)
