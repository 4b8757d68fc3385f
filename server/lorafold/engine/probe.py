"""Times the same decode step with and without low-rank paths, on free pages of the cache. Nobody sees its tokens.

Runs on the engine's thread between steps, one step at a time, so that a request waits for one of them at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lorafold.engine.pages import PagePool
from lorafold.engine.runner import Piece, Runner
from lorafold.engine.step_clock import StepClock
from lorafold_adapters import AdapterManager
from lorafold_adapters.overhead import Cell, Pairs

TOKEN = 1
"""What every row is given; what comes out is thrown away."""


@dataclass(slots=True)
class Trial:
    """The steps of one cell."""

    cell: Cell
    names: Sequence[str]
    """The adapters, as many as the cell has, all on the device."""
    deployed: bool
    """False if some of them were made up for it."""
    pairs: Pairs = field(init=False)
    touched: bool = False
    """True once something was written to its pages."""
    seconds: float = 0.0
    """Of all steps, those that only warm up included."""

    def __post_init__(self) -> None:
        self.pairs = Pairs(self.cell)

    @property
    def plain_next(self) -> bool:
        """Which of the two steps is due; the order within a pair alternates."""
        plain, unmerged = len(self.pairs.plain), len(self.pairs.unmerged)
        return plain < unmerged if plain != unmerged else plain % 2 == 0


class Probe:
    """Runs trials."""

    def __init__(self, runner: Runner, manager: AdapterManager, pool: PagePool, clock: StepClock) -> None:
        self._runner = runner
        self._manager = manager
        self._pool = pool
        self._clock = clock

    def run(self, trial: Trial, pairs: int, wanted: Callable[[], bool], *, alone: bool) -> bool:
        """Steps of the trial until it has so many pairs, or somebody is `wanted`; False if the cache has no room.

        `alone`: nobody else has anything to run. Then every step that counts comes after one of its kind that does
        not; otherwise this is one step, which counts. Raises AdapterNotLoaded, or AdapterInUse while an adapter is
        folded into a quantised base.
        """
        cell = trial.cell
        pages = self._pool.borrow(cell.batch, cell.context + 1)
        if pages is None:
            return False
        plain = [self._piece(each, cell, None) for each in pages]
        unmerged = [self._piece(each, cell, trial.names[row % len(trial.names)]) for row, each in enumerate(pages)]
        with self._manager.rehearsal():
            if not trial.touched:
                self._runner.fill(pages)
                trial.touched = True
            while trial.pairs.count < pairs:
                due, kept = (plain, trial.pairs.plain) if trial.plain_next else (unmerged, trial.pairs.unmerged)
                if alone:
                    trial.seconds += self._seconds(due)
                    if wanted():
                        break
                kept.append(self._seconds(due))
                trial.seconds += kept[-1]
                if not alone or wanted():
                    break
        return True

    @staticmethod
    def _piece(pages: Sequence[int], cell: Cell, adapter: str | None) -> Piece:
        return Piece(tokens=[TOKEN], pages=pages, past=cell.context, adapter=adapter, samples=True)

    def _seconds(self, pieces: Sequence[Piece]) -> float:
        """Of one step."""
        taken: list[float] = []
        self._clock.begin()
        logits_SV = self._runner.run(pieces)
        self._clock.end(taken.append)
        if logits_SV.device.type == "cuda":
            torch.cuda.synchronize(logits_SV.device)
        self._clock.poll()
        return taken[0]
