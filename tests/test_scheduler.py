"""Order, room and budget. No tensors, no model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafold.engine.detokenize import TextStream
from lorafold.engine.pages import PagePool
from lorafold.engine.rows import Part, Row
from lorafold.engine.scheduler import Scheduler
from lorafold.errors import InvalidField, KvFull, QueueFull
from lorafold.requests import Request
from lorafold_adapters.policy import SHARED, Cause, Plan, PolicyKind, Side

SIZE = 4


class Loaded:
    """Adapters that are on the device, but for some; and how many rows hold each."""

    def __init__(self) -> None:
        self.missing: set[str | None] = set()
        self.uses: Counter[str | None] = Counter()

    def takes(self, digest: str | None) -> bool:
        return digest not in self.missing

    def use(self, digest: str | None) -> None:
        self.uses[digest] += 1

    def unuse(self, digest: str | None) -> None:
        self.uses[digest] -= 1


def scheduler_of(*, rows: int = 4, waiting: int = 9, budget: int = 99, pages: int = 100) -> Scheduler:
    pool = PagePool(pages=pages + 1, size=SIZE)
    return Scheduler(pool=pool, adapters=Loaded(), max_batch=rows, max_waiting=waiting, prefill_tokens=budget)


def row(
    name: str,
    prompt: int | Sequence[int] = 3,
    *,
    adapter: str | None = None,
    deployment: str = "d",
    max_tokens: int = 5,
    leader: Row | None = None,
    **fields: Any,
) -> Row:
    """Those with an adapter run while it is folded."""
    ids = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    request = Request(
        id=name,
        deployment=deployment,
        adapter=adapter,
        policy=PolicyKind.UNMERGED if adapter is None else PolicyKind.MERGED,
        prompt=ids,
        max_tokens=max_tokens,
        **fields,
    )
    text = TextStream(lambda ids: "", ids)
    return Row(
        request=request,
        sink=lambda event: None,
        text=text,
        tokens=list(ids),
        leader=leader,
    )


def names(rows: object) -> list[str]:
    return [item.request.id for item in rows]  # type: ignore[attr-defined]


def plan(folded: Side, cause: Cause = Cause.TURN) -> Plan:
    return Plan(folded=folded, cause=cause, reason="")


def admit(scheduler: Scheduler, *folded: Side) -> None:
    """In turns of these adapters, or of the base."""
    for side in folded or (SHARED,):
        scheduler.admit(plan(side), now=1.0)


def run(scheduler: Scheduler, folded: Side = SHARED) -> list[Part]:
    """One step: every part runs, every row that samples gets a token."""
    parts = scheduler.schedule(plan(folded))
    for part in parts:
        scheduler.ran(part)
        if part.samples:
            part.row.tokens.append(7)
    return parts


def test_rows_of_a_deployment_start_in_order_of_arrival() -> None:
    scheduler = scheduler_of(rows=2)
    for name in "abcd":
        scheduler.add(row(name))
    admit(scheduler)
    assert names(scheduler.running) == ["a", "b"]
    assert scheduler.waiting == 2
    scheduler.remove(scheduler.running[0])
    admit(scheduler)
    assert names(scheduler.running) == ["b", "c"]


def test_a_deployment_that_was_served_less_is_next() -> None:
    scheduler = scheduler_of(rows=1)
    for index in range(4):
        scheduler.add(row(f"many{index}", deployment="many"))
    order = []
    for turn in range(5):
        if turn == 1:
            scheduler.add(row("few", deployment="few"))
        admit(scheduler)
        run(scheduler)
        order += names(scheduler.running)
        scheduler.remove(scheduler.running[0])
    assert order == ["many0", "few", "many1", "many2", "many3"] or order == ["many0", "many1", "few", "many2", "many3"]
    assert order.index("few") < 3  # By order of arrival it would be last.


def test_a_deployment_that_was_idle_has_saved_nothing_up() -> None:
    scheduler = scheduler_of(rows=1, waiting=99)
    for index in range(20):
        scheduler.add(row(f"busy{index}", deployment="busy"))
    for _ in range(10):
        admit(scheduler)
        run(scheduler)
        scheduler.remove(scheduler.running[0])
    for index in range(5):
        scheduler.add(row(f"idle{index}", deployment="idle"))
    order = []
    for _ in range(8):
        admit(scheduler)
        run(scheduler)
        order += [item.request.deployment for item in scheduler.running]
        scheduler.remove(scheduler.running[0])
    assert order[:6].count("idle") <= 4
    assert order[:6].count("busy") >= 2


def test_a_full_queue_refuses_and_says_so() -> None:
    scheduler = scheduler_of(rows=1, waiting=1)
    for name in "ab":
        scheduler.add(row(name))
    with pytest.raises(QueueFull, match=r"2 completions would wait, engine.max_queue allows 1"):
        scheduler.add(row("c"))


def test_more_completions_than_places_are_not_told_to_come_back() -> None:
    scheduler = scheduler_of(rows=2, waiting=1)
    scheduler.add(*map(row, "abc"))
    with pytest.raises(QueueFull):
        scheduler.add(*map(row, "def"))
    with pytest.raises(InvalidField, match=r"spec.n: 4 are too many: ask for 3"):
        scheduler.add(*map(row, "defg"))


def test_what_can_never_fit_the_cache_is_refused_at_once() -> None:
    scheduler = scheduler_of(pages=4)
    scheduler.add(row("fits", prompt=11, max_tokens=5))
    with pytest.raises(KvFull, match="17 tokens, the cache has room for 16"):
        scheduler.add(row("never", prompt=11, max_tokens=6))


def test_only_rows_of_the_folded_adapter_run_and_the_others_keep_their_room() -> None:
    scheduler = scheduler_of(rows=2)
    for name in "aabb":
        scheduler.add(row(name + str(scheduler.waiting), adapter=name))
    admit(scheduler, "a", "b")
    assert names(scheduler.running) == ["a0", "a1", "b2", "b3"]  # max_batch is of a step.
    assert names(part.row for part in scheduler.schedule(plan("a"))) == ["a0", "a1"]
    assert scheduler.schedule(plan(SHARED)) == []
    assert scheduler.queued() == {("a", PolicyKind.MERGED): (2, 0), ("b", PolicyKind.MERGED): (2, 0)}


def test_rows_whose_turn_it_is_not_hold_nobody_up() -> None:
    scheduler = scheduler_of()
    scheduler.add(row("waits", adapter="a"))
    scheduler.add(row("base"))
    admit(scheduler)
    assert names(scheduler.running) == ["base"]


def test_rows_that_find_no_room_hold_up_those_behind_them_whoever_has_the_turn() -> None:
    scheduler = scheduler_of(pages=8)
    scheduler.add(row("small", 3))
    admit(scheduler)
    scheduler.add(row("large", 30, max_tokens=2, adapter="a", deployment="first"))
    scheduler.add(row("late", 30, max_tokens=2, deployment="second"))
    assert set(scheduler.ready()) == {(None, PolicyKind.UNMERGED)}
    scheduler.remove(scheduler.running[0])
    assert ("a", PolicyKind.MERGED) in scheduler.ready()
    admit(scheduler)
    assert names(scheduler.running) == ["late"]  # It is the base's turn, and there is room.


def test_a_deployment_never_runs_more_than_it_may() -> None:
    scheduler = scheduler_of(rows=4)
    for name in "abc":
        scheduler.add(row(name, max_concurrency=2))
    scheduler.add(row("other", deployment="other"))
    admit(scheduler)
    assert names(scheduler.running) == ["a", "other", "b"]
    scheduler.remove(scheduler.running[0])
    admit(scheduler)
    assert names(scheduler.running) == ["other", "b", "c"]


def test_a_higher_priority_starts_first() -> None:
    scheduler = scheduler_of(rows=1)
    for name, priority in (("low", 0), ("high", 5), ("higher", 6)):
        scheduler.add(row(name, deployment=name, priority=priority))
    order = []
    for _ in range(3):
        admit(scheduler)
        order += names(scheduler.running)
        scheduler.remove(scheduler.running[0])
    assert order == ["higher", "high", "low"]


def test_a_paused_row_gives_its_room_away_and_finds_what_it_computed() -> None:
    scheduler = scheduler_of(rows=1)
    slow = row("slow", 9, max_tokens=20)
    scheduler.add(slow)
    admit(scheduler)
    run(scheduler)
    scheduler.pause(slow)
    assert not scheduler.ready()
    assert not scheduler.empty
    assert scheduler.pool.available == 100
    scheduler.add(row("other", range(50, 53)))
    admit(scheduler)
    assert names(scheduler.running) == ["other"]
    scheduler.remove(scheduler.running[0])
    scheduler.resume(slow)
    scheduler.resume(slow)  # Resuming what is not paused changes nothing.
    admit(scheduler)
    assert slow.cached == 8
    scheduler.check_integrity()


def test_with_only_some_rows_allowed_no_others_run_or_start() -> None:
    scheduler = scheduler_of()
    first, second = row("first"), row("second")
    scheduler.add(first)
    scheduler.add(second)
    admit(scheduler)
    scheduler.add(row("new"))
    scheduler.only({second: None})
    admit(scheduler)
    assert names(part.row for part in run(scheduler)) == ["second"]
    assert scheduler.waiting == 1
    scheduler.only(None)
    admit(scheduler)
    assert len(run(scheduler)) == 3


def test_a_row_that_was_moved_runs_with_its_new_group() -> None:
    scheduler = scheduler_of()
    moved, waits = row("moved", adapter="a"), row("waits", adapter="a")
    scheduler.add(moved)
    scheduler.add(waits)
    admit(scheduler, "a")
    assert scheduler.schedule(plan(SHARED)) == []
    for item in (moved, waits):
        scheduler.move(item, PolicyKind.UNMERGED)
        scheduler.check_integrity()
    admit(scheduler)
    assert names(part.row for part in run(scheduler)) == ["moved", "waits"]


def test_what_is_ready_is_known_anew_whenever_it_changes() -> None:
    scheduler = scheduler_of(pages=6)
    assert not scheduler.ready()
    scheduler.add(row("a", 10, max_tokens=9))
    assert scheduler.ready() is scheduler.ready()
    admit(scheduler)
    run(scheduler)
    scheduler.add(row("b", range(40, 50), max_tokens=9, adapter="b", deployment="b"))
    assert ("b", PolicyKind.MERGED) not in scheduler.ready()  # 3 pages, and one to grow into.
    scheduler.remove(scheduler.running[0])
    assert ("b", PolicyKind.MERGED) in scheduler.ready()


def test_prompts_are_read_within_the_budget_and_decoding_goes_on_beside_them() -> None:
    scheduler = scheduler_of(budget=9)
    decoding, long, short = row("decoding"), row("long", range(50, 70)), row("short", [80, 81, 82])
    scheduler.add(decoding)
    admit(scheduler)
    run(scheduler)
    scheduler.add(long)
    scheduler.add(short)
    admit(scheduler)
    steps = [[(part.row.request.id, part.tokens, part.samples) for part in run(scheduler)] for _ in range(3)]
    assert steps == [
        [("decoding", 1, True), ("long", 8, False)],
        [("decoding", 1, True), ("long", 8, False)],
        [("decoding", 1, True), ("long", 4, True), ("short", 3, True)],
    ]


def test_a_known_prefix_is_not_read_again() -> None:
    scheduler = scheduler_of()
    for name in ("first", "second"):
        scheduler.add(row(name, prompt=10))
        admit(scheduler)
        parts = run(scheduler)
        scheduler.remove(scheduler.running[0])
        assert [part.tokens for part in parts] == ([10] if name == "first" else [2])
    scheduler.add(row("other adapter", prompt=10, adapter="x"))
    admit(scheduler, "x")
    assert [part.tokens for part in run(scheduler, "x")] == [10]


def test_followers_start_when_their_leader_has_read_the_prompt_and_share_it() -> None:
    scheduler = scheduler_of(budget=SIZE)
    leader = row("leader", prompt=10)
    follower = row("follower", prompt=10, leader=leader)
    scheduler.add(leader)
    scheduler.add(follower)
    while not leader.generated:
        admit(scheduler)
        assert names(scheduler.running) == ["leader"]
        run(scheduler)
    admit(scheduler)
    assert follower.pages[:2] == leader.pages[:2]
    assert follower.pages[2] != leader.pages[2]


def test_followers_of_a_leader_that_is_gone_start_alone() -> None:
    scheduler = scheduler_of()
    leader = row("leader")
    scheduler.add(leader)
    scheduler.add(row("follower", leader=leader))
    scheduler.remove(leader)
    admit(scheduler)
    assert names(scheduler.running) == ["follower"]


def test_the_last_to_start_gives_its_room_up_and_is_the_next_to_start_again() -> None:
    scheduler = scheduler_of(pages=4)
    first, second, third = (row(name, [start, 1, 2], max_tokens=9) for name, start in (("1", 1), ("2", 2), ("3", 3)))
    for item in (first, second, third):
        scheduler.add(item)
    admit(scheduler)
    assert names(scheduler.running) == ["1", "2"]  # Each that runs keeps a page to grow into.
    while not second.preempted:
        run(scheduler)
    assert names(scheduler.running) == ["1"]
    assert second.generated
    length = len(second.tokens)
    scheduler.check_integrity()
    scheduler.remove(first)
    admit(scheduler)
    assert names(scheduler.running)[0] == "2"
    known = second.cached
    assert [part.tokens for part in run(scheduler) if part.row is second] == [length - known]
    assert len(second.tokens) == length + 1


def test_rows_that_have_all_the_room_they_may_need_keep_none_free_to_grow_into() -> None:
    scheduler = scheduler_of(rows=4, pages=4)
    for name in "abcd":
        scheduler.add(row(name, [ord(name)], max_tokens=SIZE - 1))
    admit(scheduler)
    assert names(scheduler.running) == ["a", "b", "c", "d"]


def outgrowing(scheduler: Scheduler) -> tuple[Row, Row]:
    """Two rows of different adapters that fill the cache; the second one started last."""
    first, second = (row(name, [start, 1, 2], max_tokens=9, adapter=name) for name, start in (("a", 1), ("b", 2)))
    for item in (first, second):
        scheduler.add(item)
    admit(scheduler, "a", "b")
    assert names(scheduler.running) == ["a", "b"]
    return first, second


def test_a_row_that_is_alone_on_its_side_takes_room_from_another_side() -> None:
    scheduler = scheduler_of(pages=4)
    first, second = outgrowing(scheduler)
    for _ in range(4):
        run(scheduler, "a")
    while not (first.preempted or second.preempted):
        assert run(scheduler, "b")
    assert run(scheduler, "b")  # Or the engine would find nothing to run, and wait.
    assert first.preempted == 1
    assert not second.preempted


def test_rows_that_a_held_adapter_keeps_from_running_give_their_room_to_its_own() -> None:
    scheduler = scheduler_of(pages=4)
    outgrowing(scheduler)
    for _ in range(4):
        run(scheduler, "a")
        run(scheduler, "b")
    scheduler.add(row("held", 6, adapter="x"))
    admit(scheduler, "x")
    assert "held" not in names(scheduler.running)
    scheduler.admit(plan("x", Cause.HELD), now=2.0)
    assert "held" in names(scheduler.running)
    assert run(scheduler, "x")
    scheduler.check_integrity()


def test_rows_that_find_a_place_at_once_do_not_count_as_waiting() -> None:
    scheduler = scheduler_of(rows=3, waiting=1)
    for name in "abcd":
        scheduler.add(row(name))
    with pytest.raises(QueueFull):
        scheduler.add(row("e"))


def change(scheduler: Scheduler, item: Row, action: str) -> None:
    if action == "pause":
        scheduler.pause(item)
    elif action == "resume":
        scheduler.resume(item)
    elif action == "move":
        scheduler.move(item, PolicyKind.UNMERGED)
    else:
        scheduler.remove(item)


def end_all(scheduler: Scheduler) -> None:
    while scheduler.rows:
        for item in scheduler.rows:
            scheduler.resume(item)
        assert scheduler.ready()
        admit(scheduler, SHARED, "a")
        scheduler.remove(scheduler.running[0])


@given(
    st.lists(
        st.sampled_from(["add", "merged", "remove", "admit", "run", "pause", "resume", "move"]),
        max_size=80,
    ),
    st.integers(min_value=5, max_value=12),
)
def test_no_room_is_ever_lost_or_shared(actions: list[str], pages: int) -> None:
    scheduler = scheduler_of(rows=3, waiting=1000, budget=6, pages=pages)
    for number, action in enumerate(actions):
        if action == "add":
            scheduler.add(row(str(number), [number % 3] * (number % 11 + 1), max_tokens=8))
        elif action == "merged":
            scheduler.add(row(str(number), [number % 3] * (number % 11 + 1), max_tokens=8, adapter="a"))
        elif action == "admit":
            admit(scheduler, SHARED, "a")
        elif action == "run":
            run(scheduler, "a" if number % 2 else SHARED)
            for item in scheduler.running:
                if item.generated >= item.request.max_tokens:
                    scheduler.remove(item)
        elif rows := list(scheduler.rows):
            change(scheduler, rows[number % len(rows)], action)
        scheduler.check_integrity()
    end_all(scheduler)
    scheduler.check_integrity()
    assert scheduler.pool.available == pages


def test_the_least_urgent_row_gives_up_its_room_and_of_those_the_last() -> None:
    """Negative control: with one priority it is the one that started last."""
    for priorities, loser in (((5, 5, 5), "2"), ((0, 5, 5), "0"), ((0, 0, 5), "1")):
        scheduler = scheduler_of(rows=3, pages=8)
        for number, priority in enumerate(priorities):
            one = row(f"{number}", 7, deployment=f"d{number}", max_tokens=9, priority=priority)
            scheduler.add(one)
            scheduler.admit(plan(SHARED), 0.0)
        assert len(scheduler.running) == 3
        preempted: list[str] = []
        for _ in range(20):
            for part in scheduler.schedule(plan(SHARED)):
                scheduler.ran(part)
                part.row.tokens.append(1)
            preempted = [one.request.id for one in scheduler.rows if one.preempted]
            if preempted:
                break
        assert preempted == [loser]


def test_the_policy_is_told_of_rows_that_can_run() -> None:
    scheduler = scheduler_of(rows=8, waiting=99)
    limited = [row(f"{number}", deployment="limited", max_concurrency=2) for number in range(10)]
    free = [row(f"free-{number}", deployment="free") for number in range(3)]
    scheduler.add(*limited)
    scheduler.add(*free)
    (group,) = scheduler.ready()
    assert scheduler.ready()[group] == 5
    scheduler.pause(free[0])
    assert scheduler.ready()[group] == 4
    scheduler.resume(free[0])
    for one in limited[:9]:
        scheduler.remove(one)
    assert scheduler.ready()[group] == 4
    scheduler.remove(limited[9])
    assert scheduler.ready()[group] == 3
