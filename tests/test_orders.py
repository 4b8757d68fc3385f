"""Folds by hand that have to wait: for requests, for their adapter, and for clients that do not read."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorafold.engine.drains import Drained, DrainMode
from lorafold.requests import Failed, Finished
from lorafold_adapters.errors import AdapterNotFound
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.residency import Limits
from tests.engines import Bench
from tests.models import KINDS, prompts, tiny_llama
from tests.test_admission import Slow
from tests.test_parity import generated
from tests.test_residents import Crowd, crowd_of

MakeAdapter = Callable[..., Path]
PROMPT = prompts(1, 9)[0].tolist()


def slow(bench: Bench, name: str, length: int, **fields: object) -> Slow:
    """A request whose client has stopped reading."""
    reader = Slow(takes=3)
    bench.engine.submit(bench.request(name, PROMPT, length, **fields), reader, reader.stalled)
    assert reader.paused.wait(30)
    bench.engine.call(lambda: None).result(30)
    return reader


def goes_on(bench: Bench, name: str, reader: Slow) -> None:
    reader.takes = 1000
    bench.engine.resume(name)


def step(bench: Bench, times: int = 1) -> None:
    for _ in range(times):
        bench.engine.call(lambda: None).result(30)


@pytest.fixture
def crowd(adapter_on_llama: MakeAdapter) -> Iterator[Crowd]:
    limits = Limits(device_slots=2, device_bytes=1 << 40, host_bytes=1 << 40)
    with Bench(tiny_llama(), limits=limits) as bench:
        yield crowd_of(bench, adapter_on_llama, 3)


def test_an_adapter_that_a_fold_waits_to_have_stays_when_its_deployment_goes(crowd: Crowd) -> None:
    bench, adapter = crowd.bench, crowd.digests[-1]
    running = bench.submit("base", PROMPT, 60)
    while not running.tokens:
        step(bench)
    done = bench.merge(adapter, DrainMode.WAIT)
    crowd.release(adapter)
    step(bench, 3)
    assert not done.done()
    assert isinstance(running.last, Finished)
    assert done.result(30).change.state.folded == adapter
    assert bench.submit("after", PROMPT).last is not None  # It was dropped then, and with it the hold.
    assert bench.recorder.death == []


def test_a_fold_whose_adapter_cannot_be_brought_fails_once(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama(), limits=Limits(device_slots=1, device_bytes=1 << 40, host_bytes=1 << 40)) as probe:
        size = probe.manager.bind(adapter_on_llama(seed=1, **KINDS["plain"])).nbytes
    limits = Limits(device_slots=1, device_bytes=1 << 40, host_bytes=size)
    with Bench(tiny_llama(), limits=limits) as bench:
        crowd = crowd_of(bench, adapter_on_llama, 2)
        gone = next(digest for digest in crowd.digests if not crowd.in_memory(digest))
        shutil.rmtree(crowd.folders[gone])
        done = bench.merge(gone)
        assert isinstance(done.exception(30), AdapterNotFound)
        assert bench.engine.call(lambda: bench.residents.places.fetches).result(30) == 1
        other = next(digest for digest in crowd.digests if digest != gone)
        assert bench.merge(other).result(30).change.state.folded == other


def test_a_fold_gets_its_adapter_while_others_keep_every_slot_busy(crowd: Crowd) -> None:
    bench, cold = crowd.bench, crowd.digests[0]
    assert cold not in crowd.here()
    asked = [
        bench.submit(f"{number}-{hot}", PROMPT, 20 + number % 7, adapter=hot, deployment=hot)
        for number in range(40)
        for hot in crowd.digests[1:]
    ]
    done = bench.merge(cold)
    assert done.result(60).change.state.folded == cold
    assert not all(answer.done.is_set() for answer in asked), "it came only when nobody else wanted a slot"
    bench.engine.let_go().result(30)
    assert all(isinstance(answer.last, Finished) for answer in asked)


def test_what_is_held_is_not_put_out_by_those_that_wait_for_the_release(crowd: Crowd) -> None:
    bench, (first, second, held) = crowd.bench, crowd.digests
    bench.merge(held).result(30)
    waiting = [crowd.ask(digest) for digest in (first, second)]
    step(bench, 20)
    state = bench.engine.call(lambda: bench.engine.weights.state).result(30)
    assert (state.folded, state.pinned) == (held, True)
    assert not any(answer.tokens for answer in waiting)
    crowd.right(crowd.ask(held), held)
    bench.engine.let_go().result(30)
    for answer, digest in zip(waiting, (first, second), strict=True):
        crowd.right(answer, digest)


def test_a_fold_does_not_wait_for_a_client_that_does_not_read(crowd: Crowd) -> None:
    bench, adapter = crowd.bench, crowd.digests[-1]
    reader = slow(bench, "slow", 30)
    done: Drained = bench.merge(adapter, DrainMode.WAIT).result(30)
    assert (done.drained, done.parked) == (0, 1)
    crowd.right(crowd.ask(adapter), adapter)
    bench.engine.let_go().result(30)
    goes_on(bench, "slow", reader)
    assert isinstance(reader.last, Finished)
    assert reader.tokens == generated(tiny_llama(), PROMPT, 30)


def test_those_that_must_end_first_get_the_places_of_those_that_stand_still_for_it(
    adapter_on_llama: MakeAdapter,
) -> None:
    """Two places: one has the row that must end, and when it comes back from a pause, both have others."""
    with Bench(tiny_llama(), slots=2) as bench:
        adapter = bench.load(adapter_on_llama(seed=1, **KINDS["plain"]))
        reader = slow(bench, "slow", 30)
        awaited = bench.submit("base", PROMPT, 300)
        frozen = [bench.submit("frozen", PROMPT, 300, adapter=adapter, deployment="a")]
        while not (awaited.tokens and frozen[0].tokens):
            step(bench)
        done = bench.merge(adapter, DrainMode.WAIT)
        step(bench)
        goes_on(bench, "slow", reader)
        assert isinstance(reader.last, Finished)
        assert isinstance(awaited.last, Finished)
        assert done.result(30).drained == 2
        assert isinstance(frozen[0].last, Finished)


def test_an_order_ends_when_the_server_is_told_to_stop(crowd: Crowd) -> None:
    bench, adapter = crowd.bench, crowd.digests[-1]
    running = bench.submit("base", PROMPT, 200, policy=PolicyKind.UNMERGED)
    while not running.tokens:
        step(bench)
    done = bench.merge(adapter, DrainMode.WAIT)
    bench.engine.wind_down().result(30)
    assert "nothing was changed" in str(done.exception(30))
    assert isinstance(running.last, Finished)
    assert not isinstance(bench.submit("other", PROMPT).last, Failed)
