"""What goes wrong inside the engine, and who notices. The fault is injected; everything around it is real."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafold.errors import DeadlineExceeded, EngineStopped, QueueFull, StepFailed
from lorafold.requests import Failed, Finished
from lorafold_adapters.errors import BaseCorrupt, FoldFailed
from lorafold_adapters.policy import Mode, PolicyKind
from tests.engines import Bench
from tests.models import KINDS, prompts, tiny_llama

MakeAdapter = Callable[..., Path]
PROMPT = prompts(1, 6)[0].tolist()


def test_a_step_that_fails_fails_its_batch_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(tiny_llama()) as bench:
        expected = bench.submit("before", PROMPT)
        assert isinstance(expected.last, Finished)
        real, broken = bench.runner.run, [True]

        def run(pieces: Any) -> Any:
            if broken and broken.pop():
                raise RuntimeError("injected")
            return real(pieces)

        monkeypatch.setattr(bench.runner, "run", run)
        failed = bench.submit("failed", PROMPT).last
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, StepFailed)
        after = bench.submit("after", PROMPT)
        assert isinstance(after.last, Finished)
        assert after.tokens == expected.tokens
        assert bench.scheduler.rows == ()


def test_an_answer_that_cannot_be_told_fails_alone() -> None:
    with Bench(tiny_llama()) as bench:

        def refuse(event: object) -> None:
            raise RuntimeError("the stream is gone")

        good = bench.submit("good", PROMPT, 30)
        from lorafold.requests import Request

        request = Request(
            id="bad", deployment="d", adapter=None, policy=PolicyKind.UNMERGED, prompt=tuple(PROMPT), max_tokens=5
        )
        bench.engine.submit(request, refuse)
        assert isinstance(good.last, Finished)
        assert isinstance(bench.submit("later", PROMPT).last, Finished)


def test_a_fold_that_fails_fails_its_rows_and_nobody_elses(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafold_adapters import fold

    with Bench(tiny_llama()) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        base = bench.submit("base", PROMPT, 40)
        monkeypatch.setattr(fold, "folded_weight", lambda *_: (_ for _ in ()).throw(MemoryError("injected")))
        merged = bench.submit("merged", PROMPT, adapter=digest, policy=PolicyKind.MERGED)
        assert isinstance(merged.last, Failed)
        assert isinstance(merged.last.error, FoldFailed)
        assert isinstance(base.last, Finished)
        monkeypatch.undo()
        again = bench.submit("again", PROMPT, adapter=digest, policy=PolicyKind.MERGED)
        assert isinstance(again.last, Finished)
        assert bench.engine.call(bench.engine.weights.verify).result(30).mismatched == ()


def test_a_lost_base_ends_the_engine_and_refuses_everything(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tiny_llama())
    with bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        merged = bench.submit("merged", PROMPT, 400, adapter=digest, policy=PolicyKind.MERGED)
        monkeypatch.setattr(bench.manager._weights, "restore", lambda: (_ for _ in ()).throw(BaseCorrupt("injected")))
        base = bench.submit("base", PROMPT)
        for answer in (merged, base):
            assert isinstance(answer.last, Failed)
            assert isinstance(answer.last.error, EngineStopped)
        late = bench.submit("late", PROMPT)
        assert isinstance(late.last, Failed)
        with pytest.raises(EngineStopped):
            bench.engine.call(lambda: 1).result(10)
    assert isinstance(bench.recorder.death[0], BaseCorrupt)


def test_stopping_tells_everybody() -> None:
    bench = Bench(tiny_llama(), slots=1)
    with bench:
        answers = [bench.submit(str(index), PROMPT, 400) for index in range(3)]
    for answer in answers:
        assert isinstance(answer.last, Failed)
        assert isinstance(answer.last.error, EngineStopped)
    assert bench.recorder.death == [None]


def test_a_deadline_that_passed_while_waiting_costs_nothing() -> None:
    with Bench(tiny_llama(), slots=1) as bench:
        running = bench.submit("running", PROMPT, 60)
        late = bench.submit("late", PROMPT, deadline=bench.engine.now() - 1)
        assert isinstance(late.last, Failed)
        assert isinstance(late.last.error, DeadlineExceeded)
        assert late.tokens == []
        assert isinstance(running.last, Finished)


def test_a_full_queue_refuses_the_one_too_many() -> None:
    with Bench(tiny_llama(), slots=1) as bench:
        bench.scheduler._max_waiting = 2
        answers = [bench.submit(str(index), PROMPT, 30) for index in range(9)]
        ends = [answer.last for answer in answers]
    refused = [end for end in ends if isinstance(end, Failed)]
    assert refused
    assert all(isinstance(end.error, QueueFull) for end in refused)
    assert sum(isinstance(end, Finished) for end in ends) >= 2


def test_every_second_of_a_request_is_accounted_for(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama(), slots=2, turn=0.005) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        merged = bench.submit("merged", PROMPT, 60, adapter=digest, policy=PolicyKind.MERGED)
        base = bench.submit("base", PROMPT, 60)
        queued = bench.submit("queued", PROMPT, 5)
        for answer in (merged, base, queued):
            last = answer.last
            assert isinstance(last, Finished)
            times = last.timings
            assert min(times.queue, times.swap_wait, times.prefill, times.decode) >= 0
        last = base.last
        assert isinstance(last, Finished)
        assert last.timings.swap_wait > 0
        assert isinstance(queued.last, Finished)
        assert queued.last.timings.queue > last.timings.queue
        assert len(bench.recorder.changes) >= 2
        assert {Mode.BASE, Mode.MERGED} == set(bench.recorder.steps)


def test_a_dropped_adapter_is_kept_until_its_rows_have_ended(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama()) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["dora"]))
        whole = bench.submit("whole", PROMPT, 40, adapter=digest)
        assert isinstance(whole.last, Finished)
        running = bench.submit("running", PROMPT, 40, adapter=digest)
        bench.engine.call(lambda: bench.engine.weights.release(digest))
        assert isinstance(running.last, Finished)
        assert running.tokens == whole.tokens
        bench.submit("turn", PROMPT).done.wait(30)
        assert digest not in bench.engine.call(lambda: bench.manager.adapters).result(10)
        late = bench.submit("late", PROMPT, adapter=digest)
        assert isinstance(late.last, Failed)
