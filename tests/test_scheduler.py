"""Order, room and budget. No tensors, no model."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafold.engine.detokenize import TextStream
from lorafold.engine.pages import PagePool
from lorafold.engine.scheduler import Part, Row, Scheduler
from lorafold.errors import InvalidField, KvFull, QueueFull
from lorafold.requests import Request
from lorafold_adapters.policy import PolicyKind

SIZE = 4


def scheduler_of(*, rows: int = 4, waiting: int = 9, budget: int = 99, pages: int = 100) -> Scheduler:
    pool = PagePool(pages=pages + 1, size=SIZE)
    return Scheduler(pool=pool, max_batch=rows, max_waiting=waiting, prefill_tokens=budget)


def row(
    name: str,
    prompt: int | Sequence[int] = 3,
    *,
    adapter: str | None = None,
    deployment: str = "d",
    max_tokens: int = 5,
    leader: Row | None = None,
) -> Row:
    ids = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    request = Request(
        id=name,
        deployment=deployment,
        adapter=adapter,
        policy=PolicyKind.UNMERGED,
        prompt=ids,
        max_tokens=max_tokens,
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


def admit(scheduler: Scheduler) -> None:
    scheduler.admit(lambda item: item.request.adapter, now=1.0)


def run(scheduler: Scheduler, lane: str | None = None) -> list[Part]:
    """One step: every part runs, every row that samples gets a token."""
    parts = scheduler.schedule(lane)
    for part in parts:
        scheduler.ran(part)
        if part.samples:
            part.row.tokens.append(7)
    return parts


def test_rows_of_a_deployment_start_in_order_of_arrival_whatever_the_lane() -> None:
    scheduler = scheduler_of(rows=2)
    for name in "abcd":
        scheduler.add(row(name, adapter=name))
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


def test_only_rows_of_the_lane_run() -> None:
    scheduler = scheduler_of()
    for name in "aab":
        scheduler.add(row(name + str(scheduler.waiting), adapter=name))
    admit(scheduler)
    assert names(part.row for part in scheduler.schedule("a")) == ["a0", "a1"]
    assert scheduler.schedule(None) == []
    assert scheduler.lanes() == {"a": 2, "b": 1}


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
    admit(scheduler)
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
    """Two rows of different lanes that fill the cache; the second one started last."""
    first, second = (row(name, [start, 1, 2], max_tokens=9, adapter=name) for name, start in (("a", 1), ("b", 2)))
    for item in (first, second):
        scheduler.add(item)
    admit(scheduler)
    assert names(scheduler.running) == ["a", "b"]
    return first, second


def test_a_row_that_is_alone_in_its_lane_takes_room_from_another_lane() -> None:
    scheduler = scheduler_of(pages=4)
    first, second = outgrowing(scheduler)
    for _ in range(4):
        run(scheduler, "a")
    while not (first.preempted or second.preempted):
        assert run(scheduler, "b")
    assert run(scheduler, "b")  # Or the engine would find nothing to run, and wait.
    assert first.preempted == 1
    assert not second.preempted


@pytest.mark.parametrize(("rows", "pages"), [(2, 99), (9, 4)])
def test_rows_that_a_held_adapter_keeps_from_running_give_their_room_to_its_own(rows: int, pages: int) -> None:
    scheduler = scheduler_of(rows=rows, pages=pages)
    outgrowing(scheduler)
    for _ in range(4):
        run(scheduler, "a")
        run(scheduler, "b")
    scheduler.add(row("held", 6, adapter="x"))
    scheduler.admit(lambda item: item.request.adapter, now=2.0)
    assert "held" not in names(scheduler.running)
    scheduler.admit(lambda item: item.request.adapter, now=2.0, held="x")
    assert "held" in names(scheduler.running)
    assert run(scheduler, "x")
    scheduler.check_integrity()


def test_rows_that_find_a_place_at_once_do_not_count_as_waiting() -> None:
    scheduler = scheduler_of(rows=3, waiting=1)
    for name in "abcd":
        scheduler.add(row(name))
    with pytest.raises(QueueFull):
        scheduler.add(row("e"))


@given(
    st.lists(st.sampled_from(["add", "remove-first", "remove-last", "admit", "run"]), max_size=80),
    st.integers(min_value=5, max_value=12),
)
def test_no_room_is_ever_lost_or_shared(actions: list[str], pages: int) -> None:
    scheduler = scheduler_of(rows=3, waiting=1000, budget=6, pages=pages)
    for number, action in enumerate(actions):
        if action == "add":
            scheduler.add(row(str(number), [number % 3] * (number % 11 + 1), max_tokens=8))
        elif action == "admit":
            admit(scheduler)
        elif action == "run":
            run(scheduler)
            for item in scheduler.running:
                if item.generated >= item.request.max_tokens:
                    scheduler.remove(item)
        elif rows := list(scheduler.rows):
            scheduler.remove(rows[0 if action == "remove-first" else -1])
        scheduler.check_integrity()
    while scheduler.rows:
        admit(scheduler)
        scheduler.remove(scheduler.running[0])
    scheduler.check_integrity()
    assert scheduler.pool.available == pages
