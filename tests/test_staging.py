"""What may happen while the model runs: staging, its limits, and what loading leaves alone. Oracle: loading at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.blocks import ALIGNMENT, BLOCK_BYTES, moved, packed
from lorafold_adapters.compose import Composition
from lorafold_adapters.errors import DeviceFull
from lorafold_adapters.staging import Stager, reads_base, routed_updates, tensors_in
from lorafold_adapters.two_path import SITE
from tests.kinds import WORKING
from tests.models import DEVICES, KINDS, apart, logits_of, on, prompts, tiny_llama
from tests.tolerances import EFFECT

MakeAdapter = Callable[..., Path]
ROUTED = [name for name, kind in WORKING.items() if kind.routed]


def bytes_of(count: int) -> Tensor:
    return torch.full((count,), 255, dtype=torch.uint8)


def distinct(tensors: list[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROUTED)
def test_a_staged_adapter_is_what_loading_at_once_makes_of_it(name: str, device: str, tmp_path: Path) -> None:
    kind, ids = WORKING[name], prompts(2, 9).to(device)
    folder = kind.save(tmp_path)
    model, other = on(device, kind.base()), on(device, kind.base())
    manager, at_once = AdapterManager(model), AdapterManager(other)
    plain = logits_of(model, ids)
    at_once.load("it", folder)
    with ThreadPoolExecutor(1) as thread:
        bound = thread.submit(manager.bind, folder).result()
        staged = thread.submit(manager.stage, manager.pinned(bound)).result()
    assert torch.equal(logits_of(model, ids), plain)
    assert manager.adapters == {}
    manager.load("it", staged)
    with manager.routed(["it", "it"]), at_once.routed(["it", "it"]):
        assert torch.equal(got := logits_of(model, ids), logits_of(other, ids))
    assert apart(got, plain) > EFFECT  # Negative control.


@pytest.mark.parametrize("name", ROUTED)
def test_what_an_adapter_takes_is_known_beforehand(name: str, tmp_path: Path) -> None:
    kind = WORKING[name]
    manager = AdapterManager(kind.base())
    bound = manager.bind(kind.save(tmp_path))
    assert bound.nbytes == distinct([tensor for update in bound.updates.values() for tensor in every(update)])
    promised = manager.device_bytes(bound)
    manager.load("it", bound)
    sites = [module.__dict__[SITE] for module in manager.model.modules() if SITE in module.__dict__]
    paths = tuple(site.paths["it"] for site in sites)
    taken = distinct(list(tensors_in(paths)))
    exact = all(hasattr(path, "scaled_b_RO") for path in paths)
    assert taken == promised if exact else taken <= promised <= taken + bound.nbytes


def every(update: object) -> list[Tensor]:
    parameters = getattr(update, "parameters", {})
    return [*tensors_in(update), *parameters.values()]


def test_compositions_are_staged_as_far_as_they_go(adapter_on_llama: MakeAdapter) -> None:
    ids = prompts(1, 7)
    managers = [AdapterManager(tiny_llama()) for _ in range(2)]
    for manager in managers:
        parts = [(manager.bind(adapter_on_llama(seed=seed, **KINDS["plain"])), 0.5) for seed in (1, 2)]
        composed = manager.compose(parts, Composition(method="ties", density=0.9, rank=64))
        assert not routed_updates(composed)  # Their forms read weights.
        manager.load("it", manager.stage(composed) if manager is managers[0] else composed)
    outputs = []
    for manager in managers:
        with manager.routed(["it"]):
            outputs.append(logits_of(manager.model, ids))
    assert torch.equal(*outputs)


def test_forms_that_need_no_weights_are_made_while_staging(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    for kind, early in (("all-linear", True), ("patterns", True), ("dora", False), ("saved-norm", None)):
        bound = manager.bind(adapter_on_llama(**KINDS[kind]))
        staged = manager.stage(bound)
        waiting = {name for name, update in bound.updates.items() if reads_base(update)}
        assert staged.paths.keys() == bound.updates.keys() - waiting
        assert early is None or bool(staged.paths) is early
    assert waiting
    assert staged.paths  # The norms wait, the layers beside them do not.


def test_an_adapter_that_finds_no_memory_changes_nothing(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, ids = AdapterManager(model := tiny_llama()), prompts(1, 5)
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    with manager.routed(["it"]):
        before = logits_of(model, ids)
    other = manager.bind(adapter_on_llama(seed=2, **KINDS["dora"]))
    staged = manager.stage(other)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Stager, "stage", full)
        with pytest.raises(DeviceFull, match="drop others first"):
            manager.stage(other)
    with monkeypatch.context() as patch:
        patch.setattr(manager, "_path", full)
        with pytest.raises(DeviceFull, match="drop others first"):
            manager.load("it", staged)
    assert manager.adapters.keys() == {"it"}
    with manager.routed(["it"]):
        assert torch.equal(logits_of(model, ids), before)
    manager.load("it", staged)  # Negative control: with memory it goes.
    with manager.routed(["it"]):
        assert apart(logits_of(model, ids), before) > EFFECT


def test_adapters_that_come_and_go_leave_the_plans_of_others(adapter_on_llama: MakeAdapter) -> None:
    manager, ids = AdapterManager(model := tiny_llama()), prompts(3, 1)
    rows: list[str | None] = ["a", "b", None]
    for name in "ab":
        manager.load(name, adapter_on_llama(seed=ord(name), **KINDS["all-linear"]))
    for _ in range(2):  # The first forward pass shows which layers share an input.
        with manager.routed(rows):
            before = logits_of(model, ids)
    plans = dict(manager._router._plans)
    assert len(plans) == 1
    manager.load("c", adapter_on_llama(seed=9, **KINDS["dora"]))
    manager.drop("c")
    assert manager._router._plans == plans
    with manager.routed(rows):
        assert torch.equal(logits_of(model, ids), before)
    manager.load("b", adapter_on_llama(seed=9, **KINDS["dora"]))
    assert not manager._router._plans  # Negative control: this one's are gone.
    with manager.routed(rows):
        after = logits_of(model, ids)
    assert apart(after[1:2], before[1:2]) > EFFECT
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize("name", ROUTED)
def test_blocks_hold_the_same_values_in_few_copies(name: str, tmp_path: Path) -> None:
    kind, made = WORKING[name], []
    bound = AdapterManager(kind.base()).bind(kind.save(tmp_path))

    def empty(count: int) -> Tensor:
        made.append(count)
        return bytes_of(count)

    in_blocks = packed(bound, empty)
    copies: list[Tensor] = []

    def copy(block: Tensor) -> Tensor:
        copies.append(block)
        return block.clone()

    there = moved(in_blocks, copy)
    assert len(copies) == len([count for count in made if count]) == 1
    assert sum(made) <= bound.nbytes + ALIGNMENT * len(bound.tensors())
    assert_same_values(bound, in_blocks)
    assert_same_values(bound, there)
    copies[0].zero_()  # The copy has memory of its own.
    assert_same_values(bound, there)
    assert any(bool((tensor == 0).all()) for tensor in in_blocks.tensors())


def assert_same_values(one: BoundAdapter, other: BoundAdapter) -> None:
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_large_adapters_take_several_blocks(adapter_on_llama: MakeAdapter) -> None:
    bound = AdapterManager(tiny_llama()).bind(adapter_on_llama(**KINDS["all-linear"]))
    sizes = iter([5 << 20, 3 << 20, 20 << 20, 9 << 20, 8 << 20, 100])
    large = bound.mapped(lambda _: torch.ones(next(sizes, 1), dtype=torch.uint8))
    made: list[int] = []

    def empty(count: int) -> Tensor:
        made.append(count)
        return bytes_of(count)

    assert_same_values(large, packed(large, empty))
    assert max(made) == 20 << 20
    assert all(count <= BLOCK_BYTES for count in made if count != 20 << 20)
    assert len(made) <= 6
