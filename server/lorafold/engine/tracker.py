"""Requests in the engine from their acceptance to their end, of which each is told exactly once.

Runs on the engine's thread. Knows no tensors, no weights and no policy.
"""

from collections.abc import Callable

import structlog

from lorafold.engine.answers import Answers
from lorafold.engine.deadlines import Deadlines
from lorafold.engine.emit import Vocabulary
from lorafold.engine.residents import Residents
from lorafold.engine.rows import Row
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.start_times import StartTimes
from lorafold.errors import DeadlineExceeded, StepFailed
from lorafold.requests import Failed, Request, Sink, Stalled
from lorafold_adapters.errors import LorafoldError
from lorafold_adapters.policy import Hold

log = structlog.get_logger(__name__)


class Tracker:
    """Puts requests into the scheduler, and takes them out when they end."""

    def __init__(
        self,
        scheduler: Scheduler,
        residents: Residents,
        vocabulary: Vocabulary,
        now: Callable[[], float],
        *,
        overlap: bool,
    ) -> None:
        """`now`: the engine's clock. `overlap`: whether answers are told while the next step runs."""
        self.answers = Answers(vocabulary, overlap=overlap, done=self._done, fail=self.fail)
        self._scheduler = scheduler
        self._residents = residents
        self._vocabulary = vocabulary
        self._now = now
        self._deadlines = Deadlines()
        self._start_times = StartTimes()

    @property
    def next_deadline(self) -> float | None:
        """When the next one passes; None if none does."""
        return self._deadlines.next

    def accept(self, request: Request, sink: Sink, stalled: Stalled, *, predictable: bool) -> None:
        """Queues a request, or tells it why not.

        `predictable`: whether rows start as they usually do, so that one which cannot before its deadline is refused.
        """
        try:
            if request.adapter is not None:
                self._residents.require(request.adapter)
            rows = self._vocabulary.rows(request, sink, stalled)
            if predictable:
                ahead, places = self._scheduler.ahead_of(rows[0])
                self._start_times.check(rows[0], ahead=ahead, places=places, now=self._now())
            self._scheduler.add(*rows)
            self._deadlines.add(rows[0])
        except LorafoldError as error:
            sink(Failed(error))
        except Exception as error:
            log.error("request not accepted", request=request.id, exc_info=True)
            sink(Failed(StepFailed(f"the request could not be started ({error})")))

    def cancel(self, request_id: str) -> None:
        """Ends a request without an event."""
        for row in self._scheduler.of_request(request_id):
            self._scheduler.remove(row)

    def resume(self, request_id: str) -> None:
        """Goes on with a paused request."""
        for row in self._scheduler.of_request(request_id):
            self._scheduler.resume(row)

    def expire(self, now: float, held: Hold | None) -> None:
        """Fails the requests whose deadline has passed. `held`: what an operator keeps folded meanwhile."""
        for row in self._deadlines.passed(now):
            remedy = "allow more time or fewer max_tokens"
            if held is not None and held.folded != row.request.adapter:
                remedy = "what is folded is held by hand, which 'lorafold weights release' ends"
            self.fail(row, DeadlineExceeded(f"the request's deadline passed: {remedy}"))

    def fail_all(self, error: LorafoldError, those: Callable[[Row], bool] = lambda _: True) -> None:
        """Ends all requests of which one of `those` rows is."""
        for row in [row for row in self._scheduler.rows if those(row)]:
            self.fail(row, error)

    def fail(self, row: Row, error: LorafoldError) -> None:
        """Ends the row, and with it the other completions of its request; what was chosen is told first."""
        self.answers.tell_rest()
        if row.ended:
            return
        for other in self._scheduler.of_request(row.request.id):
            self._scheduler.remove(other)
        try:
            row.sink(Failed(error))
        except Exception:
            log.error("nobody to tell", request=row.request.id, exc_info=True)

    def _done(self, row: Row) -> None:
        self._start_times.ended(row, self._now())
        self._scheduler.remove(row)
