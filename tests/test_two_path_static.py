"""Routing that a graph can capture. Oracle: `routed` with the same rows, which test_two_path.py compares with PEFT."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import AdapterInUse, AdapterNotLoaded, RoutingMismatch
from lorafold_adapters.kernels import Kernels, Reference
from tests.interpreter import interpreted
from tests.models import BIASED_KINDS, DEVICES, KINDS, apart, logits_of, on, prompts, tiny_llama, tiny_qwen
from tests.tolerances import EFFECT, LOGITS

MakeAdapter = Callable[..., Path]
Rows = Sequence[str | None]
DEVICE = DEVICES[-1]
NAMES = ["rslora", "dora", "patterns", "head", "all-linear", "one-layer"]
MIXES: list[Rows] = [
    ["dora"] * 8,
    NAMES,
    ["head", None, "dora", None, "head", "rslora", "all-linear", None],
    [None] * 8,
    ["one-layer"],
]


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "reference":
        yield Reference()
        return
    products = pytest.importorskip("lorafold_adapters.kernels.triton_products")
    with nullcontext() if DEVICE == "cuda" else interpreted(products):
        yield products.TritonProducts()


def loaded(make: MakeAdapter, names: Sequence[str], **options: Any) -> tuple[Any, AdapterManager]:
    """The manager has seen one forward, and so knows which modules share their inputs."""
    model = on(DEVICE, tiny_llama())
    manager = AdapterManager(model, **options)
    for index, name in enumerate(names):
        manager.load(name, make(seed=index, **KINDS[name]))
    routed(model, manager, names[:1])
    return model, manager


def ids_of(rows: int) -> Tensor:
    return prompts(rows, 1).to(DEVICE)


def routed(model: Any, manager: AdapterManager, rows: Rows) -> Tensor:
    with manager.routed(rows):
        return logits_of(model, ids_of(len(rows)))


@pytest.mark.parametrize("learned", [True, False])
def test_any_mix_runs_without_anything_but_the_slots_changing(
    learned: bool, kernels: Kernels, adapter_on_llama: MakeAdapter
) -> None:
    model, manager = loaded(adapter_on_llama, NAMES, kernels=kernels)
    if not learned:
        manager.detach()
        for index, name in enumerate(NAMES):
            manager.load(name, adapter_on_llama(seed=index, **KINDS[name]))
    oracle, oracles = loaded(adapter_on_llama, NAMES)
    base = logits_of(model, ids_of(8))
    static = manager.static_routing(capacity=8)
    assert len(static.groups.groups) == (2 * 4 + 1 if learned else 2 * 7 + 1)
    with static.routed():
        for rows in MIXES:
            static.set(rows)
            got = logits_of(model, ids_of(8))  # As a graph would: all rows, of which some are padding.
            padded = [*rows, *[None] * (8 - len(rows))]
            assert apart(got, routed(oracle, oracles, padded)) < LOGITS[torch.float32]
            assert [torch.equal(got[row], base[row]) for row in range(8)] == [name is None for name in padded]
    assert apart(routed(oracle, oracles, NAMES[::-1]), routed(oracle, oracles, NAMES)) > EFFECT  # Negative control.


@pytest.mark.parametrize("kind", BIASED_KINDS)
def test_gains_and_biases_are_right(kind: str, kernels: Kernels, adapter_on_qwen: MakeAdapter) -> None:
    model = on(DEVICE, tiny_qwen())
    manager = AdapterManager(model, kernels=kernels)
    manager.load("it", adapter_on_qwen(**BIASED_KINDS[kind]))
    static = manager.static_routing(capacity=4)
    static.set(["it", None, "it"])
    with static.routed():
        got = logits_of(model, ids_of(3))
    assert apart(got, routed(model, manager, ["it", None, "it"])) < LOGITS[torch.float32]


def test_adapters_come_and_go_while_tables_stay_where_they_are(adapter_on_llama: MakeAdapter) -> None:
    model, manager = loaded(adapter_on_llama, ["all-linear", "dora"])
    static = manager.static_routing(capacity=2)

    def addresses() -> list[int]:
        tables = [group.tables for group in static.groups.groups]
        return [tensor.data_ptr() for table in tables for tensor in (table.a_FS, table.b_JFS, table.width_J)]

    before = addresses()
    manager.drop("dora")
    assert not static.covers(["dora"])
    manager.load("dora", adapter_on_llama(seed=9, **KINDS["dora"]))
    manager.load("late", adapter_on_llama(seed=8, **KINDS["rslora"]))
    mixes: list[Rows] = [["dora", "late"], ["late", "all-linear"]]
    for rows in mixes:
        static.set(rows)
        with static.routed():
            got = logits_of(model, ids_of(2))
        assert apart(got, routed(model, manager, rows)) < LOGITS[torch.float32]
    assert addresses() == before


def test_what_kernels_do_not_do_is_said(adapter_on_llama: MakeAdapter) -> None:
    _, manager = loaded(adapter_on_llama, ["plain", "saved-head"])
    static = manager.static_routing(capacity=2)
    assert manager.graphable(["plain", None])
    assert static.covers(["plain", None])
    assert not manager.graphable(["plain", "saved-head"])
    assert not static.covers(["saved-head"])
    assert not static.covers(["plain"] * 3)
    manager.load("other modules", adapter_on_llama(**KINDS["all-linear"]))
    manager.load("larger rank", adapter_on_llama(target_modules=["q_proj"], r=9))
    for name in ("other modules", "larger rank"):
        assert manager.graphable([name])
        assert not static.covers([name])
        with pytest.raises(RoutingMismatch, match="covers"):
            static.set([name])
    assert manager.static_routing(capacity=2).covers(["other modules", "larger rank"])


def test_static_routing_is_refused_where_routing_is(adapter_on_llama: MakeAdapter) -> None:
    model, manager = loaded(adapter_on_llama, ["plain"])
    static = manager.static_routing(capacity=2)
    with pytest.raises(AdapterNotLoaded, match="'x'"):
        static.set(["x"])
    with static.routed():
        for change in (
            lambda: manager.merge_adapter("plain"),
            lambda: manager.drop("plain"),
            lambda: static.routed().__enter__(),
        ):
            with pytest.raises(AdapterInUse):
                change()
        with pytest.raises(RoutingMismatch, match="made for 2"):
            logits_of(model, ids_of(3))
    manager.merge_adapter("plain")
    calls: list[Callable[[], object]] = [lambda: static.set(["plain"]), lambda: static.routed().__enter__()]
    for call in calls:
        with pytest.raises(AdapterInUse, match="unmerge_adapter"):
            call()
    with pytest.raises(AdapterNotLoaded, match="low-rank"):
        AdapterManager(tiny_llama()).static_routing(capacity=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("overlap", [False, True])
def test_a_captured_graph_replays_any_mix(overlap: bool, adapter_on_llama: MakeAdapter) -> None:
    model, manager = loaded(adapter_on_llama, NAMES)
    static, ids = manager.static_routing(capacity=8, overlap=overlap), ids_of(8)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with static.routed(), torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(input_ids=ids, use_cache=False).logits
    base = logits_of(model, ids)
    manager.drop("one-layer")
    manager.load("one-layer", adapter_on_llama(seed=77, **KINDS["one-layer"]))
    for rows in MIXES:
        static.set(rows)
        graph.replay()
        padded = [*rows, *[None] * (8 - len(rows))]
        assert apart(captured.float(), routed(model, manager, padded)) < LOGITS[torch.float32]
        absent = [row for row, name in enumerate(padded) if name is None]
        assert apart(captured.float()[absent], base[absent]) < LOGITS[torch.float32] if absent else True
