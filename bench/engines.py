"""Our engine, as it is driven from Python: the real loop, scheduler, sampling and detokenising, without a server.

`engine_of` is the one place here where an engine is put together.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.work import Run, Work
from lorafold.config import PolicyConfig, ResidencyConfig
from lorafold.engine.budget import PAGE_TOKENS
from lorafold.engine.detokenize import remembering
from lorafold.engine.emit import Vocabulary
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.linear import choose_linear
from lorafold.engine.loop import Engine
from lorafold.engine.pages import PagePool
from lorafold.engine.probe import Probe
from lorafold.engine.residents import Residents
from lorafold.engine.runner import Runner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.step_clock import clock_for
from lorafold.engine.weights import WeightsControl
from lorafold.engine_parts import make_limits, make_policy
from lorafold.metrics import Metrics
from lorafold.model import use_our_attention
from lorafold.requests import Delta, Event, Failed, Finished, Request
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import PolicyKind

LONGEST = 600.0
"""Seconds after which an answer is given up."""


def engine_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    slots: int,
    context: int,
    prefill_tokens: int,
    compiled: bool = False,
    waiting: int | None = None,
    metrics: Metrics | None = None,
) -> tuple[Engine, AdapterManager, Probe]:
    """An engine on `model`, not started: `slots` sequences of `context` tokens, and as many or `waiting` that wait.

    And what times pairs of steps on it.
    """
    use_our_attention(model)
    choose_linear(model)
    manager = AdapterManager(model, max_delta_error=float("inf"))
    metrics, costs = metrics or Metrics(CollectorRegistry()), Costs()
    policy = make_policy(PolicyConfig(), costs)
    pool = PagePool(pages=1 + slots * -(-context // PAGE_TOKENS), size=PAGE_TOKENS)
    runner = Runner(model, manager, PagedCache(pages=pool.pages, size=pool.size))
    runner.warm_up()
    if compiled:
        runner.compile()
    residents = Residents(manager, make_limits(ResidencyConfig()))
    engine = Engine(
        runner=runner,
        weights=WeightsControl(manager, policy, costs, metrics, no_second_base),
        residents=residents,
        scheduler=Scheduler(
            pool=pool, adapters=residents, max_batch=slots, max_waiting=waiting or slots, prefill_tokens=prefill_tokens
        ),
        vocabulary=Vocabulary(
            decode=remembering(lambda ids: str(tokenizer.decode(list(ids)))), end_of_sequence=frozenset()
        ),
        observer=metrics,
        clock=clock_for(model.device),
        on_death=lambda _: None,
        overlap=model.device.type == "cuda",
    )
    return engine, manager, Probe(runner, manager, pool, clock_for(model.device))


def no_second_base() -> nn.Module:
    """What is called to load a damaged base again: nothing here damages it."""
    raise RuntimeError("the base was damaged while it was measured")


class Driven:
    """An engine with adapters that can be put on and taken off. A context manager that runs it."""

    def __init__(self, engine: Engine, manager: AdapterManager) -> None:
        self._engine = engine
        self._manager = manager

    def __enter__(self) -> "Driven":
        self._engine.start()
        self._bare = self._classes()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    @property
    def manager(self) -> AdapterManager:
        """What is on the model. Reading tensors of it is safe while no work is done."""
        return self._manager

    def put_on(self, adapters: Sequence[BoundAdapter]) -> None:
        """Puts adapters on the model, as creating deployments does."""
        for bound in adapters:
            self.call(partial(self._engine.residents.acquire, bound, ""))

    def take_off(self, adapters: Sequence[BoundAdapter]) -> None:
        """Gives the base back and drops the adapters. Raises RuntimeError unless every module is what it was."""
        for bound in adapters:
            self.call(partial(self._engine.residents.release, bound.digest, ""))
        self.call(lambda: self._engine.residents.sweep(set()))
        if self._manager.adapters or self._classes() != self._bare:
            raise RuntimeError("the model is not what it was before adapters were on it")

    def run(self, work: Work, adapters: Sequence[BoundAdapter] = (), policy: PolicyKind = PolicyKind.UNMERGED) -> Run:
        """Does `work`; its rows take `adapters` in turn, or the base if there are none."""
        return answer(self._engine, work, [bound.digest for bound in adapters], policy)

    def call(self, function: Callable[[], object]) -> None:
        """Runs `function` on the engine's thread."""
        self._engine.call(function).result(LONGEST)

    def _classes(self) -> list[type]:
        return [type(module) for module in self._manager.model.modules()]


def answer(engine: Engine, work: Work, digests: Sequence[str], policy: PolicyKind) -> Run:
    """Hands all rows over between two steps and waits for the last. Raises what a failed row says."""
    rows = [Collected() for _ in work.prompts]
    start = time.perf_counter()

    def submit() -> None:
        for number, (prompt, row) in enumerate(zip(work.prompts, rows, strict=True)):
            adapter = digests[number % len(digests)] if digests else None
            engine.submit(request(engine, prompt, adapter, policy, work.answer), row)

    engine.call(submit).result(LONGEST)
    for row in rows:
        row.wait()
    return Run(
        tokens=tuple(tuple(row.tokens) for row in rows), times=tuple(tuple(row.times) for row in rows), start=start
    )


def request(engine: Engine, prompt: tuple[int, ...], adapter: str | None, policy: PolicyKind, answer: int) -> Request:
    """A greedy request that arrives now, of the deployment of its adapter."""
    return Request(
        id=uuid.uuid4().hex,
        deployment=adapter or "base",
        adapter=adapter,
        policy=policy,
        prompt=prompt,
        max_tokens=answer,
        arrived=engine.now(),
    )


class Collected:
    """The sink of one row."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._last: Event | None = None
        self._done = threading.Event()

    def __call__(self, event: Event) -> None:
        """Called on the engine's thread."""
        if isinstance(event, Delta):
            self.times.append(time.perf_counter())
            self.tokens.append(event.token_id)
        elif isinstance(event, Finished | Failed):
            self._last = event
            self._done.set()

    def wait(self) -> None:
        """Until the last event. Raises the error of a failed row, or TimeoutError."""
        if not self._done.wait(LONGEST):
            raise TimeoutError(f"no answer in {LONGEST:.0f} s")
        if isinstance(self._last, Failed):
            raise self._last.error
