"""More adapters than slots on the device: who comes, who goes, and that answers stay right. On a real engine."""

import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from lorafold.engine.drains import DrainMode
from lorafold.recipes import Source
from lorafold.requests import Failed, Finished
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterNotFound, AdapterNotLoaded, DeviceFull, LorafoldError
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.residency import Limits
from tests.engines import Bench
from tests.models import KINDS, prompts, tiny_llama
from tests.test_parity import generated

MakeAdapter = Callable[..., Path]
PROMPT = prompts(1, 9)[0].tolist()
LENGTH = 12


class Crowd:
    """An engine with two slots, and more adapters than that."""

    def __init__(self, bench: Bench, folders: list[Path]) -> None:
        self.bench = bench
        self.reads = 0
        self.most = 0
        """The most adapters that ever were on the device together."""
        bench.residents.fetch = self.fetch
        self.folders = {bench.load(folder): folder for folder in folders}
        self.digests = list(self.folders)
        oracles: list[Any] = [PeftModel.from_pretrained(tiny_llama(), str(folder)).eval() for folder in folders]
        self.expected = dict(zip(self.digests, (generated(oracle, PROMPT, LENGTH) for oracle in oracles), strict=True))

    def fetch(self, digest: str, source: Source, bound: BoundAdapter | None) -> None:
        """Brings an adapter in a thread, as the server does."""

        def work() -> None:
            engine, manager = self.bench.engine, self.bench.manager
            try:
                self.reads += bound is None
                here = bound or manager.bind(str(source))
                staged = manager.stage(here)
                engine.call(lambda: self.note(here, staged))
            except LorafoldError as error:
                told = error
                engine.call(lambda: engine.lost(digest, told))

        threading.Thread(target=work).start()

    def note(self, bound: BoundAdapter, staged: Any) -> None:
        self.bench.residents.arrived(bound, staged)
        self.most = max(self.most, len(self.bench.manager.adapters))

    def ask(self, digest: str, name: str = "", policy: PolicyKind = PolicyKind.UNMERGED, **fields: Any) -> Any:
        name = name or f"{digest}-{policy.value}"
        return self.bench.submit(name, PROMPT, LENGTH, adapter=digest, policy=policy, deployment=digest, **fields)

    def right(self, answer: Any, digest: str) -> None:
        assert isinstance(answer.last, Finished)
        assert answer.tokens == self.expected[digest]

    def in_memory(self, digest: str) -> bool:
        return self.bench.engine.call(partial(self.bench.residents.bound, digest)).result(30) is not None

    def release(self, digest: str, *, pinned: bool = False) -> None:
        self.bench.engine.call(partial(self.bench.residents.release, digest, "", pinned=pinned)).result(30)

    def pin(self, digest: str) -> None:
        bound = self.bench.manager.bind(self.folders[digest])
        self.bench.engine.call(partial(self.bench.residents.acquire, bound, "", pinned=True)).result(30)

    def here(self) -> set[str]:
        return set(self.bench.engine.call(lambda: self.bench.manager.adapters).result(30))


def crowd_of(bench: Bench, make: MakeAdapter, count: int = 5) -> Crowd:
    return Crowd(bench, [make(seed=seed, **KINDS["plain"]) for seed in range(1, count + 1)])


@pytest.fixture
def crowd(adapter_on_llama: MakeAdapter) -> Iterator[Crowd]:
    limits = Limits(device_slots=2, device_bytes=1 << 40, host_bytes=1 << 40)
    with Bench(tiny_llama(), limits=limits) as bench:
        yield crowd_of(bench, adapter_on_llama)


@pytest.mark.parametrize("policy", [PolicyKind.UNMERGED, PolicyKind.MERGED, PolicyKind.AUTO])
def test_more_adapters_than_slots_are_all_answered_right(crowd: Crowd, policy: PolicyKind) -> None:
    answers = [(crowd.ask(digest, f"{number}", policy), digest) for number, digest in enumerate(crowd.digests * 6)]
    for answer, digest in answers:
        crowd.right(answer, digest)
    assert crowd.most == 2
    assert crowd.reads == 0  # All of them were in host memory.


def test_one_that_is_not_popular_does_not_wait_until_nobody_asks_for_the_popular_ones(crowd: Crowd) -> None:
    hot, cold = crowd.digests[3:], crowd.digests[0]
    assert crowd.here() == set(hot)
    answers = [(crowd.ask(digest, f"{number}-{digest}"), digest) for number in range(40) for digest in hot]
    rare = crowd.ask(cold)
    crowd.right(rare, cold)
    waiting = [answer for answer, _ in answers if not answer.done.is_set()]
    assert waiting, "the popular ones were all answered first"
    for answer, digest in answers:
        crowd.right(answer, digest)


def test_those_that_the_host_has_no_room_for_are_read_from_disk(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama()) as probe:
        size = probe.manager.bind(adapter_on_llama(seed=1, **KINDS["plain"])).nbytes
    limits = Limits(device_slots=2, device_bytes=1 << 40, host_bytes=3 * size)
    with Bench(tiny_llama(), limits=limits) as bench:
        crowd = crowd_of(bench, adapter_on_llama)
        for digest in crowd.digests * 2:
            crowd.right(crowd.ask(digest), digest)
        assert crowd.reads >= 5
        assert bench.engine.call(lambda: len(bench.residents._memory._host)).result(30) <= 3
        gone = next(digest for digest in crowd.digests if not crowd.in_memory(digest))
        shutil.rmtree(crowd.folders[gone])
        other = next(digest for digest in crowd.digests if digest != gone)
        asked, beside = crowd.ask(gone, "gone"), crowd.ask(other, "beside")
        assert isinstance(asked.last, Failed)
        assert isinstance(asked.last.error, AdapterNotFound)
        crowd.right(beside, other)


def test_a_pinned_one_stays_and_not_all_slots_can_be_pinned(adapter_on_llama: MakeAdapter) -> None:
    limits = Limits(device_slots=2, device_bytes=1 << 40, host_bytes=1 << 40)
    with Bench(tiny_llama(), limits=limits) as bench:
        crowd = crowd_of(bench, adapter_on_llama, 4)
        pinned, other = crowd.digests[0], crowd.digests[1]
        crowd.pin(pinned)
        for digest in crowd.digests * 2:
            crowd.right(crowd.ask(digest), digest)
        assert pinned in crowd.here()
        with pytest.raises(DeviceFull, match=r"2 adapters would be pinned, and residency\.device_slots is 2"):
            crowd.pin(other)
        crowd.release(pinned, pinned=True)
        for digest in crowd.digests[1:] * 2:
            crowd.right(crowd.ask(digest), digest)
        assert pinned not in crowd.here()  # Negative control.


def test_no_more_is_pinned_than_leaves_room_for_the_others(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama()) as probe:
        bound = probe.manager.bind(adapter_on_llama(seed=1, **KINDS["plain"]))
        size = probe.manager.device_bytes(bound)
        larger = adapter_on_llama(seed=9, **{**KINDS["plain"], "r": 8})
    limits = Limits(device_slots=9, device_bytes=5 * size // 2, host_bytes=1 << 40)
    with Bench(tiny_llama(), limits=limits) as bench:
        crowd = crowd_of(bench, adapter_on_llama, 3)
        crowd.pin(crowd.digests[0])
        with pytest.raises(
            DeviceFull, match=rf"take {2 * size:,} of the {5 * size // 2:,} .* other one takes {size:,}"
        ):
            crowd.pin(crowd.digests[1])
        with pytest.raises(DeviceFull, match="pin fewer"):
            bench.load(larger)
        for digest in crowd.digests:
            crowd.right(crowd.ask(digest), digest)


def test_folding_by_hand_brings_the_adapter_first(crowd: Crowd) -> None:
    away = next(digest for digest in crowd.digests if digest not in crowd.here())
    report = crowd.bench.merge(away, DrainMode.WAIT).result(30)
    assert report.change.state.folded == away
    crowd.right(crowd.ask(away, policy=PolicyKind.MERGED), away)
    crowd.bench.engine.let_go().result(30)
    for digest in crowd.digests:
        crowd.right(crowd.ask(digest), digest)


def test_one_that_nobody_points_at_leaves_every_memory(crowd: Crowd) -> None:
    bench = crowd.bench
    for digest in crowd.digests[1:]:
        crowd.release(digest)
    crowd.right(crowd.ask(crowd.digests[0]), crowd.digests[0])
    assert [crowd.in_memory(digest) for digest in crowd.digests] == [True, False, False, False, False]
    late = crowd.ask(crowd.digests[1])
    assert isinstance(late.last, Failed)
    assert isinstance(late.last.error, AdapterNotLoaded)
    assert bench.manager.verify_base() == []


def test_an_adapter_is_read_from_a_folder_that_a_deployment_still_has(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama()) as probe:
        size = probe.manager.bind(adapter_on_llama(seed=1, **KINDS["plain"])).nbytes
    limits = Limits(device_slots=1, device_bytes=1 << 40, host_bytes=size)
    with Bench(tiny_llama(), limits=limits) as bench:
        crowd = crowd_of(bench, adapter_on_llama, 2)
        digest = crowd.digests[0]
        copy = Path(shutil.copytree(crowd.folders[digest], crowd.folders[digest].with_name("copy")))
        assert bench.load(copy) == digest
        bench.engine.call(partial(bench.residents.release, digest, str(copy))).result(30)
        shutil.rmtree(copy)
        for asked in [*crowd.digests, *crowd.digests]:
            crowd.right(crowd.ask(asked), asked)
        assert crowd.reads


def test_a_pinned_one_comes_once_there_is_room(crowd: Crowd) -> None:
    bench, (cold, *_, first, second) = crowd.bench, crowd.digests
    busy = [bench.submit(f"{digest}", PROMPT, 200, adapter=digest, deployment=digest) for digest in (first, second)]
    while not all(answer.tokens for answer in busy):
        bench.engine.call(lambda: None).result(30)
    crowd.pin(cold)
    assert cold not in crowd.here()
    for answer in busy:
        assert isinstance(answer.last, Finished)
    while cold not in crowd.here():
        assert bench.engine.call(lambda: bench.residents.places.fetches).result(30) <= 1
    crowd.right(crowd.ask(cold), cold)


def test_a_pinned_deployment_is_pointed_at_another_adapter_in_the_last_slot_that_may_be_pinned(crowd: Crowd) -> None:
    bench, (one, other, *_) = crowd.bench, crowd.digests
    crowd.pin(one)
    with pytest.raises(DeviceFull):  # Negative control: beside it there is no room.
        crowd.pin(other)
    bound = bench.manager.bind(crowd.folders[other])
    swap = partial(bench.residents.acquire, bound, "", pinned=True, instead_of=[one])
    bench.engine.call(swap).result(30)
    crowd.release(one, pinned=True)
    assert bench.engine.call(lambda: [*bench.residents._books.pinned]).result(30) == [other]
    for digest in crowd.digests:
        crowd.right(crowd.ask(digest), digest)
