"""Slots, order and budget. No tensors, no model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafold.engine.detokenize import TextStream
from lorafold.engine.scheduler import Row, Scheduler
from lorafold.errors import QueueFull
from lorafold.requests import Request
from lorafold_adapters.policy import PolicyKind


def row(name: str, prompt: int = 3, adapter: str | None = None) -> Row:
    request = Request(
        id=name,
        deployment="d",
        adapter=adapter,
        policy=PolicyKind.UNMERGED,
        prompt=tuple(range(prompt)),
        max_tokens=5,
    )
    text = TextStream(lambda ids: "", request.prompt)
    return Row(request=request, sink=lambda event: None, text=text, tokens=list(request.prompt))


def ids(rows: object) -> list[str]:
    return [item.request.id for item in rows]  # type: ignore[attr-defined]


def test_slots_are_given_in_order_of_arrival_whatever_the_lane() -> None:
    scheduler = Scheduler(slots=2, max_waiting=9, prefill_tokens=99)
    for name in "abcd":
        scheduler.add(row(name, adapter=name))
    scheduler.admit(lambda item: item.request.adapter, now=1.0)
    assert ids(scheduler.running) == ["a", "b"]
    assert scheduler.waiting == 2
    scheduler.remove(scheduler.running[0])
    scheduler.admit(lambda item: item.request.adapter, now=2.0)
    assert ids(scheduler.running) == ["b", "c"]


def test_a_full_queue_refuses_and_says_so() -> None:
    scheduler = Scheduler(slots=1, max_waiting=1, prefill_tokens=99)
    scheduler.add(row("a"))
    with pytest.raises(QueueFull, match="1 requests wait"):
        scheduler.add(row("b"))


def test_only_rows_of_the_lane_run() -> None:
    scheduler = Scheduler(slots=4, max_waiting=9, prefill_tokens=99)
    for name in "aab":
        scheduler.add(row(name + str(scheduler.waiting), adapter=name))
    scheduler.admit(lambda item: item.request.adapter, now=0.0)
    assert ids(part.row for part in scheduler.schedule("a")) == ["a0", "a1"]
    assert scheduler.schedule(None) == []
    assert scheduler.lanes() == {"a": 2, "b": 1}


def test_prompts_are_read_within_the_budget_and_decoding_goes_on_beside_them() -> None:
    scheduler = Scheduler(slots=4, max_waiting=9, prefill_tokens=8)
    decoding, long, short = row("decoding"), row("long", prompt=20), row("short", prompt=3)
    for item in (decoding, long, short):
        scheduler.add(item)
    scheduler.admit(lambda item: None, now=0.0)
    decoding.tokens.append(1)
    decoding.cached = 3
    parts = [(part.row.request.id, part.tokens, part.samples) for part in scheduler.schedule(None)]
    assert parts == [("decoding", 1, True), ("long", 8, False)]
    long.cached = 16
    parts = [(part.row.request.id, part.tokens, part.samples) for part in scheduler.schedule(None)]
    assert parts == [("decoding", 1, True), ("long", 4, True), ("short", 3, True)]


@given(st.lists(st.sampled_from(["add", "remove-first", "remove-last", "admit"]), max_size=60))
def test_no_slot_is_ever_lost_or_shared(actions: list[str]) -> None:
    scheduler = Scheduler(slots=3, max_waiting=1000, prefill_tokens=4)
    for number, action in enumerate(actions):
        if action == "add":
            scheduler.add(row(str(number)))
        elif action == "admit":
            scheduler.admit(lambda item: None, now=0.0)
        elif rows := list(scheduler.rows):
            scheduler.remove(rows[0 if action == "remove-first" else -1])
        scheduler.check_integrity()
    while scheduler.rows:
        scheduler.admit(lambda item: None, now=0.0)
        scheduler.remove(scheduler.running[0])
    scheduler.check_integrity()
