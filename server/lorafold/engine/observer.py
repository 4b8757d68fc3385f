"""What the engine tells whoever keeps count of it. Knows no Prometheus."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lorafold.engine.residents import Places
from lorafold.engine.rows import Part, Row
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import Mode, Side


class Phase(Enum):
    """What a step is for."""

    PREFILL = "prefill"
    """At least one row reads its prompt."""
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What there is to do."""

    waiting: int
    """Rows without room."""
    running: int
    cache_usage: float
    """Share of the cache's pages that rows hold, 0 to 1."""
    preemptions: int
    """How often a row ever gave up its room."""


class Observer(Protocol):
    """Whoever keeps count of what the engine does. Called on the engine's thread: must not block."""

    def step(self, phase: Phase, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        ...

    def tokens(self, deployment: str, mode: Mode, *, prompt: int, answer: int) -> None:
        """So many tokens of prompts were read, and of answers generated."""
        ...

    def token(self, deployment: str, mode: Mode, seconds: float, *, first: bool) -> None:
        """A row got a token, so long after its last one, or for the first one after its request's arrival."""
        ...

    def load(self, load: Load) -> None:
        """What there is to do now."""
        ...

    def places(self, places: Places) -> None:
        """Where adapters are now."""
        ...


def mode_of(row: Row, folded: Side) -> Mode:
    """By which path a row is computed in a step with this adapter in the weights."""
    if row.request.adapter is None:
        return Mode.BASE
    return Mode.UNMERGED if folded is None else Mode.MERGED


def kind_of(parts: Sequence[Part], folded: Side) -> tuple[Phase, Mode]:
    """What a step is. With any low-rank path in it, it is an unmerged one, whoever else is in the batch."""
    modes = (mode_of(part.row, folded) for part in parts)
    phase = Phase.DECODE if all(part.decodes for part in parts) else Phase.PREFILL
    return phase, next((mode for mode in modes if mode is not Mode.BASE), Mode.BASE)


def learn(costs: Costs, parts: Sequence[Part], folded: Side, seconds: float) -> None:
    """What a step that only decoded took."""
    if all(part.decodes for part in parts):
        adapters = {part.row.request.adapter for part in parts} - {None} if folded is None else set()
        costs.step(adapters=len(adapters), rows=len(parts), seconds=seconds)


def count(observer: Observer, parts: Sequence[Part], read: Sequence[int], folded: Side) -> None:
    """Tells of the tokens of a step, in which each part read so many of a prompt."""
    counted: dict[tuple[str, Mode], list[int]] = {}
    for part, prompt in zip(parts, read, strict=True):
        tokens = counted.setdefault((part.row.request.deployment, mode_of(part.row, folded)), [0, 0])
        tokens[0] += prompt
        tokens[1] += part.samples
    for (deployment, mode), (prompt, answer) in counted.items():
        observer.tokens(deployment, mode, prompt=prompt, answer=answer)


def time_tokens(observer: Observer, rows: Sequence[Row], before: Sequence[float], modes: Sequence[Mode]) -> None:
    """Tells how long after its last token, or else after its request's arrival, each row got the present one."""
    for row, last, mode in zip(rows, before, modes, strict=True):
        since = row.last_token - (last or row.request.arrived)
        if row.last_token != last:  # Else choosing its token failed.
            observer.token(row.request.deployment, mode, since, first=not last)
