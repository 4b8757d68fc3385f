"""What is advised, from what is known; the oracle is common sense, case by case."""

from dataclasses import replace
from typing import Any

import pytest

from lorafold.advice import Evidence, advise, nearest
from lorafold.engine.traffic import WINDOW, Traffic
from lorafold_adapters.overhead import Cell, Overhead
from lorafold_adapters.policy import PolicyKind

CELL = Cell(batch=8, adapters=1, rank=16, context=128)
DEAR = Overhead(cell=CELL, pairs=50, ratio=1.3, low=1.28, high=1.32, plain_seconds=0.010, unmerged_seconds=0.013)
FREE = replace(DEAR, ratio=1.005, low=1.0, high=1.01)
KNOWN = Evidence(
    name="sql",
    policy=PolicyKind.AUTO,
    moments=5000,
    alone=0.5,
    rows=6.0,
    overhead=DEAR,
    age=180.0,
    swap_seconds=0.027,
    delta_error=0.0125,
)


@pytest.mark.parametrize(
    ("known", "policy", "because"),
    [
        ({}, PolicyKind.AUTO, "50% of 5,000 moments"),
        ({"alone": 0.97}, PolicyKind.MERGED, "hardly anybody waits"),
        ({"alone": 0.02}, PolicyKind.UNMERGED, "others would wait"),
        ({"alone": 0.97, "overhead": FREE}, PolicyKind.UNMERGED, "folding gains nothing"),
        ({"alone": 0.97, "moments": 3}, PolicyKind.AUTO, "too few requests"),
        ({"overhead": None}, PolicyKind.AUTO, "run 'lorafold bench overhead'"),
        ({"alone": 1.0, "fold_refusal": "too much is lost"}, PolicyKind.UNMERGED, "cannot be folded: too much is lost"),
        ({"alone": 0.0, "route_refusal": "LoHa"}, PolicyKind.MERGED, "cannot run unmerged: LoHa"),
    ],
)
def test_the_advice_follows_from_traffic_costs_and_what_is_possible(
    known: dict[str, Any], policy: PolicyKind, because: str
) -> None:
    advice = advise(replace(KNOWN, **known))
    assert advice.policy is policy
    assert because in advice.lines[1]
    assert advice.lines[0].startswith(f"Serve 'sql' {policy.value}: ")


def test_it_says_what_changes_what_it_costs_and_what_is_lost() -> None:
    first, why, lost = advise(replace(KNOWN, alone=1.0)).lines
    assert first == "Serve 'sql' merged: it is auto now."
    assert "a step of 8 rows of 1 adapter of rank 16 takes 1.30 times as long (1.28 to 1.32) (3 min ago)" in why
    assert lost == "A fold loses 0.013 of its delta to rounding, unmerged loses nothing; a swap takes 27 ms."
    assert advise(KNOWN).lines[0] == "Serve 'sql' auto: as it is now."


def test_the_cell_most_like_the_traffic_counts() -> None:
    cells = [
        Cell(batch=b, adapters=a, rank=r, context=128) for b in (1, 8, 32) for a in (1, 8) for r in (8, 64) if a <= b
    ]
    known = dict.fromkeys(cells, (DEAR, 0.0))
    assert nearest(known, 64, rows=6.0, adapters=1.3) == Cell(batch=8, adapters=1, rank=64, context=128)
    assert nearest(known, 8, rows=30.0, adapters=12.0) == Cell(batch=32, adapters=8, rank=8, context=128)
    assert nearest(known, None, rows=1.0, adapters=1.0) in known
    assert nearest({}, 8, rows=1.0, adapters=1.0) is None


def test_traffic_tells_who_was_alone() -> None:
    traffic, auto = Traffic(), PolicyKind.AUTO
    for _ in range(3):
        traffic.note({("a", auto): 2}, now=1.0)
    traffic.note({("a", auto): 1, ("b", auto): 4, (None, PolicyKind.UNMERGED): 1}, now=2.0)
    of_a, of_b = traffic.of("a"), traffic.of("b")
    assert (of_a.count, of_a.alone, of_a.rows, of_a.all_rows, of_a.adapters) == (4, 3, 7, 12, 5)
    assert (of_b.count, of_b.alone, of_b.all_rows) == (1, 0, 6)
    assert traffic.of("c").count == 0


def test_one_adapter_under_two_policies_is_alone() -> None:
    traffic = Traffic()
    traffic.note({("a", PolicyKind.MERGED): 1, ("a", PolicyKind.UNMERGED): 1}, now=1.0)
    assert traffic.of("a").alone == 1


def test_traffic_is_forgotten() -> None:
    traffic, auto = Traffic(), PolicyKind.AUTO
    traffic.note({("a", auto): 1}, now=0.0)
    traffic.note({("b", auto): 1}, now=WINDOW + 1)
    assert traffic.of("a").count == 1
    traffic.note({("b", auto): 1}, now=2 * WINDOW + 2)
    assert (traffic.of("a").count, traffic.of("b").count) == (0, 2)
    traffic.note({("b", auto): 1}, now=9 * WINDOW)
    assert traffic.of("b").count == 1
