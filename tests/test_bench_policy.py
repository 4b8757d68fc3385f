"""The traffic that `bench.policy` replays, and how it sums up. No engine runs."""

from collections import Counter
from itertools import pairwise

import pytest

from bench.arrivals import DOMINANCE, KINDS, arrivals
from bench.policy import hopeless, over_best, spread
from bench.replay import percentile, summary
from lorafold_adapters.policy import PolicyKind


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_the_same_for_the_same_seed_and_another_for_another(kind: str) -> None:
    first = arrivals(kind, rate=50, seconds=10, adapters=16, seed=1)
    assert first == arrivals(kind, rate=50, seconds=10, adapters=16, seed=1)
    assert first != arrivals(kind, rate=50, seconds=10, adapters=16, seed=2)
    assert 400 < len(first) < 600
    assert all(0 < one.at < other.at < 10 for one, other in pairwise(first))


def shares(kind: str, start: float, stop: float) -> dict[int, float]:
    found = [
        item.adapter for item in arrivals(kind, rate=1000, seconds=10, adapters=16, seed=1) if start < item.at < stop
    ]
    return {adapter: count / len(found) for adapter, count in Counter(found).items()}


def test_one_adapter_dominates_or_none_or_another_one_later() -> None:
    assert shares("dominant", 0, 10)[0] == pytest.approx(DOMINANCE, abs=0.02)
    assert max(shares("even", 0, 10).values()) < 0.1
    assert len(shares("even", 0, 10)) == len(shares("dominant", 0, 10)) == 16
    assert shares("shifting", 0, 2.5)[0] == pytest.approx(DOMINANCE, abs=0.03)
    assert max(shares("shifting", 2.5, 5).values()) < 0.1
    assert shares("shifting", 5, 7.5)[1] == pytest.approx(DOMINANCE, abs=0.03)


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.75) == 1.75
    assert percentile([5.0], 0.99) == 5.0
    assert summary([1.0, 3.0]) == {"mean": 2.0, "p99": pytest.approx(2.98)}


def test_auto_is_compared_with_the_better_fixed_policy_by_the_median_of_each_request() -> None:
    of = {
        PolicyKind.MERGED: [[9.0, 9.0]],
        PolicyKind.UNMERGED: [[4.0, 6.0], [5.0, 5.0], [90.0, 1.0]],
        PolicyKind.AUTO: [[4.0, 4.0], [4.0, 4.0], [7.0, 70.0]],
    }
    assert over_best(of, "mean") == 0.8
    assert over_best({**of, PolicyKind.MERGED: [[2.0, 2.0]]}, "mean") == 2.0


def test_how_far_rounds_lie_apart_is_told() -> None:
    of = {
        PolicyKind.MERGED: [[9.0, 9.0]],
        PolicyKind.UNMERGED: [[4.0, 6.0], [5.0, 5.0], [2.0, 2.0]],
        PolicyKind.AUTO: [[4.0, 4.0], [5.0, 5.0], [4.0, 4.0]],
    }
    assert spread(of) == {"median": 1.0, "quartile_1": 0.9, "quartile_3": 1.5}
    assert spread({policy: rounds[:1] for policy, rounds in of.items()})["quartile_1"] == 0.8


def test_a_policy_far_behind_another_one_is_hopeless() -> None:
    of = {PolicyKind.MERGED: [[9.0, 9.0]], PolicyKind.UNMERGED: [[4.0, 4.0]], PolicyKind.AUTO: [[8.0, 8.0]]}
    assert [hopeless(of, policy) for policy in of] == [True, False, False]
