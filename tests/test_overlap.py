"""Answers that are told while the next step runs. Oracle: the same requests told at once.

Where the model runs on the CPU that gains nothing; it is the way on a GPU, and the same code.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafold.requests import Delta, Event, Failed, Finished, Sampling, Started
from lorafold_adapters.policy import PolicyKind
from tests.engines import Bench, Collected
from tests.models import prompts, tiny_llama

MakeAdapter = Callable[..., Path]
PROMPTS: list[list[int]] = prompts(6, 8).tolist()
PAGES_FOR_SOME = 12


def told(event: Event) -> object:
    """What of an event does not depend on time."""
    if isinstance(event, Started):
        return (event.index, event.provenance.mode)
    if isinstance(event, Finished):
        return (event.index, event.text, event.reason, event.stop, event.completion_tokens)
    return event


def mixed_answers(make_adapter: MakeAdapter, overlap: bool) -> tuple[list[list[object]], int]:
    """The events of a mixed load, and how often a row gave up its room."""
    with Bench(tiny_llama(), overlap=overlap, pages=PAGES_FOR_SOME, turn=0.0) as bench:
        folded, beside = (bench.load(make_adapter(seed)) for seed in (1, 2))
        kinds: list[dict[str, Any]] = [
            {"sampling": Sampling(temperature=1.5, top_p=0.9, seed=4), "logprobs": 2},
            {"stop": ("xxxxx",)},
            {"sampling": Sampling(temperature=1.0, seed=9), "n": 2},
            {"adapter": folded, "policy": PolicyKind.MERGED},
            {"adapter": beside},
            {"max_tokens": 1},
        ]
        answers = [
            bench.submit(str(place), prompt, **{"max_tokens": 40, **kind})
            for place, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True))
        ]
        assert all(isinstance(answer.last, Finished) for answer in answers)
        preemptions = bench.engine.call(lambda: bench.scheduler.preemptions).result(60)
    events = [sorted(answer.events, key=lambda event: getattr(event, "index", 0)) for answer in answers]
    return [[told(event) for event in some] for some in events], preemptions


def wait_for_tokens(answer: Collected, count: int) -> None:
    until = time.monotonic() + 60
    while len(answer.tokens) < count:
        assert time.monotonic() < until
        time.sleep(0)


def test_the_same_is_told_in_the_same_order(adapter_on_llama: MakeAdapter) -> None:
    at_once, before = mixed_answers(adapter_on_llama, overlap=False)
    later, after = mixed_answers(adapter_on_llama, overlap=True)
    assert later == at_once
    assert min(before, after) > 0
    assert at_once[0] != at_once[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_what_can_wait_is_told_after_the_next_step_was_launched(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    with Bench(tiny_llama(), overlap=overlap) as bench:
        real = bench.runner.run

        def run(pieces: Any) -> Any:
            seen.append("step")
            return real(pieces)

        monkeypatch.setattr(bench.runner, "run", run)
        answer = Collected()

        def sink(event: Event) -> None:
            if isinstance(event, Delta):
                seen.append("token")
            answer(event)

        bench.engine.submit(bench.request("it", PROMPTS[0], 4), sink)
        assert isinstance(answer.last, Finished)
    at_once = ["step", "token"] * 4
    assert seen == (["step", "token", "step", "step", "token", "step", "token", "token"] if overlap else at_once)


def test_what_was_chosen_is_told_before_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(tiny_llama(), overlap=True) as bench:
        real, steps = bench.runner.run, iter(range(100))

        def run(pieces: Any) -> Any:
            if next(steps) == 5:
                raise RuntimeError("injected")
            return real(pieces)

        monkeypatch.setattr(bench.runner, "run", run)
        answer = bench.submit("it", PROMPTS[0], 40)
        assert isinstance(answer.last, Failed)
        assert len(answer.tokens) == 5


def test_rows_that_an_operator_keeps_waiting_were_told_everything(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama(), overlap=True) as bench:
        digest = bench.load(adapter_on_llama(1))
        answer = bench.submit("it", PROMPTS[0], 400)
        wait_for_tokens(answer, 3)
        bench.merge(digest).result(60)
        chosen, heard = bench.engine.call(
            lambda: (bench.scheduler.running[0].generated, len(answer.tokens)),
        ).result(60)
        if heard < chosen:  # The engine had not yet come to wait.
            assert heard == chosen - 1
            assert bench.engine.call(lambda: len(answer.tokens)).result(60) == chosen
        bench.unmerge().result(60)
        assert isinstance(answer.last, Finished)


def test_nothing_is_told_after_a_cancel() -> None:
    with Bench(tiny_llama(), overlap=True) as bench:
        answer, other = bench.submit("it", PROMPTS[0], 400), bench.submit("other", PROMPTS[1], 60)
        wait_for_tokens(answer, 3)
        bench.engine.cancel("it")
        heard = bench.engine.call(lambda: len(answer.events)).result(60)
        assert isinstance(other.last, Finished)
        assert len(answer.events) == heard
