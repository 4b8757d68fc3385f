"""An engine without a server: requests in, events out."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorafold.config import ResidencyConfig
from lorafold.engine.attention_means import Means
from lorafold.engine.detokenize import Decode
from lorafold.engine.drains import Drained, DrainMode, Order
from lorafold.engine.emit import Vocabulary
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.loop import Engine
from lorafold.engine.observer import Load, Phase
from lorafold.engine.pages import PagePool
from lorafold.engine.residents import Places, Residents
from lorafold.engine.runner import Runner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.step_clock import clock_for
from lorafold.engine.weights import WeightsControl
from lorafold.engine.weights_state import Change
from lorafold.engine_parts import make_limits
from lorafold.model import use_our_attention
from lorafold.requests import Delta, Event, Failed, Finished, Request
from lorafold_adapters import AdapterManager
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import Mode, Plan, PolicyKind
from lorafold_adapters.residency import Limits
from lorafold_adapters.turns import MeasuredTurns
from tests.models import tiny_llama

PAGE = 16


@dataclass
class Collected:
    """The events of one request."""

    completions: int = 1
    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.completions -= isinstance(event, Finished)
        if self.completions == 0 or isinstance(event, Failed):
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Delta)]

    @property
    def last(self) -> Event:
        assert self.done.wait(60)
        return self.events[-1]


@dataclass
class Recorder:
    """What the engine told."""

    steps: list[Mode] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    death: list[BaseException | None] = field(default_factory=list)
    health: list[bool] = field(default_factory=list)

    def step(self, phase: Phase, mode: Mode, seconds: float) -> None:
        self.steps.append(mode)

    def tokens(self, deployment: str, mode: Mode, *, prompt: int, answer: int) -> None:
        pass

    def token(self, deployment: str, mode: Mode, seconds: float, *, first: bool) -> None:
        pass

    def planned(self, plan: Plan) -> None:
        self.plans.append(plan)

    def changed(self, change: Change) -> None:
        self.changes.append(change)

    def held(self, held: bool) -> None:
        pass

    def verified(self, whole: bool) -> None:
        pass

    def load(self, load: Load) -> None:
        pass

    def places(self, places: Places) -> None:
        pass


class Bench:
    """One model with an engine on it. Use as a context manager."""

    def __init__(
        self,
        model: Any,
        *,
        slots: int = 8,
        length: int = 512,
        pages: int | None = None,
        prefill: int = 64,
        turn: float = 0.01,
        means: Means | None = None,
        load_base: Callable[[], nn.Module] = tiny_llama,
        overlap: bool = False,
        limits: Limits | None = None,
        decode: Decode = lambda ids: "x" * len(ids),
    ) -> None:
        use_our_attention(model)
        self.model = model
        self.manager = AdapterManager(model)
        self.recorder = Recorder()
        costs = Costs()
        pool = PagePool(pages=pages or 1 + slots * -(-length // PAGE), size=PAGE)
        self.runner = Runner(model, self.manager, PagedCache(pages=pool.pages, size=PAGE), means)
        self.residents = Residents(self.manager, limits or make_limits(ResidencyConfig()))
        self.scheduler = Scheduler(
            pool=pool, adapters=self.residents, max_batch=slots, max_waiting=1000, prefill_tokens=prefill
        )
        self.engine = Engine(
            runner=self.runner,
            weights=WeightsControl(
                self.manager, MeasuredTurns(costs, swap_share=0.5, max_wait=turn), costs, self.recorder, load_base
            ),
            residents=self.residents,
            scheduler=self.scheduler,
            vocabulary=Vocabulary(decode=decode, end_of_sequence=frozenset()),
            observer=self.recorder,
            clock=clock_for(model.device),
            on_death=self.recorder.death.append,
            on_health=self.recorder.health.append,
            overlap=overlap,
        )

    def __enter__(self) -> "Bench":
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()

    def load(self, adapter: Any) -> str:
        """Puts an adapter on the model; its digest."""
        bound = self.manager.bind(adapter)
        self.engine.call(lambda: self.residents.acquire(bound, str(adapter))).result(60)
        return bound.digest

    def merge(self, adapter: str | None, mode: DrainMode = DrainMode.PARK, **order: Any) -> "Future[Drained]":
        """As MergeAdapter does; None is the base, and held."""
        given = {"folded": adapter, "hold": True, "mode": mode, "until": None}
        return self.engine.order(Order(**{**given, **order}))

    def unmerge(self, mode: DrainMode = DrainMode.PARK, **order: Any) -> "Future[Drained]":
        """As UnmergeAdapter does."""
        return self.merge(None, mode, **{"hold": False, **order})

    def request(self, name: str, prompt: Sequence[int], max_tokens: int = 8, **fields: Any) -> Request:
        """A request that arrives now."""
        given = {
            "id": name,
            "deployment": "d",
            "adapter": None,
            "policy": PolicyKind.UNMERGED,
            "prompt": tuple(prompt),
            "max_tokens": max_tokens,
            "arrived": self.engine.now(),
        }
        return Request(**{**given, **fields})

    def submit(self, name: str, prompt: Sequence[int], max_tokens: int = 8, **fields: Any) -> Collected:
        request = self.request(name, prompt, max_tokens, **fields)
        collected = Collected(request.n)
        self.engine.submit(request, collected)
        return collected
