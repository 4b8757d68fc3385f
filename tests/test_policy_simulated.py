"""What `auto` is worth over whole workloads, in simulated time; `bench.policy` measures the same with real models."""

from dataclasses import replace

import pytest

from bench.arrivals import KINDS
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import Cause, Plan, PolicyKind, QueueView
from lorafold_adapters.turns import MeasuredTurns
from tests.simulated import Answer, Machine, Server, tokens_a_second, usual

MERGED, UNMERGED, AUTO = PolicyKind.MERGED, PolicyKind.UNMERGED, PolicyKind.AUTO
MACHINES = {
    "cpu": Machine(step=0.015, row=0.0007, beside=1.25, adapter=0.002, fold=0.035, restore=0.011),
    "gpu": Machine(step=0.010, row=0.00005, beside=1.15, adapter=0.0001, fold=0.008, restore=0.006),
    "dear folds": Machine(step=0.010, row=0.00005, beside=1.35, adapter=0.0002, fold=0.060, restore=0.030),
}


def turns(costs: Costs) -> MeasuredTurns:
    return MeasuredTurns(costs, swap_share=0.05, max_wait=1.0)


class Largest:
    """Folds whatever has the most rows, at once."""

    def plan(self, view: QueueView, now: float) -> Plan:
        return Plan(folded=max(view.rows, key=view.rows.__getitem__)[0], cause=Cause.FOLD_PAYS, reason="")

    def pause(self) -> None: ...


@pytest.mark.parametrize("load", [0.3, 0.6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MACHINES)
def test_auto_is_at_most_a_twentieth_slower_than_the_better_fixed_policy(name: str, kind: str, load: float) -> None:
    machine = MACHINES[name]
    fixed = [UNMERGED, MERGED] if kind == "dominant" else [UNMERGED]
    best = min(usual(machine, kind, load, policy, turns) for policy in fixed)
    assert usual(machine, kind, load, AUTO, turns) <= 1.05 * best


@pytest.mark.parametrize("name", MACHINES)
def test_auto_is_better_than_never_folding_where_adapters_dominate_in_turn(name: str) -> None:
    machine = MACHINES[name]
    assert usual(machine, "shifting", 0.3, AUTO, turns) < 0.99 * usual(machine, "shifting", 0.3, UNMERGED, turns)


@pytest.mark.parametrize("name", MACHINES)
def test_folding_whatever_is_largest_misses_that_bound(name: str) -> None:
    """The negative control."""
    machine = MACHINES[name]
    best = usual(machine, "even", 0.6, UNMERGED, turns)
    assert usual(machine, "even", 0.6, AUTO, lambda _: Largest()) > 1.05 * best


def test_auto_leaves_everybody_unmerged_where_that_costs_nothing() -> None:
    machine = replace(MACHINES["gpu"], beside=1.0, adapter=0.0)
    unmerged = usual(machine, "dominant", 0.3, UNMERGED, turns)
    assert usual(machine, "dominant", 0.3, AUTO, turns) == pytest.approx(unmerged, rel=0.005)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 15])
def test_auto_serves_a_crowd_and_one_other_faster_than_unmerged_or_as_fast(name: str, rows: int) -> None:
    """They never end: nobody is ever alone."""
    machine = MACHINES[name]
    answers = [Answer(due=0, adapter="a", left=10**9) for _ in range(rows)] + [Answer(due=0, adapter="b", left=10**9)]
    tokens = {kind: tokens_a_second(Server(machine, kind, turns), answers) for kind in (UNMERGED, AUTO)}
    assert tokens[AUTO] >= 0.995 * tokens[UNMERGED]
    if rows == 15 and name != "gpu":
        assert tokens[AUTO] > 1.05 * tokens[UNMERGED]
