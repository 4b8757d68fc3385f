"""Whatever is asked of an engine, in whatever order: requests end once, answers are right, the base is as it was."""

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafold.engine.drains import Drained, DrainMode
from lorafold.errors import DeadlineExceeded, EngineStopped, FoldInProgress
from lorafold.requests import Failed, Finished
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.residency import Limits
from tests.engines import Bench, Collected
from tests.models import tiny_llama
from tests.test_parity import generated
from tests.test_residents import LENGTH, PROMPT, Crowd, crowd_of

MakeAdapter = Callable[..., Path]
OPERATIONS = 120


@dataclass
class Asked:
    """One request."""

    answer: Collected
    adapter: str | None
    may_fail: bool = False
    cancelled: bool = False
    stalled: bool = False


@dataclass
class Chaos:
    """Does one thing after the other, drawn at random."""

    crowd: Crowd
    numbers: random.Random
    asked: dict[str, Asked] = field(default_factory=dict)
    orders: list["Future[Drained]"] = field(default_factory=list)

    @property
    def engine(self) -> Any:
        return self.crowd.bench.engine

    def ask(self) -> None:
        name, adapter = str(len(self.asked)), self.numbers.choice([None, *self.crowd.digests])
        short = self.numbers.random() < 0.1
        request = self.crowd.bench.request(
            name,
            PROMPT,
            LENGTH,
            adapter=adapter,
            deployment=adapter or "base",
            policy=PolicyKind.UNMERGED if adapter is None else self.numbers.choice([*PolicyKind]),
            priority=self.numbers.choice([0, 0, 0, 5]),
            max_concurrency=self.numbers.choice([None, None, 1]),
            deadline=self.engine.now() + self.numbers.random() * 0.2 if short else None,
        )
        asked = self.asked[name] = Asked(Collected(), adapter, may_fail=short)
        if self.numbers.random() < 0.15:
            asked.stalled = True
        self.engine.submit(request, asked.answer, lambda: asked.stalled)

    def order(self) -> None:
        until = self.engine.now() + self.numbers.random() * 0.3
        adapter = self.numbers.choice([None, *self.crowd.digests])
        hold = self.numbers.random() < 0.5
        self.orders.append(self.crowd.bench.merge(adapter, self.numbers.choice([*DrainMode]), hold=hold, until=until))

    def withdraw(self) -> None:
        if self.orders:
            self.engine.withdraw(self.orders[-1])

    def cancel(self) -> None:
        if self.asked:
            name = self.numbers.choice([*self.asked])
            self.asked[name].cancelled = True
            self.engine.cancel(name)

    def go_on(self) -> None:
        for name, asked in self.asked.items():
            if asked.stalled:
                asked.stalled = False
                self.engine.resume(name)

    def let_go(self) -> None:
        self.engine.let_go().result(30)

    def wait(self) -> None:
        """A little, for whatever comes first."""
        if self.asked:
            self.numbers.choice([*self.asked.values()]).answer.done.wait(0.02)

    def finish(self) -> None:
        """Until everything has ended."""
        self.go_on()
        for done in self.orders:
            with contextlib.suppress(DeadlineExceeded, FoldInProgress, EngineStopped):
                done.result(30)
        self.let_go()
        for asked in self.asked.values():
            assert asked.cancelled or asked.answer.done.wait(60)
        self.engine.call(lambda: None).result(30)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_asked_in_whatever_order(seed: int, adapter_on_llama: MakeAdapter) -> None:
    numbers = random.Random(seed)
    limits = Limits(device_slots=numbers.choice([2, 3, 9]), device_bytes=1 << 40, host_bytes=1 << 40)
    with Bench(tiny_llama(), limits=limits, slots=numbers.choice([3, 8]), pages=numbers.choice([8, 40])) as bench:
        pristine = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
        crowd = crowd_of(bench, adapter_on_llama, 4)
        chaos = Chaos(crowd, numbers)
        steps = {chaos.ask: 10, chaos.wait: 5, chaos.order: 2, chaos.cancel: 1, chaos.go_on: 1, chaos.let_go: 1}
        steps[chaos.withdraw] = 1
        for step in numbers.choices([*steps], [*steps.values()], k=OPERATIONS):
            step()
        chaos.finish()
        bench.engine.call(bench.scheduler.check_integrity).result(30)
        assert bench.engine.call(lambda: (bench.scheduler.empty, bench.scheduler.adapters)).result(30) == (True, set())
        bench.unmerge().result(30)
        assert bench.engine.call(bench.manager.verify_base).result(30) == []
        check(chaos, generated(tiny_llama(), PROMPT, LENGTH))
        for digest in crowd.digests:
            assert bench.engine.call(partial(bench.residents._books.uses, digest)).result(30) == 0
    state = bench.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pristine.items())
    assert not [error for error in bench.recorder.death if error]


def check(chaos: Chaos, of_base: list[int]) -> None:
    """Every request has one end, and it is a right answer unless it could not be."""
    ends: dict[str, int] = defaultdict(int)
    for name, asked in chaos.asked.items():
        last = [event for event in asked.answer.events if isinstance(event, Finished | Failed)]
        assert len(last) <= 1
        if not last:
            assert asked.cancelled
            ends["cancelled"] += 1
            continue
        assert asked.answer.events[-1] is last[0]
        if isinstance(last[0], Failed):
            assert asked.may_fail, (name, last[0].error)
            assert isinstance(last[0].error, DeadlineExceeded)
            ends["late"] += 1
            continue
        assert asked.answer.tokens == (of_base if asked.adapter is None else chaos.crowd.expected[asked.adapter])
        ends["answered"] += 1
    assert ends["answered"] > OPERATIONS / 6
