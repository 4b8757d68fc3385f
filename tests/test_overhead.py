"""What pairs of steps say, and what is borrowed and made up to time them. The oracle is arithmetic."""

import math
import random
from dataclasses import replace

import pytest
import torch

from lorafold.engine.pages import PagePool
from lorafold_adapters import AdapterManager
from lorafold_adapters.costs import Costs
from lorafold_adapters.made_up import made_up, plain_only, rank_of
from lorafold_adapters.overhead import Cell, Overhead, Pairs, interval
from tests.models import tiny_llama

CELL = Cell(batch=4, adapters=2, rank=8, context=16)


def pairs_of(ratio: float, noise: float, count: int, seed: int) -> Pairs:
    """Steps of 1 ms or so, which drift together, and apart by `noise`."""
    draw = random.Random(seed)
    drift = [1e-3 * draw.uniform(1, 3) for _ in range(count)]
    return Pairs(CELL, plain=drift, unmerged=[each * ratio * draw.lognormvariate(0, noise) for each in drift])


def test_what_both_steps_share_does_not_count() -> None:
    found = pairs_of(1.2, 1e-9, 50, seed=0).found()
    assert found.ratio == pytest.approx(1.2)
    assert found.width < 1e-6
    assert found.pairs == 50


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    found = [pairs_of(1.2, 0.1, 40, seed).found() for seed in range(300)]
    assert 0.91 <= sum(each.low <= 1.2 <= each.high for each in found) / 300 <= 0.99
    assert sum(each.low <= 1.3 <= each.high for each in found) < 30


def test_few_pairs_say_nothing_of_the_interval() -> None:
    assert interval([1.0, 1.1]) == (0.0, math.inf)
    assert pairs_of(1.2, 0.01, 3, seed=1).found().width == math.inf


def test_a_pair_counts_once_it_is_complete() -> None:
    pairs = Pairs(CELL, plain=[1.0, 1.0], unmerged=[2.0])
    assert pairs.count == 1
    assert pairs.found().ratio == 2.0


def test_borrowed_pages_are_nobodys() -> None:
    pool = PagePool(pages=33, size=4)
    tokens = list(range(20))
    first, second = pool.start("a", tokens), pool.start("b", tokens)
    for holding in (first, second):
        pool.grow(holding, 20, at_most=20)
        pool.seal(holding, tokens, 20)
    pool.release(first)  # Its pages stay known to later sequences.
    taken = {*first.pages, *second.pages, 0}
    lent = pool.borrow(3, 24)
    assert lent is not None
    assert [len(pages) for pages in lent] == [6, 6, 6]
    assert len({page for pages in lent for page in pages}) == 18
    assert not taken & {page for pages in lent for page in pages}
    assert pool.borrow(4, 24) is None, "22 pages are free"
    known = pool.start("a", tokens)
    assert known.sealed == 4, "the prefix is still known"
    pool.release(known)


def test_old_prefixes_make_room_for_borrowed_pages_the_oldest_first() -> None:
    pool = PagePool(pages=33, size=4)
    tokens = list(range(20))
    for adapter in "abcdef":  # 5 pages each, one after the other.
        holding = pool.start(adapter, tokens)
        pool.grow(holding, 20, at_most=20)
        pool.seal(holding, tokens, 20)
        pool.release(holding)
    assert pool.borrow(9, 16) is None, "36 pages are more than there are"
    assert [pool.start(adapter, tokens).sealed for adapter in "f"] == [4], "nothing was forgotten for that"
    lent = pool.borrow(4, 16)
    assert lent is not None
    assert len({page for pages in lent for page in pages}) == 16
    found = [pool.start(adapter, tokens).sealed for adapter in "abcde"]
    assert found[0] == found[1] == found[2] == 0
    assert found[4] == 4


def test_made_up_adapters_are_like_the_one_they_stand_in_for(adapter_on_llama) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama()
    manager = AdapterManager(model)
    like = manager.bind(adapter_on_llama(r=4, target_modules=["q_proj", "v_proj"]))
    one, again, other = made_up(model, 8, 0, like), made_up(model, 8, 0, like), made_up(model, 8, 1, like)
    assert one.digest == again.digest != other.digest
    assert one.updates.keys() == like.updates.keys()
    assert (rank_of(one), rank_of(like)) == (8, 4)
    everywhere = made_up(model, 2, 0)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert everywhere.updates.keys() == linear - {"lm_head"}
    for number, bound in enumerate((one, other, everywhere)):
        manager.load(str(number), bound)
    ids = torch.arange(4).view(2, 2)
    with torch.inference_mode(), manager.routed(["0", "2"]):
        assert not torch.equal(model(ids).logits, manager.model(ids).logits.flip(0))
    assert plain_only(manager.adapters) == {"0": 8, "1": 8, "2": 2}


def test_what_is_more_than_low_rank_products_is_not_timed_as_such(adapter_on_llama) -> None:  # type: ignore[no-untyped-def]
    manager = AdapterManager(tiny_llama())
    assert rank_of(manager.bind(adapter_on_llama(r=4, use_dora=True))) is None
    assert rank_of(manager.bind(adapter_on_llama(r=4))) == 4


def test_costs_go_by_pairs_where_no_such_step_of_requests_was_timed() -> None:
    costs = Costs()
    for _ in range(5):
        costs.step(adapters=0, rows=4, seconds=0.010)
    before = costs.two_path_seconds(4, 2)
    found = Overhead(cell=CELL, pairs=20, ratio=1.5, low=1.4, high=1.6, plain_seconds=0.008, unmerged_seconds=0.012)
    costs.measured(found)
    assert costs.two_path_seconds(4, 2) == pytest.approx(0.014)
    assert before != costs.two_path_seconds(4, 2) != costs.two_path_seconds(4, 8)
    costs.step(adapters=2, rows=4, seconds=0.020)
    assert costs.two_path_seconds(4, 2) == pytest.approx(0.020), "what requests take counts first"


def test_a_plain_step_never_costs_more_than_one_with_an_adapter_beside_the_weights() -> None:
    costs = Costs()
    for _ in range(5):
        costs.step(adapters=0, rows=4, seconds=0.5)  # While the machine had other work.
        costs.step(adapters=1, rows=4, seconds=0.012)
    assert costs.plain_seconds(4) == pytest.approx(0.012)
    cell = replace(CELL, batch=4, adapters=1)
    costs.measured(
        Overhead(cell=cell, pairs=20, ratio=1.2, low=1.1, high=1.3, plain_seconds=0.010, unmerged_seconds=0.012)
    )
    assert costs.plain_seconds(4) == pytest.approx(0.010)
    for _ in range(40):
        costs.step(adapters=0, rows=4, seconds=0.009)
    assert costs.plain_seconds(4) == pytest.approx(0.009), "what was measured counts where it is possible"
