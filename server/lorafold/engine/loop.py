"""The engine thread: it alone touches the model. One step = plan, schedule, run, emit.

Everybody else puts requests and commands into the inbox, which is read between steps.
"""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

import structlog
import torch

from lorafold.engine.answers import Answers
from lorafold.engine.departures import Departures
from lorafold.engine.emit import Vocabulary
from lorafold.engine.inbox import GONE, Command, Inbox
from lorafold.engine.observer import Observer, mode_of, observe
from lorafold.engine.runner import Piece, Runner
from lorafold.engine.sampling import Chosen, sample
from lorafold.engine.scheduler import Part, Row, Scheduler
from lorafold.engine.weights import Change, TurnFailed, WeightsControl
from lorafold.errors import BaseReloading, DeadlineExceeded, EngineStopped, StepFailed
from lorafold.requests import Failed, Provenance, Request, Sink
from lorafold_adapters.errors import DeviceFull, LorafoldError
from lorafold_adapters.policy import Lane, PolicyKind

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Engine:
    """Runs requests. `submit`, `cancel`, `call` and `stop` may be called from any thread."""

    def __init__(
        self,
        *,
        runner: Runner,
        weights: WeightsControl,
        scheduler: Scheduler,
        vocabulary: Vocabulary,
        observer: Observer,
        on_death: Callable[[BaseException | None], object],
        on_health: Callable[[bool], object] = lambda _: None,
        overlap: bool = False,
    ) -> None:
        """`on_health` is told False while the base is damaged, and True when it is whole again.

        `overlap`: whether answers are told while the next step runs, which pays where that is on another device.
        """
        self.weights = weights
        """Only for functions handed to `call`."""
        self._runner = runner
        self._scheduler = scheduler
        self._vocabulary = vocabulary
        self._answers = Answers(vocabulary, overlap=overlap, done=scheduler.remove, fail=self._fail)
        self._observer = observer
        self._on_death = on_death
        self._on_health = on_health
        self._inbox = Inbox()
        self._departures = Departures()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="lorafold-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the current step; requests that still run fail with EngineStopped."""
        self._inbox.put(Command(self._stop, lambda _: None))
        self._thread.join()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queues a request; everything that becomes of it, refusals too, arrives at `sink`."""
        self._inbox.put(Command(lambda: self._accept(request, sink), lambda error: sink(Failed(error))))

    def cancel(self, request_id: str) -> None:
        """Ends a request before the next step, without an event. Unknown ones are ignored."""
        self._inbox.put(Command(lambda: self._cancel(request_id), lambda _: None))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Runs `function` on the engine's thread between two steps."""
        return self._inbox.call(function)

    def merge(self, adapter: str) -> "Future[Change]":
        """Folds `adapter` before the next step and keeps it folded; its own running rows go on folded."""
        return self.call(lambda: self._merge(adapter))

    def unmerge(self) -> "Future[Change]":
        """Gives the base back before the next step, and the weights to the policy."""
        return self.call(self._unmerge)

    def watch(self, adapter: str, tell: Callable[[int | None], object]) -> None:
        """Tells, as `Departures.watch`, how an adapter that no deployment points at leaves the device."""
        self._inbox.put(Command(lambda: self._departures.watch(adapter, tell), lambda _: tell(None)))

    def release(self) -> None:
        """Gives the weights to the policy before the next step if an adapter is held, without waiting for it."""
        self.call(lambda: self.weights.held and self._unmerge())

    @staticmethod
    def now() -> float:
        """The engine's clock, seconds."""
        return time.monotonic()

    # The rest runs on the engine's thread.

    def _main(self) -> None:
        cause: BaseException | None = None
        try:
            self._runner.use_device()
            while not self._stopping:
                self._inbox.run_all(wait=0 if self._scheduler.rows else None)
                self._expire()
                if self.weights.damaged:
                    self._recover()
                self._step()
                self._tidy()
        except BaseException as error:
            cause = error
            log.critical("engine died", error=repr(error), exc_info=True)
        finally:
            self._inbox.close()
            for row in self._scheduler.rows:
                self._fail(row, EngineStopped(GONE))
            self._departures.close()
            self._on_death(cause)

    def _stop(self) -> None:
        self._stopping = True

    def _accept(self, request: Request, sink: Sink) -> None:
        try:
            if request.adapter is not None:
                self.weights.require(request.adapter)
            self._scheduler.add(*self._vocabulary.rows(request, sink))
        except LorafoldError as error:
            sink(Failed(error))
        except Exception as error:
            log.error("request not accepted", request=request.id, exc_info=True)
            sink(Failed(StepFailed(f"the request could not be started ({error})")))

    def _cancel(self, request_id: str) -> None:
        for row in self._scheduler.rows:
            if row.request.id == request_id:
                self._scheduler.remove(row)

    def _merge(self, adapter: str) -> Change:
        self._answers.tell_rest()
        change = self.weights.pin(adapter)
        for row in self._scheduler.running:
            if row.request.adapter == adapter:
                row.lane = adapter
        self._scheduler.requeue(row for row in self._scheduler.running if row.lane != adapter)
        return change

    def _unmerge(self) -> Change:
        self._answers.tell_rest()
        change = self.weights.unpin()
        for row in self._scheduler.running:
            if row.request.policy is PolicyKind.UNMERGED:
                row.lane = None
        return change

    def _expire(self) -> None:
        now = self.now()
        for row in self._scheduler.rows:
            if row.request.deadline is not None and now > row.request.deadline:
                remedy = "allow more time or fewer max_tokens"
                if self.weights.held not in (None, row.lane):
                    remedy = "an adapter is held folded, which UnmergeAdapter ends (lorafold weights unmerge)"
                self._fail(row, DeadlineExceeded(f"the request's deadline passed: {remedy}"))

    def _tidy(self) -> None:
        if not self._scheduler.rows:
            self._scheduler.check_integrity()
        self._observer.queues(self._scheduler.waiting, len(self._scheduler.running), self._scheduler.preemptions)
        self.weights.sweep({row.request.adapter for row in self._scheduler.rows if row.request.adapter is not None})
        self._departures.look(self._scheduler.rows, self.weights.leaving)

    def _step(self) -> None:
        """Plan, schedule, run, emit."""
        lanes = self._admitted()
        if len(lanes) != 1:  # No step follows, or a fold may come first.
            self._answers.tell_rest()
        if not lanes:
            if self._scheduler.waiting:
                self._wait_for_a_command()
            return
        start = self.now()
        try:
            lane = self.weights.next_lane(lanes, start)
        except TurnFailed as failure:
            self._turn_failed(failure)
            return
        planned = self.now()
        self._wait(self._scheduler.running, planned - start)
        if parts := self._scheduler.schedule(lane):
            self._run(parts, lane)
        elif self.weights.held is not None:
            self._wait_for_a_command()
        self._wait((row for row in self._scheduler.running if row.lane != lane), self.now() - planned)

    def _admitted(self) -> dict[Lane, int]:
        """Starts the rows that there is room for; how many run, by lane."""
        lanes = self._scheduler.lanes
        self._scheduler.admit(
            lambda row: self.weights.lane(row.request.adapter, row.request.policy, lanes()),
            self.now(),
            held=self.weights.held,
        )
        return lanes()

    def _wait_for_a_command(self) -> None:
        """An operator holds the weights and no row may run: only a command, or a deadline, changes that."""
        self._answers.tell_rest()
        held = self.weights.held
        self._tidy()  # Or what the last commands removed would stay until the next one.
        if self.weights.held != held:
            return
        deadlines = [row.request.deadline for row in self._scheduler.rows if row.request.deadline is not None]
        self._inbox.run_all(wait=max(0.001, min(deadlines) - self.now()) if deadlines else None)

    def _turn_failed(self, failure: TurnFailed) -> None:
        """Rows that may run two-path do; the others fail with the reason."""
        log.error("fold failed", adapter=failure.lane, error=str(failure.error))
        for row in self._scheduler.running:
            if row.lane == failure.lane and row.request.policy is PolicyKind.MERGED:
                self._fail(row, failure.error)
            elif row.lane == failure.lane:
                row.lane = None

    def _recover(self) -> None:
        """Nothing runs on a damaged base, and nothing that ran on it goes on. Raises BaseCorrupt if that stays."""
        self._on_health(False)
        for row in [row for row in self._scheduler.rows if row.read]:
            self._fail(
                row, BaseReloading("the base was found damaged and is being loaded again: send the request again")
            )
        self.weights.recover()
        self._scheduler.pool.forget()
        self._on_health(True)

    def _run(self, parts: list[Part], lane: Lane) -> None:
        start = self.now()
        pieces = [
            Piece(
                tokens=part.row.tokens[part.row.cached : part.row.cached + part.tokens],
                pages=part.row.pages,
                past=part.row.cached,
                adapter=part.row.request.adapter if lane is None else None,
                samples=part.samples,
            )
            for part in parts
        ]
        try:
            logits_SV = self._runner.run(pieces)
            self._answers.tell_rest()  # On a GPU that step still runs. Choosing tokens may wait for it.
            sampling = [part.row for part in parts if part.samples]
            chosen = sample(logits_SV, [row.sampling for row in sampling]) if sampling else None
            read = [0 if part.row.ended else self._scheduler.ran(part) for part in parts]
            self._extend(sampling, chosen, lane)
        except torch.AcceleratorError:
            raise  # The device's context is lost, and with it every later step.
        except Exception as error:
            self._step_failed(parts, error)
            return
        observe(self._observer, parts, read, lane, self.now() - start)

    def _step_failed(self, parts: list[Part], error: Exception) -> None:
        log.error("step failed", requests=[part.row.request.id for part in parts], exc_info=True)
        told: LorafoldError = StepFailed(f"the model failed on this batch ({error}): send the request again")
        if isinstance(error, torch.OutOfMemoryError):
            told = DeviceFull("the device's memory is full: lower engine.kv_memory_gib or engine.prefill_tokens")
        for part in parts:
            if part.row in self._scheduler.running:
                self._fail(part.row, told)

    def _extend(self, rows: list[Row], chosen: Chosen | None, lane: Lane) -> None:
        """Adds the chosen tokens, once they are there."""
        if chosen is None:
            return
        picks = chosen.read()
        generation = self.weights.state.generation
        told = [Provenance(mode=mode_of(row, lane), generation=generation) for row in rows]
        self._answers.extend(rows, picks, told, self.now())

    @staticmethod
    def _wait(rows: Iterable[Row], seconds: float) -> None:
        for row in rows:
            row.swap_wait += seconds

    def _fail(self, row: Row, error: LorafoldError) -> None:
        """Ends the row, and with it the other completions of its request; what was chosen is told first."""
        self._answers.tell_rest()
        if row.ended:
            return
        several = row.request.n > 1
        for other in [each for each in self._scheduler.rows if each.request is row.request] if several else [row]:
            self._scheduler.remove(other)
        try:
            row.sink(Failed(error))
        except Exception:
            log.error("nobody to tell", request=row.request.id, exc_info=True)
