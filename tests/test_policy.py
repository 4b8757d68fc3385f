"""Turns and lanes. Time is an argument; nothing runs."""

from typing import Any

from lorafold_adapters.policy import SHARED, Lane, LaneView, Plan, PolicyKind, TurnTaking


def view(rows: dict[Lane, int], pinned: str | None = None) -> LaneView:
    return LaneView(pinned=pinned, rows=rows)


def lanes_over_time(policy: TurnTaking, rows: dict[Lane, int], steps: int, step: float = 0.1) -> list[Lane]:
    return [policy.plan(view(rows), now=index * step).folded for index in range(steps)]


def test_a_lane_alone_keeps_its_turn() -> None:
    assert set(lanes_over_time(TurnTaking(0.25), {"a": 1}, 20)) == {"a"}


def test_every_lane_gets_a_turn_and_none_starves() -> None:
    turns = lanes_over_time(TurnTaking(0.25), {"a": 3, "b": 1, SHARED: 9}, 60)
    changes = [lane for index, lane in enumerate(turns) if index == 0 or turns[index - 1] != lane]
    assert set(changes[:3]) == {"a", "b", SHARED}
    assert all(changes[index : index + 3] != [] and len(set(changes[index : index + 3])) == 3 for index in range(6))


def test_a_turn_lasts_as_long_as_configured() -> None:
    turns = lanes_over_time(TurnTaking(0.5), {"a": 1, "b": 1}, 40)
    lengths: list[list[Any]] = []
    for lane in turns:
        if lengths and lengths[-1][0] == lane:
            lengths[-1][1] += 1
        else:
            lengths.append([lane, 1])
    assert all(length in (5, 6) for _, length in lengths[1:-1])


def test_a_lane_without_rows_gives_its_turn_away_at_once() -> None:
    policy = TurnTaking(10.0)
    assert policy.plan(view({"a": 1, "b": 1}), 0.0).folded == "a"
    assert policy.plan(view({"b": 1}), 0.01).folded == "b"


def test_a_pin_wins_over_everything() -> None:
    plan = TurnTaking(0.1).plan(view({"a": 5}, pinned="z"), 0.0)
    assert plan == Plan(folded="z", reason="held by MergeAdapter")


def test_lanes_follow_the_declared_policy() -> None:
    policy = TurnTaking(0.1)
    busy = view({"b": 2})
    assert policy.lane("a", PolicyKind.MERGED, busy) == "a"
    assert policy.lane("a", PolicyKind.UNMERGED, busy) is SHARED
    assert policy.lane(None, PolicyKind.UNMERGED, busy) is SHARED


def test_auto_folds_when_alone_and_shares_otherwise() -> None:
    policy = TurnTaking(0.1)
    assert policy.lane("a", PolicyKind.AUTO, view({})) == "a"
    assert policy.lane("a", PolicyKind.AUTO, view({"a": 2})) == "a"
    assert policy.lane("a", PolicyKind.AUTO, view({"a": 2, SHARED: 1})) is SHARED
    assert policy.lane("a", PolicyKind.AUTO, view({"b": 1})) is SHARED


def test_every_plan_has_a_reason() -> None:
    policy = TurnTaking(0.1)
    queues: list[dict[Lane, int]] = [{"a": 1}, {"a": 1, "b": 1}, {"b": 1}, {SHARED: 1}]
    for rows in queues:
        assert policy.plan(view(rows), 0.0).reason


def test_lanes_that_come_and_go_do_not_starve_one_that_stays() -> None:
    policy, turns = TurnTaking(0.25), 0
    for step in range(300):
        passing = f"passing-{step // 3}"
        turns += policy.plan(view({"a": 1, passing: 1}), now=step * 0.1).folded == "a"
    assert turns > 60
