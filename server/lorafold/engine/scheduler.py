"""Waiting and running rows: who has room in the cache, and which tokens run next.

Pure Python: no tensors, no model. Rows start in the order of `FairQueue`; one whose turn it is not is passed over, but
one that finds no room in the cache is not: nobody behind it starts before it. A row starts when its prompt fits the
cache. If running rows outgrow it, the one that started last, of those with the lowest priority, gives up its room and
computes its tokens again later.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from lorafold.engine.fair_queue import FairQueue
from lorafold.engine.groups import Groups
from lorafold.engine.pages import PagePool
from lorafold.engine.rows import Part, Row, decodes
from lorafold.engine.running import Adapters, Running
from lorafold.errors import InvalidField, KvFull, QueueFull
from lorafold_adapters.policy import Cause, Group, Plan, PolicyKind


class Scheduler:
    """At most `max_batch` rows run in a step, at most `max_waiting` wait."""

    def __init__(
        self, *, pool: PagePool, adapters: Adapters, max_batch: int, max_waiting: int, prefill_tokens: int
    ) -> None:
        """`prefill_tokens`: how many tokens a step runs at most, those that decode included, which all run."""
        self.pool = pool
        self._adapters = adapters
        self.max_batch = max_batch
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        self._waiting = FairQueue()
        self._running = Running(pool, adapters)
        self._paused: dict[Row, None] = {}
        """Rows whose answers nobody takes at present."""
        self._by_request: dict[str, list[Row]] = {}
        self._groups = Groups()
        self._only: Mapping[Row, None] | None = None
        self._ready: dict[Group, int] | None = None
        """What `ready` found, until something changes that."""
        self._ready_at = -1
        """Pages that were available then."""
        self._lacking: dict[str, None] = {}
        """Adapters without which rows that were next then could not start."""
        self.preemptions = 0
        """How often a row gave up its room."""

    @property
    def waiting(self) -> int:
        """Rows without room."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[Row, ...]:
        """Rows with room, in the order in which they started, whether or not it is their turn."""
        return tuple(self._running)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return (*self._running, *self._waiting, *self._paused)

    @property
    def empty(self) -> bool:
        """True if there are no rows."""
        return not self._by_request

    @property
    def adapters(self) -> set[str]:
        """Those that rows need."""
        return {adapter for adapter, _ in self._groups if adapter is not None}

    def ahead_of(self, row: Row) -> tuple[int, int]:
        """Rows that would start before a new one and find no place now, and how many have one at once, at most."""
        places = min(row.request.max_concurrency or self.max_batch, self.max_batch)
        free = max(0, min(self.max_batch - len(self._running), places - self._running.of(row.request.deployment)))
        return max(0, self._waiting.ahead_of(row) - free), places

    def queued(self) -> dict[Group, tuple[int, int]]:
        """Running and all other rows of each group."""
        running = Counter(row.group for row in self._running)
        return {group: (running[group], self._groups.rows(group) - running[group]) for group in self._groups}

    def of_request(self, request_id: str) -> tuple[Row, ...]:
        """The rows of a request that have not ended; none if it is unknown."""
        return tuple(self._by_request.get(request_id, ()))

    def add(self, *rows: Row) -> None:
        """Puts the rows of a request at the end of their queues, all or none.

        Raises QueueFull, or InvalidField or KvFull for what can never run.
        """
        most = self.max_batch + self._max_waiting
        if len(rows) > most:
            raise InvalidField("spec.n", f"{len(rows)} are too many: ask for {most}, or raise engine.max_queue")
        places = max(0, self.max_batch - len(self._running))
        would_wait = len(self._waiting) + len(self._paused) + len(rows) - places
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
            self._by_request.setdefault(row.request.id, []).append(row)
            self._groups.join(row)
            self._waiting.push(row)
        self._ready = None

    def only(self, rows: Mapping[Row, None] | None) -> None:
        """From now on no others run or start; None: all may."""
        self._only, self._ready = rows, None

    def ready(self) -> Mapping[Group, int]:
        """Groups that have a row that runs or can start, and how many rows that can, now or in their turn.

        The same object as long as that is so.
        """
        available = self.pool.available
        if self._ready is None or self._ready_at != available:
            self._lacking = {}
            groups = {row.group for row in self._running if self._may(row)}
            groups.update(row.group for row in self._startable())
            paused = Counter(row.group for row in self._paused)
            self._ready = {
                group: max(1, self._groups.runnable(group) - paused[group]) for group in self._groups if group in groups
            }
            self._ready_at = available
        return self._ready

    def lacking(self) -> Iterable[str]:
        """Adapters without which rows cannot start that would be next, the most urgent one first."""
        self.ready()
        return self._lacking

    def refresh(self) -> None:
        """Other adapters can be used than before."""
        self._ready = None

    def admit(self, plan: Plan, now: float) -> None:
        """Starts rows that run under this plan, as far as there is room.

        While a fold state is held, or some must end first, rows that cannot run give up their room for those that can.
        """
        places = self.max_batch - sum(self._runs(row, plan) for row in self._running)
        if places <= 0:
            return
        alone = plan.cause is Cause.HELD or self._only is not None
        for row in self._startable_alone(plan) if alone else self._startable():
            if not plan.runs(row.group):
                continue
            self._waiting.remove(row)
            self._running.start(row)
            self._ready = None
            if not row.admitted:
                row.admitted, row.swap_wait_before_start = now, row.swap_wait
                self._waiting.charge(row.request.deployment, len(row.request.prompt))
            places -= 1
            if not places:
                return

    def _runs(self, row: Row, plan: Plan) -> bool:
        return plan.runs(row.group) and self._may(row)

    def _startable_alone(self, plan: Plan) -> Iterator[Row]:
        """Rows that can start once those that do not run have given up their room; they do so as far as it takes."""
        for row in self._waiting.heads():
            if not self._runs(row, plan) or self._running.limited(row) or not self._can_use(row):
                continue
            while not self._running.fits(row):
                parked = [other for other in self._running if not self._runs(other, plan)]
                if not parked:
                    return
                self._preempt(parked[-1])
            yield row

    def _startable(self) -> Iterator[Row]:
        """Rows that could start now, whoever's turn it is; nobody behind one that waits for room."""
        for row in self._waiting.heads():
            if self._running.limited(row) or not self._may(row) or not self._can_use(row):
                continue
            if self._only is None and not self._running.fits(row):  # Else others give up their room for it.
                return
            yield row

    def _can_use(self, row: Row) -> bool:
        digest = row.request.adapter
        takes = self._adapters.takes(digest)
        if not takes and digest is not None:
            self._lacking[digest] = None
        return takes

    def _may(self, row: Row) -> bool:
        return self._only is None or row in self._only

    def remove(self, row: Row) -> None:
        """Forgets a row, wherever it is, and frees its room."""
        row.ended = True
        self._take_out(row)
        self._groups.leave(row)
        others = self._by_request[row.request.id]
        others.remove(row)
        if not others:
            del self._by_request[row.request.id]

    def _take_out(self, row: Row) -> None:
        if row in self._running:
            self._running.free(row)
        elif row in self._paused:
            del self._paused[row]
        else:
            self._waiting.remove(row)
        self._ready = None

    def move(self, row: Row, kind: PolicyKind) -> None:
        """From now on the row runs as rows of that policy do."""
        waits = row not in self._running and row not in self._paused
        if waits:
            self._waiting.remove(row)
        self._groups.leave(row)
        row.kind = kind
        self._groups.join(row)
        if waits:
            self._waiting.push(row)
        self._ready = None

    def is_paused(self, row: Row) -> bool:
        """True if nobody takes its answer at present."""
        return row in self._paused

    def forget_cache(self) -> None:
        """No key and no value is used again: running rows compute theirs anew."""
        for row in [*self._running]:
            self._preempt(row)
        self.pool.forget()

    def pause(self, row: Row) -> None:
        """Takes a row out until `resume`; what it computed is found again unless its room is needed meanwhile."""
        self._take_out(row)
        self._paused[row], row.stalled_once = None, True

    def resume(self, row: Row) -> None:
        """Puts a paused row at the head of its queue; others stay what they are."""
        if row in self._paused:
            del self._paused[row]
            self._waiting.push_front(row)
            self._ready = None

    def waited(self, seconds: float, plan: Plan | None = None) -> None:
        """Notes that rows which do not run under this plan, or all of them, waited."""
        self._groups.waited(seconds, plan)

    def schedule(self, plan: Plan) -> list[Part]:
        """One step: a token for each row that decodes, then what is to be read, up to the budget."""
        runs = [row for row in self._running if self._runs(row, plan)]
        decoding = [row for row in runs if decodes(row)][: self.max_batch]
        for row in decoding:
            self._make_room(row, plan)
        parts = [Part(row, 1, decodes=True, samples=True) for row in decoding if row in self._running]
        budget = max(self._prefill_tokens - len(parts), self.pool.size)
        for row in runs:
            if row in self._running and not decodes(row) and budget and len(parts) < self.max_batch:
                tokens = min(len(row.tokens) - row.cached, budget)
                parts.append(Part(row, tokens, decodes=False, samples=row.cached + tokens == len(row.tokens)))
                budget -= tokens
        return parts

    def _make_room(self, row: Row, plan: Plan) -> None:
        """Makes room for the row's tokens; the least urgent rows, itself perhaps, give theirs up for it."""
        while row in self._running:
            try:
                self._running.grow(row)
            except KvFull:
                self._preempt(self._least_urgent(row, plan))
            else:
                return

    def _least_urgent(self, row: Row, plan: Plan) -> Row:
        """Of the lowest priority, the row that started last; not `row` itself if then nothing could run."""
        others = [other for other in self._running if other is not row]
        alone = not any(self._runs(other, plan) for other in others)
        among = others if alone else [*self._running]
        return min(reversed(among), key=lambda one: one.request.priority)

    def _preempt(self, row: Row) -> None:
        row.preempted += 1
        self.preemptions += 1
        self._running.free(row)
        self._waiting.push_front(row)
        self._ready = None

    def ran(self, part: Part) -> int:
        """Notes that a part ran; returns how many prompt tokens that were never read before it read."""
        row = part.row
        assert row.holding is not None
        row.cached += part.tokens
        self.pool.seal(row.holding, row.tokens, row.cached)
        self._waiting.charge(row.request.deployment, part.samples)
        fresh = max(0, min(row.cached, len(row.request.prompt)) - row.read)
        row.read += fresh
        return fresh

    def check_integrity(self) -> None:
        """Running rows hold exactly the pages that are in use, and waiting ones none; every row is in its group."""
        self._running.check_integrity()
        known = len(self.rows)
        assert self._groups.total() == known == sum(len(rows) for rows in self._by_request.values())
