"""What goes wrong inside the engine, and who notices. The fault is injected; everything around it is real."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorafold.engine.inbox import Command
from lorafold.errors import DeadlineExceeded, EngineStopped, QueueFull, StepFailed
from lorafold.requests import Failed, Finished
from lorafold_adapters.errors import FoldFailed
from lorafold_adapters.policy import Mode, PolicyKind
from tests.engines import Bench
from tests.models import ALL_LINEAR, KINDS, prompts, save_adapter, tiny_llama

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
    from lorafold_adapters.delta import AddProduct

    with Bench(tiny_llama()) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        base = bench.submit("base", PROMPT, 40)
        monkeypatch.setattr(AddProduct, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("injected")))
        merged = bench.submit("merged", PROMPT, adapter=digest, policy=PolicyKind.MERGED)
        assert isinstance(merged.last, Failed)
        assert isinstance(merged.last.error, FoldFailed)
        assert isinstance(base.last, Finished)
        monkeypatch.undo()
        again = bench.submit("again", PROMPT, adapter=digest, policy=PolicyKind.MERGED)
        assert isinstance(again.last, Finished)
        assert bench.engine.call(bench.engine.weights.verify).result(30).mismatched == ()


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
    with Bench(tiny_llama(), slots=1, turn=0.005) as bench:
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
        bench.engine.call(lambda: bench.residents.release(digest, ""))
        assert isinstance(running.last, Finished)
        assert running.tokens == whole.tokens
        bench.submit("turn", PROMPT).done.wait(30)
        assert digest not in bench.engine.call(lambda: bench.manager.adapters).result(10)
        late = bench.submit("late", PROMPT, adapter=digest)
        assert isinstance(late.last, Failed)


def test_a_slot_that_held_nan_is_clean_for_the_next_request(tmp_path: Path) -> None:
    loud = save_adapter(tiny_llama(), tmp_path, r=4, lora_alpha=3e6, target_modules=ALL_LINEAR)
    tensors = load_file(loud / "adapter_model.safetensors")
    save_file({name: tensor * 1e15 for name, tensor in tensors.items()}, loud / "adapter_model.safetensors")
    with Bench(tiny_llama(), slots=1) as bench:
        digest = bench.load(loud)
        before = bench.submit("before", PROMPT, 30)
        assert isinstance(before.last, Finished)
        broken = bench.submit("broken", PROMPT, 30, adapter=digest).last
        assert isinstance(broken, Failed)
        assert "NaN" in str(broken.error)
        after = bench.submit("after", PROMPT, 30)
        assert isinstance(after.last, Finished), after.last
        assert after.tokens == before.tokens


def test_a_held_adapters_own_requests_get_slots(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama(), slots=2) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        bench.merge(digest).result(30)
        waiting = [bench.submit(f"base-{index}", PROMPT, 5) for index in range(3)]
        late = bench.submit("late", PROMPT, 5, deadline=bench.engine.now() + 0.2)
        own = bench.submit("own", PROMPT, 5, adapter=digest)
        assert isinstance(own.last, Finished)
        assert own.last.provenance.mode is Mode.MERGED
        assert isinstance(late.last, Failed)
        assert isinstance(late.last.error, DeadlineExceeded)
        assert not any(answer.done.is_set() for answer in waiting)
        bench.unmerge().result(30)
        for answer in waiting:
            assert isinstance(answer.last, Finished)


def test_merging_takes_slots_back_from_rows_that_have_not_run(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama(), slots=2) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        gate = threading.Event()
        blocked = bench.engine.call(lambda: gate.wait(30))
        others = [bench.submit(f"base-{index}", PROMPT, 5) for index in range(2)]
        merged = bench.merge(digest)
        own = bench.submit("own", PROMPT, 5, adapter=digest)
        gate.set()
        assert blocked.result(30)
        assert merged.result(30).change.state.pinned
        assert isinstance(own.last, Finished)
        bench.unmerge().result(30)
        for answer in others:
            assert isinstance(answer.last, Finished)


def test_an_auto_adapter_that_cannot_be_folded_goes_on_two_path(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafold_adapters.delta import AddProduct

    with Bench(tiny_llama()) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        expected = bench.submit("unmerged", PROMPT, 20, adapter=digest)
        assert isinstance(expected.last, Finished)
        monkeypatch.setattr(AddProduct, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("injected")))
        answer = bench.submit("auto", PROMPT, 20, adapter=digest, policy=PolicyKind.AUTO)
        assert isinstance(answer.last, Finished)
        assert answer.last.provenance.mode is Mode.UNMERGED
        assert answer.tokens == expected.tokens
        assert "injected" in bench.engine.call(lambda: bench.engine.weights.state).result(10).reason


def test_a_dead_engine_refuses_calls_that_were_cancelled_too() -> None:
    bench = Bench(tiny_llama())
    gate = threading.Event()
    with bench:
        bench.engine.call(lambda: gate.wait(30))
        bench.engine._inbox.put(Command(lambda: (_ for _ in ()).throw(OSError("injected")), lambda _: None))
        cancelled = bench.engine.call(lambda: 1)
        answer = bench.submit("waiting", PROMPT)
        assert cancelled.cancel()
        gate.set()
        assert isinstance(answer.last, Failed)
        assert isinstance(answer.last.error, EngineStopped)
    assert isinstance(bench.recorder.death[0], OSError)
