"""Folding by hand while requests run: what becomes of those in flight. Answers are those of `generate()` throughout."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from lorafold.engine.drains import DrainMode
from lorafold.errors import DeadlineExceeded, EngineStopped, FoldInProgress
from lorafold.requests import Delta, Finished
from lorafold_adapters.errors import AdapterNotLoaded
from lorafold_adapters.policy import Cause, Mode, PolicyKind
from tests.engines import Bench, Collected
from tests.models import KINDS, prompts, tiny_llama
from tests.test_parity import generated

MakeAdapter = Callable[..., Path]
PROMPT = prompts(1, 9)[0].tolist()
LONG = 40


class Two:
    """An engine with two adapters, and what each of them answers alone."""

    def __init__(self, bench: Bench, folders: list[Path]) -> None:
        self.bench = bench
        self.first, self.second = (bench.load(folder) for folder in folders)
        oracles: list[Any] = [PeftModel.from_pretrained(tiny_llama(), str(folder)).eval() for folder in folders]
        self.expected = {
            None: generated(tiny_llama(), PROMPT, LONG),
            self.first: generated(oracles[0], PROMPT, LONG),
            self.second: generated(oracles[1], PROMPT, LONG),
        }

    def started(self, adapter: str | None, policy: PolicyKind = PolicyKind.UNMERGED) -> Collected:
        """A request that has its first token."""
        answer = self.bench.submit(f"{adapter}-{policy}", PROMPT, LONG, adapter=adapter, policy=policy)
        while not any(isinstance(event, Delta) for event in answer.events):
            self.bench.engine.call(lambda: None).result(30)
        return answer

    def right(self, answer: Collected, adapter: str | None) -> Finished:
        """The end of an answer that is what the adapter gives alone."""
        assert isinstance(answer.last, Finished)
        assert answer.tokens == self.expected[adapter]
        return answer.last


@pytest.fixture
def two(adapter_on_llama: MakeAdapter) -> Iterator[Two]:
    folders = [adapter_on_llama(seed=seed, **KINDS["plain"]) for seed in (1, 2)]
    with Bench(tiny_llama()) as bench:
        yield Two(bench, folders)


def test_with_wait_those_in_flight_finish_first_and_none_starts(two: Two) -> None:
    base = two.started(None)
    done = two.bench.merge(two.first, DrainMode.WAIT)
    new = two.bench.submit("new", PROMPT, LONG, adapter=two.first, policy=PolicyKind.MERGED)
    report = done.result(30)
    assert (report.drained, report.parked, report.unmerged) == (1, 0, 0)
    assert two.right(base, None).provenance.generation < report.change.state.generation
    assert two.right(new, two.first).provenance.mode is Mode.MERGED
    assert report.change.state.pinned
    assert report.change.weight_bytes > 0


def test_with_park_those_in_flight_keep_what_they_have_and_go_on_after_the_release(two: Two) -> None:
    base = two.started(None)
    report = two.bench.merge(two.first, DrainMode.PARK).result(30)
    assert (report.drained, report.parked) == (0, 1)
    told = len(base.tokens)
    own = two.bench.submit("own", PROMPT, LONG, adapter=two.first, policy=PolicyKind.UNMERGED)
    two.right(own, two.first)
    assert len(base.tokens) == told < LONG
    two.bench.engine.let_go().result(30)
    assert two.right(base, None).timings.swap_wait > 0


def test_with_two_path_a_fold_that_is_taken_out_leaves_its_requests_running_unmerged(two: Two) -> None:
    two.bench.merge(two.first).result(30)
    merged = two.started(two.first, PolicyKind.MERGED)
    report = two.bench.unmerge(DrainMode.TWO_PATH, hold=True).result(30)
    assert (report.drained, report.parked, report.unmerged) == (0, 0, 1)
    assert report.change.state.folded is None
    assert two.right(merged, two.first).provenance.mode is Mode.UNMERGED


def test_with_two_path_a_fold_waits_for_those_that_went_on_unmerged(two: Two) -> None:
    answers = {adapter: two.started(adapter, PolicyKind.MERGED) for adapter in (two.first, two.second)}
    report = two.bench.merge(two.first, DrainMode.TWO_PATH).result(30)
    assert (report.drained, report.unmerged) == (1, 1)
    assert two.right(answers[two.second], two.second).provenance.mode is Mode.UNMERGED
    two.right(answers[two.first], two.first)


def test_a_held_base_keeps_merged_requests_waiting_until_the_release(two: Two) -> None:
    two.bench.unmerge(hold=True).result(30)
    waits = two.bench.submit("waits", PROMPT, LONG, adapter=two.first, policy=PolicyKind.MERGED)
    runs = two.bench.submit("runs", PROMPT, LONG, adapter=two.second)
    two.right(runs, two.second)
    assert not waits.events
    two.bench.engine.let_go().result(30)
    assert two.right(waits, two.first).provenance.mode is Mode.MERGED


def test_an_order_whose_time_is_over_has_changed_nothing(two: Two) -> None:
    held = two.bench.merge(two.second).result(30).change.state
    own = two.started(two.second, PolicyKind.MERGED)
    late = two.bench.merge(two.first, DrainMode.WAIT, until=two.bench.engine.now())
    with pytest.raises(DeadlineExceeded, match="1 completion had not ended, nothing was changed"):
        late.result(30)
    state = two.bench.engine.call(lambda: two.bench.engine.weights.state).result(30)
    assert (state.folded, state.pinned, state.generation) == (two.second, True, held.generation)
    two.right(own, two.second)


def test_an_order_says_what_it_waits_for(two: Two) -> None:
    two.bench.merge(two.second).result(30)
    own = two.started(two.second, PolicyKind.MERGED)
    late = two.bench.merge(two.first, DrainMode.WAIT)
    told = two.bench.engine.call(lambda: two.bench.engine.under_way).result(30)
    assert told == f"adapter {two.first[:12]} is to be folded by hand, and waits for 1 completion to end"
    two.right(own, two.second)
    late.result(30)
    assert not two.bench.engine.call(lambda: two.bench.engine.under_way).result(30)


def test_an_order_that_is_given_up_puts_those_it_moved_back(two: Two) -> None:
    two.bench.merge(two.second).result(30)
    merged = two.started(two.second, PolicyKind.MERGED)
    with pytest.raises(DeadlineExceeded):
        two.bench.merge(two.first, DrainMode.TWO_PATH, until=two.bench.engine.now()).result(30)
    assert two.right(merged, two.second).provenance.mode is Mode.MERGED


def test_a_second_order_is_refused_and_one_that_nobody_waits_for_is_given_up(two: Two) -> None:
    blocked = two.bench.submit("blocked", PROMPT, 400)
    while not blocked.events:
        two.bench.engine.call(lambda: None).result(30)
    first = two.bench.merge(two.first, DrainMode.WAIT)
    with pytest.raises(FoldInProgress, match="wait for it, or cancel it"):
        two.bench.merge(two.second, DrainMode.WAIT).result(30)
    two.bench.engine.withdraw(first)
    with pytest.raises(EngineStopped):
        first.result(30)
    assert two.bench.merge(two.second).result(30).change.state.folded == two.second
    two.bench.engine.cancel("blocked")


def test_what_cannot_be_folded_is_refused_before_anybody_waits_for_it(two: Two) -> None:
    base = two.started(None)
    with pytest.raises(AdapterNotLoaded):
        two.bench.merge("unknown", DrainMode.WAIT).result(30)
    two.right(base, None)


def test_a_hold_is_a_cause_of_its_own(two: Two) -> None:
    two.bench.merge(two.first).result(30)
    own = two.bench.submit("own", PROMPT, LONG, adapter=two.first)
    two.right(own, two.first)
    assert two.bench.recorder.plans[-1].cause is Cause.HELD
    assert two.bench.engine.call(lambda: two.bench.engine.weights.transitions[0].folded).result(30) == two.first
