"""The engine thread: it alone touches the model. One step = plan, schedule, run, emit.

Everybody else puts requests and commands into the inbox, which is read between steps.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import structlog

from lorafold.engine.departures import Departures
from lorafold.engine.drains import Drained, Drains, Order
from lorafold.engine.emit import Vocabulary
from lorafold.engine.inbox import GONE, Command, Inbox
from lorafold.engine.observer import Load, Observer
from lorafold.engine.residents import Residents
from lorafold.engine.runner import Runner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.step_clock import StepClock
from lorafold.engine.stepper import Stepper
from lorafold.engine.tracker import Tracker
from lorafold.engine.traffic import Traffic
from lorafold.engine.weights import TurnFailed, WeightsControl
from lorafold.engine.weights_state import WeightsState
from lorafold.errors import BaseReloading, EngineStopped
from lorafold.requests import Failed, Request, Sink, Stalled
from lorafold_adapters.errors import LorafoldError
from lorafold_adapters.policy import Group, Plan, PolicyKind

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Engine:
    """Runs requests. `submit`, `cancel`, `call` and `stop` may be called from any thread."""

    def __init__(
        self,
        *,
        runner: Runner,
        weights: WeightsControl,
        residents: Residents,
        scheduler: Scheduler,
        vocabulary: Vocabulary,
        observer: Observer,
        clock: StepClock,
        on_death: Callable[[BaseException | None], object],
        on_health: Callable[[bool], object] = lambda _: None,
        overlap: bool = False,
    ) -> None:
        """`on_health` is told False while the base is damaged, and True when it is whole again.

        `overlap`: whether answers are told while the next step runs, which pays where that is on another device.
        """
        self.weights = weights
        """Only for functions handed to `call`."""
        self.residents = residents
        """Likewise."""
        self.traffic = Traffic()
        """Likewise."""
        residents.connect(changed=scheduler.refresh, give_back=weights.give_back)
        self._scheduler = scheduler
        self._requests = Tracker(scheduler, residents, vocabulary, self.now, overlap=overlap)
        self._answers = self._requests.answers
        self._stepper = Stepper(runner, weights, scheduler, self._requests, observer, clock)
        self._observer = observer
        self._on_death = on_death
        self._on_health = on_health
        self._inbox = Inbox()
        self._drains = Drains(scheduler, weights, residents, self.now)
        self._departures = Departures()
        self._stopping = False
        self._idle = True
        """True if no row can run before a command comes, or a deadline passes."""
        self._counted = self.now()
        """Until when it is known which rows waited for their turn."""
        self._thread = threading.Thread(target=self._main, name="lorafold-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the current step; requests that still run fail with EngineStopped."""
        self._inbox.put(Command(self._stop, lambda _: None))
        self._thread.join()

    def submit(self, request: Request, sink: Sink, stalled: Stalled = lambda: False) -> None:
        """Queues a request; everything that becomes of it, refusals too, arrives at `sink`.

        Once `stalled` is true, asked on the engine's thread after each token, the request pauses until `resume`.
        """
        self._inbox.put(Command(lambda: self._accept(request, sink, stalled), lambda error: sink(Failed(error))))

    def resume(self, request_id: str) -> None:
        """Goes on with a paused request. Others, and unknown ones, are left alone."""
        self._inbox.put(Command(lambda: self._requests.resume(request_id), lambda _: None))

    def cancel(self, request_id: str) -> None:
        """Ends a request before the next step, without an event. Unknown ones are ignored."""
        self._inbox.put(Command(lambda: self._requests.cancel(request_id), lambda _: None))

    def fail_all(self, why: str) -> None:
        """Ends all requests before the next step with EngineStopped."""
        self.call(lambda: self._requests.fail_all(EngineStopped(why)))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Runs `function` on the engine's thread between two steps."""
        return self._inbox.call(function)

    async def asked(self, function: Callable[[], T]) -> T:
        """The same for an event loop, which goes on meanwhile. Raises what the function raises."""
        return await asyncio.wrap_future(self.call(function))

    def order(self, order: Order) -> "Future[Drained]":
        """Folds an adapter or gives the base back, over the policy, once those in flight let it.

        The future fails with FoldInProgress, DeadlineExceeded, or what the change of the weights raises.
        """
        done: Future[Drained] = Future()
        self._inbox.put(Command(lambda: self._begin(order, done), done.set_exception))
        return done

    def withdraw(self, done: "Future[Drained]") -> None:
        """Gives up an order that nobody waits for any more, unless it was carried out."""
        self._inbox.put(Command(lambda: self._drains.cancel(done), lambda _: None))

    def let_go(self) -> "Future[WeightsState]":
        """Hands the weights to the policy before the next step, as they are."""
        return self.call(self.weights.let_go)

    def wind_down(self) -> "Future[WeightsState]":
        """Nothing is ordered or held any more, so that requests in flight can finish."""
        self.call(lambda: self._drains.give_up(EngineStopped("the server is stopping, nothing was changed")))
        return self.let_go()

    @property
    def idle(self) -> bool:
        """True if there are no requests; only for functions handed to `call`."""
        return self._scheduler.empty

    def wanted(self) -> bool:
        """True if a command waits; likewise."""
        return not self._inbox.empty

    @property
    def under_way(self) -> str:
        """What an order waits for, for people; only for functions handed to `call`."""
        return self._drains.told

    def queued(self) -> "Future[dict[Group, tuple[int, int]]]":
        """Running and waiting rows, by adapter and policy."""
        return self.call(self._scheduler.queued)

    def watch(self, adapter: str, tell: Callable[[int | None], object]) -> None:
        """Tells, as `Departures.watch`, how an adapter that no deployment points at leaves the device."""
        self._inbox.put(Command(lambda: self._departures.watch(adapter, tell), lambda _: tell(None)))

    @staticmethod
    def now() -> float:
        """The engine's clock, seconds."""
        return time.monotonic()

    # The rest runs on the engine's thread.

    def _main(self) -> None:
        cause: BaseException | None = None
        try:
            self._stepper.use_device()
            while not self._stopping:
                self._inbox.run_all(wait=self._patience())
                self._requests.expire(self.now(), self.weights.held)
                self._step()
                self._tidy()
        except BaseException as error:
            cause = error
            log.critical("engine died", error=repr(error), exc_info=True)
        finally:
            self._inbox.close()
            self._drains.give_up(EngineStopped(GONE))
            self._requests.fail_all(EngineStopped(GONE))
            self._departures.close()
            self._on_death(cause)

    def _stop(self) -> None:
        self._stopping = True

    def _accept(self, request: Request, sink: Sink, stalled: Stalled) -> None:
        self._count_waits()
        known = self.weights.held is None and not self._drains.active
        self._requests.accept(request, sink, stalled, predictable=known)

    def _begin(self, order: Order, done: "Future[Drained]") -> None:
        try:
            self._drains.begin(order, done)
        except LorafoldError as error:
            done.set_exception(error)

    def lost(self, adapter: str, error: LorafoldError) -> None:
        """An adapter could not be brought: its requests fail. On the engine's thread."""
        self.residents.failed(adapter)
        self._drains.lost(adapter, error)
        self._requests.fail_all(error, lambda row: row.request.adapter == adapter)

    def _tidy(self) -> None:
        if self._scheduler.empty:
            self._scheduler.check_integrity()
        self._observer.load(load_of(self._scheduler))
        held = self.weights.held
        if not self.weights.damaged:
            self.residents.sweep(self._needed)
        self._observer.places(self.residents.places)
        self._idle = self._idle and self.weights.held == held
        self._departures.look(self._scheduler, self.residents.leaving)

    @property
    def _needed(self) -> set[str]:
        """Adapters that must stay known, whether or not a deployment points at them."""
        ordered = self._drains.adapter
        return self._scheduler.adapters | ({ordered} if ordered is not None else set())

    def _patience(self) -> float | None:
        """How long to wait for a command: not at all while rows run, and else until a deadline passes."""
        if not self._idle:
            return 0
        until = min((at for at in (self._requests.next_deadline, self._drains.until) if at is not None), default=None)
        return None if until is None else max(0.001, until - self.now())

    def _step(self) -> None:
        """Plan, schedule, run, emit."""
        self._heal()
        if self._drains.active:
            self._answers.tell_rest()
            self._drains.advance()
            self._heal()
        held, ordered = self.weights.held, self._drains.adapter
        self.residents.hold(held.folded if held is not None else None)
        self.residents.bring([*([ordered] if ordered is not None else []), *self._scheduler.lacking()])
        ready = self._scheduler.ready()
        self._idle = not ready
        if self._idle:
            self._answers.tell_rest()
            self.weights.pause()
            return
        start = self._count_waits()
        self.traffic.note(ready, start)
        plan = self.weights.plan(ready, self._scheduler.max_batch, start, draining=self._drains.active)
        if self.weights.needs_change(plan) and not self._changed(plan):
            return
        planned = self._count_waits(everybody=True)
        self._scheduler.admit(plan, planned)
        if parts := self._scheduler.schedule(plan):
            self._stepper.run(parts, plan)
        self._idle = not parts

    def _count_waits(self, *, everybody: bool = False) -> float:
        """Notes that all rows, or those that the present plan does not run, waited since the last call; the time."""
        now = self.now()
        self._scheduler.waited(now - self._counted, None if everybody else self.weights.decision)
        self._counted = now
        return now

    def _changed(self, plan: Plan) -> bool:
        """Makes the weights what the plan needs; False if that failed, and rows that cannot do without have failed."""
        self._answers.tell_rest()
        try:
            self.weights.carry_out(plan)
        except TurnFailed as failure:
            log.error("fold failed", adapter=failure.adapter, error=str(failure.error))
            merged = (failure.adapter, PolicyKind.MERGED)
            self._requests.fail_all(failure.error, lambda row: row.group == merged)
            return False
        return True

    def _heal(self) -> None:
        """Nothing runs on a damaged base, and nothing that ran on it goes on. Raises BaseCorrupt if that stays."""
        if not self.weights.damaged:
            return
        self._on_health(False)
        told = BaseReloading("the base was found damaged and is being loaded again: send the request again")
        self._requests.fail_all(told, lambda row: row.read > 0)
        self._scheduler.forget_cache()
        self.weights.recover()
        self._on_health(True)


def load_of(scheduler: Scheduler) -> Load:
    """What it has to do."""
    pool = scheduler.pool
    return Load(
        waiting=scheduler.waiting,
        running=len(scheduler.running),
        cache_usage=pool.used / max(1, pool.pages - 1),
        preemptions=scheduler.preemptions,
    )
