"""Waiting and running rows: who has a slot, and which tokens run next.

Pure Python: no tensors, no model. Slots are given in order of arrival, whichever lane a row is in, so that rows of
a lane that waits for its turn are never overtaken by later ones.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lorafold.engine.detokenize import TextStream
from lorafold.engine.sampling_state import SamplingState
from lorafold.errors import QueueFull
from lorafold.requests import Request, Sink
from lorafold_adapters.policy import Lane


@dataclass(slots=True, eq=False)
class Row:
    """One completion of a request on its way through the engine."""

    request: Request
    sink: Sink
    text: TextStream
    index: int = 0
    """Of the completion among those of its request."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and answer so far."""
    slot: int = -1
    lane: Lane = None
    cached: int = 0
    """Tokens whose keys and values are in the slot."""
    admitted: float = 0.0
    """When it got its slot; times are in seconds on the engine's clock."""
    first_token: float = 0.0
    """When its first token was chosen."""
    swap_wait: float = 0.0
    """How long it had a slot while another lane ran."""
    swap_wait_before_first: float = 0.0
    """The part of `swap_wait` before its first token."""

    sampling: SamplingState = field(init=False)
    """What the choice of its next token depends on beside the logits."""

    def __post_init__(self) -> None:
        request = self.request
        self.sampling = SamplingState(request.sampling, self.tokens, len(request.prompt), self.index, request.logprobs)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Part:
    """What one step runs of one row."""

    row: Row
    tokens: int
    """How many, from `row.cached` on."""
    decodes: bool
    """True if the token is one of the answer; else it is part of the prompt."""
    samples: bool
    """True if the step reaches the row's last token, so that the next one can be chosen."""


def arrival(row: Row) -> tuple[float, int]:
    """What the queue is ordered by."""
    return row.request.arrived, row.index


class Scheduler:
    """At most `slots` rows run, at most `max_waiting` wait."""

    def __init__(self, *, slots: int, max_waiting: int, prefill_tokens: int) -> None:
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Row] = deque()
        self._running: dict[Row, None] = {}

    @property
    def waiting(self) -> int:
        """Rows without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[Row, ...]:
        """Rows with a slot, whether or not it is their lane's turn."""
        return tuple(self._running)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return (*self._running, *self._waiting)

    def lanes(self) -> dict[Lane, int]:
        """Rows with a slot, by lane."""
        return dict(Counter(row.lane for row in self._running))

    def add(self, *rows: Row) -> None:
        """Puts rows at the end of the queue, all or none. Raises QueueFull."""
        if len(self._waiting) + len(rows) > self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests wait already: try again later or raise engine.max_queue")
        self._waiting.extend(rows)

    def admit(self, lane_of: Callable[[Row], Lane], now: float, *, held: str | None = None) -> None:
        """Gives free slots to the rows that waited longest; a row's lane is chosen then.

        While an adapter is `held`, only its rows get slots: others could not run and would keep its own out.
        """
        for row in list(self._waiting) if self._free else []:
            if not self._free:
                break
            lane = lane_of(row)
            if held is None or lane == held:
                self._waiting.remove(row)
                row.slot, row.admitted, row.lane = self._free.pop(), now, lane
                self._running[row] = None

    def requeue(self, rows: Iterable[Row]) -> None:
        """Puts rows that have not run yet back at the head of the queue, in order of arrival, and frees their slots."""
        back = sorted((row for row in rows if not row.cached), key=arrival, reverse=True)
        for row in back:
            del self._running[row]
            self._free.append(row.slot)
            self._waiting.appendleft(row)

    def remove(self, row: Row) -> None:
        """Forgets a row, wherever it is, and frees its slot."""
        if row in self._running:
            del self._running[row]
            self._free.append(row.slot)
        else:
            self._waiting.remove(row)

    def schedule(self, lane: Lane) -> list[Part]:
        """One step of the lane's rows: a token for each that decodes, then prompts, up to the budget of tokens."""
        rows = [row for row in self._running if row.lane == lane]
        parts = [Part(row, 1, decodes=True, samples=True) for row in rows if row.generated]
        budget = self._prefill_tokens
        for row in rows:
            if not row.generated and budget:
                tokens = min(len(row.tokens) - row.cached, budget)
                parts.append(Part(row, tokens, decodes=False, samples=row.cached + tokens == len(row.tokens)))
                budget -= tokens
        return parts

    def check_integrity(self) -> None:
        """Every slot is either free or one row's."""
        assert sorted([*self._free, *(row.slot for row in self._running)]) == list(range(self._slots))
