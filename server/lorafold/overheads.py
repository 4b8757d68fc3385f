"""Measures what the unmerged path costs here, and remembers what was found. Runs on the event loop."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace

import structlog

from lorafold.engine.loop import Engine
from lorafold.engine.probe import Probe, Trial
from lorafold.errors import EngineStopped, InvalidField, MeasurementBusy
from lorafold.metrics.overhead import OverheadMetrics
from lorafold.own_thread import in_background
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import LorafoldError
from lorafold_adapters.made_up import made_up, plain_only
from lorafold_adapters.overhead import Cell, Overhead

log = structlog.get_logger(__name__)
SHARE = 0.01
"""Of the engine's time that measuring takes while there are requests."""
BURST = 16
"""Pairs after which others are told how far it is."""
REST, LOOK = 0.2, 5.0
"""Seconds between bursts in idle moments, and between looks at what has become too old."""
MADE_UP = "(made up for a measurement)"
DEFAULT_RANK = 16
"""Where no adapter is deployed that one could go by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What to measure: every combination of these that is possible."""

    batches: Sequence[int] = ()
    adapters: Sequence[int] = ()
    ranks: Sequence[int] = ()
    contexts: Sequence[int] = ()
    precision: float = 0.04
    """A cell is done once its interval is narrower than this share of the ratio."""
    max_pairs: int = 200
    """Or after so many pairs."""

    def cells(self) -> list[Cell]:
        """The combinations; no batch has more adapters than rows."""
        return [
            Cell(batch=batch, adapters=adapters, rank=rank, context=context)
            for batch, adapters, rank, context in itertools.product(
                self.batches, self.adapters, self.ranks, self.contexts
            )
            if adapters <= batch
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How far a measurement is."""

    cell: Cell
    done: int
    """Cells before this one."""
    total: int
    pairs: int
    overhead: Overhead | None = None
    """If this cell is done."""
    at: float = 0.0
    """When it was, in seconds since the epoch."""
    refusal: str = ""
    """Why this cell is left out."""


class Overheads:
    """What the unmerged path costs, by cell."""

    def __init__(
        self,
        engine: Engine,
        manager: AdapterManager,
        probe: Probe,
        metrics: OverheadMetrics,
        *,
        max_batch: int,
        context: int,
    ) -> None:
        """`max_batch`: rows of a step at most; `context`: tokens of a row at most."""
        self._max_batch = max_batch
        self._context = context
        self._engine = engine
        self._manager = manager
        self._probe = probe
        self._metrics = metrics
        self._busy = asyncio.Lock()
        self.known: dict[Cell, tuple[Overhead, float]] = {}
        """What was found last, and when, in seconds since the epoch."""
        self._found_at: dict[Cell, float] = {}
        """The same on a clock that does not jump."""

    async def grid(self, asked: Grid) -> Grid:
        """`asked`, with what it leaves open filled in. Raises InvalidField for what cannot run here."""
        max_batch, context = self._max_batch, self._context
        plain = await self._engine.asked(lambda: plain_only(self._manager.adapters))
        grid = replace(
            asked,
            batches=asked.batches or sorted({1, min(8, max_batch), max_batch}),
            adapters=asked.adapters or [count for count in (1, 8) if count <= max_batch],
            ranks=asked.ranks or sorted(set(plain.values()))[:3] or [DEFAULT_RANK],
            contexts=asked.contexts or [min(128, context - 1)],
        )
        limits = {"batches": max_batch, "adapters": max_batch, "ranks": 1024, "contexts": context - 1}
        for field, most in limits.items():
            if wrong := [value for value in getattr(grid, field) if not 1 <= value <= most]:
                raise InvalidField(field, f"{wrong[0]} is not possible here: 1 to {most} are")
        if not grid.cells():
            raise InvalidField("adapters", "no batch has so many rows: ask for larger batches, or fewer adapters")
        return grid

    async def measure(self, grid: Grid) -> AsyncGenerator[Step, None]:
        """Cell by cell, beside the requests. Raises MeasurementBusy, DeviceFull, or what ends the engine."""
        if self._busy.locked():
            raise MeasurementBusy("another measurement runs now: wait for its end")
        async with self._busy:
            cells = grid.cells()
            for done, cell in enumerate(cells):
                try:
                    async with self._trial(cell) as trial:
                        async for step in self._cell(trial, grid, done, len(cells)):
                            yield step
                except EngineStopped:
                    raise
                except LorafoldError as error:
                    yield Step(cell=cell, done=done, total=len(cells), pairs=0, refusal=str(error))

    async def _cell(self, trial: Trial, grid: Grid, done: int, total: int) -> AsyncIterator[Step]:
        cell, found = trial.cell, None
        while found is None or (found.width > grid.precision and found.pairs < grid.max_pairs):
            if not await self._burst(trial, min(grid.max_pairs, trial.pairs.count + BURST)):
                told = "the cache has no room for it now: ask for less, or raise engine.kv_memory_gib"
                yield Step(cell=cell, done=done, total=total, pairs=0, refusal=told)
                return
            if trial.pairs.count:
                found = await in_background(trial.pairs.found)
                yield Step(cell=cell, done=done, total=total, pairs=found.pairs)
        at = self._learn(found, deployed=trial.deployed)
        yield Step(cell=cell, done=done, total=total, pairs=found.pairs, overhead=found, at=at)

    async def in_idle_moments(self, every: float) -> None:
        """Measures what is older than `every` seconds, on deployed adapters, while nobody has requests.

        Ends with the engine.
        """
        with contextlib.suppress(EngineStopped):
            while True:
                grid = await self.grid(Grid())
                for cell in grid.cells():
                    names, _ = await self._deployed(cell)
                    if len(names) == cell.adapters and self.age(cell) > every:
                        await self._idly(Trial(cell=cell, names=names, deployed=True), grid)
                await asyncio.sleep(min(every, LOOK))

    def age(self, cell: Cell) -> float:
        """Seconds since it was measured; infinite if it was not."""
        return time.monotonic() - self._found_at.get(cell, float("-inf"))

    async def _idly(self, trial: Trial, grid: Grid) -> None:
        """One cell, however long it takes; given up for now if it cannot be timed: no room in the cache, an adapter
        that has left the device, something folded into a quantised base.
        """
        while trial.pairs.count < grid.max_pairs:
            if not self._busy.locked():
                try:
                    if not await self._burst(trial, trial.pairs.count + BURST, only_alone=True):
                        return
                except EngineStopped:
                    raise
                except LorafoldError as error:
                    log.debug("unmerged path not measured", cell=trial.cell, reason=str(error))
                    return
                if trial.pairs.count and (await in_background(trial.pairs.found)).width <= grid.precision:
                    break
            await asyncio.sleep(REST)
        self._learn(await in_background(trial.pairs.found), deployed=True)

    def _learn(self, found: Overhead, *, deployed: bool) -> float:
        """Remembers what was found, and tells everybody; when, in seconds since the epoch.

        `auto` decides by what deployed adapters cost, and not by others that somebody was curious about.
        """
        now = time.time()
        self.known[found.cell], self._found_at[found.cell] = (found, now), time.monotonic()
        self._metrics.found(found)
        if deployed:
            self._engine.call(lambda: self._engine.weights.costs.measured(found))
        interval = [round(found.low, 3), round(found.high, 3)]
        about = {"ratio": round(found.ratio, 3), "interval": interval, "pairs": found.pairs}
        log.info("unmerged path measured", **asdict(found.cell), **about)
        return now

    async def _burst(self, trial: Trial, pairs: int, *, only_alone: bool = False) -> bool:
        """Some more steps; beside requests none if `only_alone`, or else a single one, and then nothing for a while.

        False if the cache has no room.
        """
        before = trial.seconds

        def run() -> tuple[bool, bool]:
            alone = self._engine.idle
            if only_alone and not alone:
                return True, True
            return alone, self._probe.run(trial, pairs, self._engine.wanted, alone=alone)

        alone, room = await self._engine.asked(run)
        self._metrics.ran(trial.seconds - before)
        if not alone:
            await asyncio.sleep((trial.seconds - before) / SHARE)
        return room

    async def _deployed(self, cell: Cell) -> tuple[list[str], BoundAdapter | None]:
        """Digests of adapters of that rank on the device, as many as the cell has at most; one to go by for others."""
        loaded = await self._engine.asked(lambda: self._manager.adapters)
        plain = plain_only(loaded)
        names = [name for name, rank in plain.items() if rank == cell.rank][: cell.adapters]
        return names, next((loaded[name] for name in names or plain), None)

    @asynccontextmanager
    async def _trial(self, cell: Cell) -> AsyncIterator[Trial]:
        """With as many adapters of that rank as the cell has: deployed ones, and made up ones for the rest."""
        names, like = await self._deployed(cell)
        missing = made_up_for(self._manager, cell, like, names)
        taken: list[BoundAdapter] = []
        try:
            for bound in missing:
                await self._acquire(bound)
                taken.append(bound)
            yield Trial(cell=cell, names=[*names, *(bound.digest for bound in taken)], deployed=not taken)
        finally:
            for bound in taken:
                self._engine.call(
                    lambda digest=bound.digest: self._engine.residents.release(digest, MADE_UP, pinned=True)  # type: ignore[misc]
                )

    async def _acquire(self, bound: BoundAdapter) -> None:
        staged = await in_background(self._manager.stage, bound)
        await self._engine.asked(lambda: self._engine.residents.acquire(bound, MADE_UP, staged=staged, pinned=True))


def made_up_for(
    manager: AdapterManager, cell: Cell, like: BoundAdapter | None, names: Sequence[str]
) -> Iterator[BoundAdapter]:
    """The adapters that are lacking, one at a time."""
    for seed in range(cell.adapters - len(names)):
        yield made_up(manager.model, cell.rank, seed, like)
