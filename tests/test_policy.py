"""Turns, and what `auto` folds. Time is an argument; nothing runs."""

from collections.abc import Mapping
from itertools import pairwise

import pytest

from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import SHARED, Cause, Group, Hold, Plan, PolicyKind, QueueView, Side
from lorafold_adapters.turns import MeasuredTurns

MERGED, UNMERGED, AUTO = PolicyKind.MERGED, PolicyKind.UNMERGED, PolicyKind.AUTO
BASE: Group = (None, UNMERGED)
STEP = 0.01


def costs(*, fold: float = 0.02, restore: float = 0.01, overhead: float = 1.2, per_row: float = 0.0) -> Costs:
    """Steps of 10 ms and so much more for each row beyond the first; folded, and times `overhead` two-path."""
    known = Costs()
    known.changed(was_folded=False, is_folded=True, seconds=fold)
    known.changed(was_folded=True, is_folded=False, seconds=restore)
    known.step(adapters=0, rows=1, seconds=99.0)  # The first step after a change does not count.
    for rows in (1, 2, 4, 8, 16, 32):
        seconds = STEP + per_row * (rows - 1)
        known.step(adapters=0, rows=rows, seconds=seconds)
        known.step(adapters=1, rows=rows, seconds=seconds * overhead)
    return known


def policy(known: Costs | None = None, *, swap_share: float = 0.05, max_wait: float = 1.0) -> MeasuredTurns:
    return MeasuredTurns(known or costs(), swap_share=swap_share, max_wait=max_wait)


def view(rows: Mapping[Group, int], *, held: Hold | None = None, places: int = 32) -> QueueView:
    return QueueView(held=held, folded=None, rows=rows, places=places)


def run(policy: MeasuredTurns, rows: Mapping[Group, int], seconds: float, start: float = 0.0) -> list[Plan]:
    """Plans of steps of 10 ms."""
    return [policy.plan(view(rows), start + index * STEP) for index in range(round(seconds / STEP))]


def turns_of(plans: list[Plan]) -> list[tuple[Side, int]]:
    """Sides in order, and how many steps each turn had."""
    turns: list[tuple[Side, int]] = []
    for plan in plans:
        steps = turns.pop()[1] if turns and turns[-1][0] == plan.folded else 0
        turns.append((plan.folded, steps + 1))
    return turns


def folds(sides: list[Side]) -> int:
    return sum(one is SHARED and other is not SHARED for one, other in pairwise(sides))


def test_a_side_alone_keeps_its_turn() -> None:
    assert {plan.folded for plan in run(policy(), {("a", MERGED): 1}, 5)} == {"a"}


def test_sides_take_turns_and_none_starves() -> None:
    rows: dict[Group, int] = {("a", MERGED): 3, ("b", MERGED): 1, BASE: 9}
    turns = [side for side, _ in turns_of(run(policy(), rows, 20))]
    assert len(turns) >= 9
    assert all(set(turns[index : index + 3]) == {"a", "b", SHARED} for index in range(len(turns) - 2))


@pytest.mark.parametrize(("share", "steps"), [(0.05, 60), (0.1, 30), (0.5, 6)])
def test_a_turn_lasts_until_the_swap_is_the_declared_share_of_it(share: float, steps: int) -> None:
    """A swap takes 30 ms, so that at 5 % a turn has 600 ms, which are 60 steps."""
    turns = turns_of(run(policy(swap_share=share), {("a", MERGED): 1, ("b", MERGED): 1}, 10))
    assert all(abs(length - steps) <= 1 for _, length in turns[1:-1])


def test_the_bound_on_waiting_comes_before_the_share() -> None:
    rows: dict[Group, int] = {(name, MERGED): 1 for name in "abcdefghijk"}
    plans = run(policy(max_wait=1.0), rows, 20)
    last = {name: 0 for name, _ in rows}
    for step, plan in enumerate(plans):
        last[plan.folded] = step
        if step > 200:
            assert all(step - seen <= 1.0 / STEP + 11 for seen in last.values())


def test_turns_have_at_least_the_length_of_a_swap() -> None:
    rows: dict[Group, int] = {(name, MERGED): 1 for name in "abcdefghijk"}
    assert all(length >= 3 for _, length in turns_of(run(policy(max_wait=0.01), rows, 20))[:-1])


def test_a_side_without_rows_gives_its_turn_away_at_once() -> None:
    turns = policy()
    assert turns.plan(view({("a", MERGED): 1, ("b", MERGED): 1}), 0.0).folded == "a"
    assert turns.plan(view({("b", MERGED): 1}), 0.01).folded == "b"


def test_sides_that_come_and_go_do_not_starve_one_that_stays() -> None:
    turns, own = policy(), 0
    for step in range(3000):
        passing: Group = (f"passing-{step // 30}", MERGED)
        own += turns.plan(view({("a", MERGED): 1, passing: 1}), step * STEP).folded == "a"
    assert own > 600


def test_a_hold_wins_over_everything() -> None:
    plan = policy().plan(view({("a", MERGED): 5, BASE: 1}, held=Hold("z")), 0.0)
    assert (plan.folded, plan.cause) == ("z", Cause.HELD)
    assert plan.runs(("z", UNMERGED))
    assert not plan.runs(("a", MERGED))


def test_rows_run_on_the_sides_that_their_policy_allows() -> None:
    shared = Plan(folded=SHARED, cause=Cause.TURN, reason="")
    folded = Plan(folded="a", cause=Cause.TURN, reason="")
    assert [shared.runs(("a", kind)) for kind in (MERGED, UNMERGED, AUTO)] == [False, True, True]
    assert [folded.runs(("a", kind)) for kind in (MERGED, UNMERGED, AUTO)] == [True, False, True]
    assert shared.runs(BASE)
    assert not folded.runs(BASE)
    assert not folded.runs(("b", AUTO))


def test_auto_folds_an_adapter_alone_once_that_has_paid_for_a_swap() -> None:
    """One row: 100 tokens/s folded, 83 unmerged; a swap there and back costs 30 ms, which is 3 tokens: 0.18 s."""
    plans = run(policy(), {("a", AUTO): 1}, 1)
    folded = [plan.folded for plan in plans]
    assert folded.index("a") in range(17, 21)
    assert set(folded[folded.index("a") :]) == {"a"}
    assert plans[-1].cause is Cause.FOLD_PAYS
    assert "100 tokens/s with adapter a alone instead of 83" in plans[-1].reason


def test_auto_folds_later_where_swaps_cost_more() -> None:
    dear = [plan.folded for plan in run(policy(costs(fold=0.2, restore=0.1)), {("a", AUTO): 1}, 5)]
    assert dear.index("a") in range(175, 190)


def test_auto_never_folds_where_that_gains_nothing() -> None:
    assert {plan.folded for plan in run(policy(costs(overhead=1.0)), {("a", AUTO): 4}, 20)} == {SHARED}


def test_auto_finds_out_what_it_does_not_know() -> None:
    """After one two-path step and nothing else it supposes that folding is worth a try, and then knows its cost."""
    known = Costs()
    turns = policy(known)
    assert turns.plan(view({("a", AUTO): 2}), 0.0).folded is SHARED
    known.step(adapters=1, rows=2, seconds=0.01)
    assert turns.plan(view({("a", AUTO): 2}), 0.01).folded == "a"


def test_auto_serves_an_even_mix_in_one_batch() -> None:
    rows: dict[Group, int] = {(name, AUTO): 2 for name in "abcdefgh"}
    assert {plan.folded for plan in run(policy(), rows, 20)} == {SHARED}


def test_auto_folds_what_dominates_and_lets_the_others_wait_no_longer_than_they_may() -> None:
    """31 of 32 rows: 3,100 tokens/s folded, 2,667 together."""
    plans = run(policy(max_wait=0.5), {("a", AUTO): 31, ("b", AUTO): 1}, 20)
    turns = turns_of(plans)
    assert {side for side, _ in turns} == {"a", SHARED}
    assert all(length <= 0.5 / STEP + 2 for side, length in turns if side == "a")
    assert {plan.cause for plan in plans} >= {Cause.FOLD_PAYS, Cause.WAITED}
    share = sum(length for side, length in turns if side == "a") / len(plans)
    assert 0.5 < share < 0.9


def test_rows_beside_a_fold_and_it_take_turns_as_long_as_swaps_need_to_be_their_share() -> None:
    """A swap there and back takes 30 ms, which is 5 % of 0.6 s, of which the fold's fair share is 81 %."""
    plans = run(policy(max_wait=9), {("a", AUTO): 31, ("b", AUTO): 1}, 20)
    turns = turns_of(plans)[1:-1]
    assert len(turns) > 20
    assert all(abs(length - (49 if side == "a" else 11)) <= 2 for side, length in turns)


def test_debts_to_rows_that_are_done_are_void() -> None:
    """Two rows beside which one waits are folded for 5 % of the time: until 0.6 s later, but that row ends at once."""
    turns = policy(costs(overhead=1.3))
    run(turns, {("a", AUTO): 2}, 1)
    beside: dict[Group, int] = {("a", AUTO): 9, ("b", AUTO): 2}
    until = len([plan for plan in run(turns, beside, 1, start=1) if plan.folded == "a"])
    assert 0 < until < 20
    assert run(turns, beside, 0.3, start=2)[-1].folded is SHARED
    assert "a" in [plan.folded for plan in run(turns, {("a", AUTO): 9}, 0.2, start=2.3)]


def test_time_beside_a_fold_is_shared_in_proportion() -> None:
    """20 of 21 rows, 21 % faster: most logarithms of rates at (20 x 0.21 - 1) / (21 x 0.21) of the time, 0.73."""
    plans = run(policy(costs(overhead=1.21)), {("a", AUTO): 20, ("b", AUTO): 1}, 60)
    share = sum(plan.folded == "a" for plan in plans) / len(plans)
    assert share == pytest.approx(0.73, abs=0.03)


def test_auto_does_not_fold_for_turns_that_gain_less_than_they_cost() -> None:
    """10 of 11 rows: 9 % more tokens/s for 48 % of 0.6 s is 26 ms, and a swap there and back takes 30."""
    assert {plan.folded for plan in run(policy(costs(overhead=1.21)), {("a", AUTO): 10, ("b", AUTO): 1}, 60)} == {
        SHARED
    }


def test_auto_leaves_a_fold_at_once_when_all_rows_together_make_more_tokens() -> None:
    turns = policy()
    run(turns, {("a", AUTO): 2}, 1)
    assert turns.plan(view({("a", AUTO): 2}), 1).folded == "a"
    plan = turns.plan(view({("a", AUTO): 2, ("b", AUTO): 2}), 1.01)
    assert plan.folded is SHARED
    assert plan.cause is Cause.SHARE_PAYS
    assert "333 tokens/s with all rows in one batch instead of 200" in plan.reason


def test_auto_does_not_swing_between_sides_that_are_worth_the_same() -> None:
    """Two rows of two adapters that come and go every 100 ms."""
    turns, folded = policy(), []
    for index in range(100):
        name = "ab"[index % 2]
        folded += [plan.folded for plan in run(turns, {(name, AUTO): 2}, 0.1, start=index * 0.1)]
    changes = sum(one != other for one, other in pairwise(folded))
    assert changes <= 2


def test_nobody_can_make_auto_swap_more_often_than_it_has_paid_for() -> None:
    """Others come as soon as `a` is folded, and go as soon as it is not. A cycle costs 30 ms, which 180 ms pay for.

    With what is expected of an adapter that is alone, at most twice as many cycles as were paid for.
    """
    turns, folded = policy(), list[Side]([SHARED])
    for step in range(2000):
        rows: dict[Group, int] = {("a", AUTO): 2}
        if folded[-1] is not SHARED:
            rows["b", AUTO] = 2
        folded.append(turns.plan(view(rows), step * STEP).folded)
    assert 50 < folds(folded) <= 2 * 20 / 0.18


def test_what_is_expected_of_an_adapter_alone_cannot_be_abused() -> None:
    """`a` is alone for 2 s now and then; else others come as soon as it is folded. Gains pay for at least half."""
    turns, folded, alone = policy(), list[Side]([SHARED]), 0
    for step in range(10_000):
        rows: dict[Group, int] = {("a", AUTO): 2}
        if step % 1000 >= 200 and folded[-1] is not SHARED:
            rows["b", AUTO] = 2
        alone += len(rows) == 1
        folded.append(turns.plan(view(rows), step * STEP).folded)
    gained = alone * STEP * (1 - 1 / 1.2)
    assert 10 < folds(folded) <= 2 * gained / 0.03


def test_turns_beside_a_fold_cannot_be_abused() -> None:
    """After a debt is paid 9 rows beside which one stands are folded at once; three cycles later they would not be."""
    turns, folded = policy(costs(overhead=1.4)), list[Side]()
    crowd: dict[Group, int] = {("a", AUTO): 9, ("b", AUTO): 1}
    for step in range(3000):
        rows = crowd if not folded or folded[-1] is SHARED or step < 300 else {**crowd, ("c", AUTO): 9}
        folded.append(turns.plan(view(rows), step * STEP).folded)
    assert folds(folded[:300]) > 2
    assert folds(folded[300:]) <= 27 * (1 - 10 / 14 / 0.9) / 0.06 + 1


def test_auto_folds_an_adapter_at_once_that_usually_stays_alone() -> None:
    """A second alone, then half a second with others, who do not pay for a fold."""
    turns, waits = policy(), []
    for index in range(4):
        start = 1.5 * index
        folded = [plan.folded for plan in run(turns, {("a", AUTO): 2}, 1, start)]
        waits.append(folded.index("a"))
        run(turns, {("a", AUTO): 2, ("b", AUTO): 2}, 0.5, start + 1)
    assert waits[0] in range(17, 21)
    assert waits[2:] == [0, 0]
    other = [plan.folded for plan in run(turns, {("b", AUTO): 2}, 1, 6)]
    assert other.index("b") in range(17, 21)


def test_others_beside_a_fold_must_be_worth_two_swaps() -> None:
    """31 rows of 32: 3,100 tokens/s folded, 2,667 together; two cycles of 30 ms are 186 tokens, which takes 0.43 s."""
    plans = run(policy(), {("a", AUTO): 31, ("b", AUTO): 1}, 1)
    assert [plan.folded for plan in plans].index("a") in range(42, 46)


def test_time_without_rows_is_nobodys_loss() -> None:
    turns, now = policy(), 0.0
    for _ in range(15):
        assert turns.plan(view({("a", AUTO): 1}), now).folded is SHARED
        turns.pause()
        now += 0.5


def test_auto_rows_of_another_adapter_get_the_weights_at_once_when_nobody_else_is_left() -> None:
    turns = policy()
    run(turns, {("a", AUTO): 2}, 1)
    plan = turns.plan(view({("b", AUTO): 1}), 1.0)
    assert plan.folded is SHARED
    assert "no rows left" in plan.reason


def test_a_pause_is_nobodys_loss() -> None:
    turns = policy(costs(fold=2.0, restore=1.0))
    run(turns, {("a", AUTO): 1}, 0.1)
    assert turns.plan(view({("a", AUTO): 1}), 1000.0).folded is SHARED


def test_a_clock_that_jumps_back_changes_nothing() -> None:
    turns = policy()
    run(turns, {("a", MERGED): 1, ("b", MERGED): 1}, 1, start=100)
    plans = run(turns, {("a", MERGED): 1, ("b", MERGED): 1}, 5, start=0)
    assert {plan.folded for plan in plans} <= {"a", "b"}


def test_merged_auto_and_base_rows_share_the_time() -> None:
    rows: dict[Group, int] = {("a", MERGED): 2, ("b", AUTO): 2, BASE: 1}
    plans = run(policy(), rows, 10)
    assert {plan.folded for plan in plans} == {"a", SHARED}
    assert all(plan.reason for plan in plans)


def test_costs_between_measured_batches_lie_on_a_line_and_ratios_fill_gaps() -> None:
    known = Costs()
    known.step(adapters=0, rows=1, seconds=0.010)
    known.step(adapters=0, rows=4, seconds=0.040)
    known.step(adapters=1, rows=4, seconds=0.060)
    assert known.plain_seconds(2) == pytest.approx(0.020)
    assert known.two_path_seconds(1, 1) == pytest.approx(0.015)
    assert known.overhead(4) == pytest.approx(1.5)
    assert known.plain_seconds(32) == pytest.approx(0.040)
    assert Costs().plain_seconds(1) is None


def test_costs_of_two_path_steps_are_those_of_as_many_adapters_if_these_are_known() -> None:
    known = Costs()
    for adapters, seconds in ((1, 0.011), (8, 0.020)):
        for rows in (4, 8, 16):
            known.step(adapters=adapters, rows=rows, seconds=seconds)
    assert known.two_path_seconds(8, 1) == 0.011
    assert known.two_path_seconds(8, 7) == 0.020
    assert known.two_path_seconds(8, 2) in (0.011, 0.020)
    assert known.two_path_seconds(2, 1) in (0.011, 0.020)


def test_costs_forget_what_was_long_ago() -> None:
    known = Costs()
    for seconds in (*[0.5] * 40, *[0.01] * 40):
        known.step(adapters=0, rows=1, seconds=seconds)
    assert known.plain_seconds(1) == 0.01


def test_turns_of_others_are_no_loss_of_the_shared_side() -> None:
    """How many steps of its own it takes until the shared side folds, with nobody else and with others between."""
    rows: dict[Group, int] = {("a", AUTO): 4}
    alone = turns_of(run(policy(), rows, 5))
    shared, others = policy(), {**rows, ("m", MERGED): 1}
    now, own = 0.0, 0
    while True:
        plan = shared.plan(view(others), now)
        if plan.folded == "a":
            break
        own += plan.folded is SHARED
        now += STEP
    assert alone[0][0] is SHARED
    assert own == pytest.approx(alone[0][1], abs=2 + own // 10)
