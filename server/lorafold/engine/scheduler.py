"""Waiting and running rows: who has room in the cache, and which tokens run next.

Pure Python: no tensors, no model. Rows start in the order of `FairQueue`, whichever lane they are in, so that rows of
a lane that waits for its turn are never overtaken by later ones of their deployment. A row starts when its prompt fits
the cache. If running rows outgrow it, the one that started last gives up its room and computes its tokens again later.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lorafold.engine.detokenize import TextStream
from lorafold.engine.fair_queue import FairQueue
from lorafold.engine.pages import Holding, PagePool
from lorafold.engine.sampling_state import SamplingState
from lorafold.errors import InvalidField, KvFull, QueueFull
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
    leader: "Row | None" = None
    """The row that reads the same prompt for this one."""
    holding: Holding | None = None
    """Its pages of the cache; None while it waits."""
    lane: Lane = None
    cached: int = 0
    """Tokens whose keys and values are in its pages."""
    read: int = 0
    """Prompt tokens that were computed or found."""
    admitted: float = 0.0
    """When it first started; times are in seconds on the engine's clock."""
    first_token: float = 0.0
    """When its first token was chosen."""
    swap_wait: float = 0.0
    """How long it had started while another lane ran."""
    swap_wait_before_first: float = 0.0
    """The part of `swap_wait` before its first token."""
    preempted: int = 0
    """How often it gave up its room."""

    ended: bool = False
    """True once it was removed."""
    sampling: SamplingState = field(init=False)
    """What the choice of its next token depends on beside the logits."""

    def __post_init__(self) -> None:
        request = self.request
        self.sampling = SamplingState(request.sampling, self.tokens, len(request.prompt), self.index, request.logprobs)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def at_most(self) -> int:
        """Tokens that it can come to have."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def pages(self) -> Sequence[int]:
        """Of the cache, in order; only while it runs."""
        assert self.holding is not None
        return self.holding.pages

    @property
    def ready(self) -> bool:
        """False while another row reads its prompt."""
        return self.leader is None or bool(self.leader.generated) or self.leader.ended


@dataclass(frozen=True, slots=True)
class Part:
    """What one step runs of one row."""

    row: Row
    tokens: int
    """How many, from `row.cached` on."""
    decodes: bool
    """True if the token is the last one of the answer so far; else it is read, for the first time or again."""
    samples: bool
    """True if the step reaches the row's last token, so that the next one can be chosen."""


def arrival(row: Row) -> tuple[float, int]:
    """What a queue is ordered by."""
    return row.request.arrived, row.index


class Scheduler:
    """At most `max_batch` rows run, at most `max_waiting` wait."""

    def __init__(self, *, pool: PagePool, max_batch: int, max_waiting: int, prefill_tokens: int) -> None:
        """`prefill_tokens`: how many tokens a step runs at most, those that decode included, which all run."""
        self.pool = pool
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        self._waiting = FairQueue()
        self._running: dict[Row, None] = {}
        self.preemptions = 0
        """How often a row gave up its room."""

    @property
    def waiting(self) -> int:
        """Rows without room."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[Row, ...]:
        """Rows with room, in the order in which they started, whether or not it is their lane's turn."""
        return tuple(self._running)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return (*self._running, *self._waiting)

    def lanes(self) -> dict[Lane, int]:
        """Running rows by lane."""
        return dict(Counter(row.lane for row in self._running))

    def add(self, *rows: Row) -> None:
        """Puts the rows of a request at the end of their queues, all or none.

        Raises QueueFull, or InvalidField or KvFull for what can never run.
        """
        most = self._max_batch + self._max_waiting
        if len(rows) > most:
            raise InvalidField("spec.n", f"{len(rows)} are too many: ask for {most}, or raise engine.max_queue")
        places = max(0, self._max_batch - len(self._running))
        would_wait = len(self._waiting) + len(rows) - places
        if would_wait > self._max_waiting:
            raise QueueFull(
                f"{would_wait} completions would wait, engine.max_queue allows {self._max_waiting}: try again later, "
                "or raise it"
            )
        longest = max(row.at_most for row in rows)
        if longest > self.pool.tokens:
            raise KvFull(
                f"prompt and answer may have {longest} tokens, the cache has room for {self.pool.tokens}: ask for "
                "fewer, or raise engine.kv_memory_gib"
            )
        for row in rows:
            self._waiting.push(row)

    def admit(self, lane_of: Callable[[Row], Lane], now: float, *, held: str | None = None) -> None:
        """Starts the rows that should be next, as far as there is room; a row's lane is chosen then.

        While an adapter is `held`, only its rows start, and others, which cannot run, give up their room for them.
        """
        while row := self._next(lane_of, held):
            while not (len(self._running) < self._max_batch and self._start(row)):
                parked = [other for other in self._running if held is not None and other.lane != held]
                if not parked:
                    return
                self._preempt(parked[-1])
            self._waiting.remove(row)
            row.admitted = row.admitted or now
            row.lane = lane_of(row)
            self._running[row] = None

    def _next(self, lane_of: Callable[[Row], Lane], held: str | None) -> Row | None:
        for row in self._waiting:
            if row.ready and (held is None or lane_of(row) == held):
                return row
        return None

    def _start(self, row: Row) -> bool:
        """Gives a row its pages if they are there, and one more for each running row that may still grow."""
        holding = self.pool.start(row.request.adapter, row.tokens)
        wanted = self.pool.pages_for(len(row.tokens)) - len(holding.pages)
        growing = sum(len(other.pages) < self.pool.pages_for(other.at_most) for other in self._running)
        if self._running and wanted + growing > self.pool.available:
            self.pool.release(holding)
            return False
        self.pool.grow(holding, len(row.tokens), at_most=row.at_most)
        row.holding, row.cached = holding, holding.sealed * self.pool.size
        return True

    def requeue(self, rows: Iterable[Row]) -> None:
        """Puts rows that have not run yet back at the head of their queues, and frees their room."""
        back = sorted((row for row in rows if not row.read), key=arrival, reverse=True)
        for row in back:
            self._back(row)

    def _back(self, row: Row) -> None:
        self._free(row)
        self._waiting.push_front(row)

    def _free(self, row: Row) -> None:
        del self._running[row]
        assert row.holding is not None
        self.pool.release(row.holding)
        row.holding, row.cached = None, 0

    def remove(self, row: Row) -> None:
        """Forgets a row, wherever it is, and frees its room."""
        row.ended = True
        if row in self._running:
            self._free(row)
        else:
            self._waiting.remove(row)

    def schedule(self, lane: Lane) -> list[Part]:
        """One step of the lane's rows: a token for each that decodes, then what is to be read, up to the budget."""
        decoding = [row for row in self.running if row.lane == lane and decodes(row)]
        for row in decoding:
            self._make_room(row)
        parts = [Part(row, 1, decodes=True, samples=True) for row in decoding if row in self._running]
        budget = max(self._prefill_tokens - len(parts), self.pool.size)
        for row in self.running:
            if row.lane == lane and not decodes(row) and budget:
                tokens = min(len(row.tokens) - row.cached, budget)
                parts.append(Part(row, tokens, decodes=False, samples=row.cached + tokens == len(row.tokens)))
                budget -= tokens
        return parts

    def _make_room(self, row: Row) -> None:
        """Makes room for the row's tokens; the rows that started last, itself perhaps, give theirs up for it."""
        while row in self._running:
            assert row.holding is not None
            try:
                self.pool.grow(row.holding, len(row.tokens), at_most=row.at_most)
            except KvFull:
                self._preempt(self._last_beside(row))
            else:
                return

    def _last_beside(self, row: Row) -> Row:
        """The row that started last; not `row` itself if then nothing of its lane could run."""
        others = [other for other in self._running if other is not row]
        alone = all(other.lane != row.lane for other in others)
        return others[-1] if alone else next(reversed(self._running))

    def _preempt(self, row: Row) -> None:
        row.preempted += 1
        self.preemptions += 1
        self._back(row)

    def ran(self, part: Part) -> int:
        """Notes that a part ran; returns how many prompt tokens that were never read before it read."""
        row = part.row
        assert row.holding is not None
        row.cached += part.tokens
        self.pool.seal(row.holding, row.tokens, row.cached)
        self._waiting.charge(row.request.deployment, part.tokens)
        fresh = max(0, min(row.cached, len(row.request.prompt)) - row.read)
        row.read += fresh
        return fresh

    def check_integrity(self) -> None:
        """Running rows hold exactly the pages that are in use, and waiting ones none."""
        self.pool.check_integrity([row.holding for row in self._running if row.holding is not None])
        assert all(row.holding is not None for row in self._running)


def decodes(row: Row) -> bool:
    """True if only the last token of the answer so far is to be run."""
    return row.generated > 0 and row.cached == len(row.tokens) - 1
