"""What the engine tells whoever keeps count of it. Knows no Prometheus."""

from typing import Protocol

from lorafold.engine.residents import Places
from lorafold.engine.rows import Part, Row
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import Mode, Side


class Observer(Protocol):
    """Whoever keeps count of what the engine does."""

    def step(self, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        ...

    def tokens(self, mode: Mode, *, prompt: int, answer: int) -> None:
        """So many tokens of a prompt were read, and of an answer generated."""
        ...

    def queues(self, waiting: int, running: int, preemptions: int) -> None:
        """How many rows there are now, and how often one ever gave up its room."""
        ...

    def adapters(self, places: Places) -> None:
        """Where adapters are now."""
        ...


def mode_of(row: Row, folded: Side) -> Mode:
    """By which path a row is computed in a step with this adapter in the weights."""
    if row.request.adapter is None:
        return Mode.BASE
    return Mode.UNMERGED if folded is None else Mode.MERGED


def observe(observer: Observer, costs: Costs, parts: list[Part], read: list[int], folded: Side, seconds: float) -> None:
    """Tells of one step, in which each part read so many tokens of a prompt.

    With any low-rank path in it, it is an unmerged one, whoever else was in the batch.
    """
    modes = [mode_of(part.row, folded) for part in parts]
    observer.step(next((mode for mode in modes if mode is not Mode.BASE), Mode.BASE), seconds)
    if all(part.decodes for part in parts):
        adapters = {part.row.request.adapter for part in parts} - {None} if folded is None else set()
        costs.step(adapters=len(adapters), rows=len(parts), seconds=seconds)
    counted: dict[Mode, list[int]] = {mode: [0, 0] for mode in modes}
    for part, prompt, mode in zip(parts, read, modes, strict=True):
        counted[mode][0] += prompt
        counted[mode][1] += part.samples
    for mode, (prompt, answer) in counted.items():
        observer.tokens(mode, prompt=prompt, answer=answer)
