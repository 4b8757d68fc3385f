"""Both paths against PEFT, routing, and what the manager refuses. Oracle: PeftModel.from_pretrained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import (
    AdapterInUse,
    AdapterNotLoaded,
    BaseMismatch,
    RoutingMismatch,
)
from lorafold_adapters.two_path import SITE
from tests.models import (
    BIASED_KINDS,
    DEVICES,
    KINDS,
    apart,
    assert_same_weights,
    logits_of,
    on,
    prompts,
    tiny_llama,
    tiny_qwen,
    weights_of,
)
from tests.tolerances import EFFECT, LOGITS

MakeAdapter = Callable[..., Path]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [*KINDS, *BIASED_KINDS])
def test_both_paths_equal_peft(
    kind: str, device: str, adapter_on_llama: MakeAdapter, adapter_on_qwen: MakeAdapter
) -> None:
    biased = kind in BIASED_KINDS
    make_model = tiny_qwen if biased else tiny_llama
    make_adapter = adapter_on_qwen if biased else adapter_on_llama
    adapter = make_adapter(**(BIASED_KINDS if biased else KINDS)[kind])
    ids = prompts(2, 9).to(device)
    expected = logits_of(PeftModel.from_pretrained(on(device, make_model()), str(adapter)).eval(), ids)
    model = on(device, make_model())
    base, before = logits_of(model, ids), weights_of(model)
    assert apart(base, expected) > EFFECT  # Negative control: the adapter does something.

    manager = AdapterManager(model)
    bound = manager.load("it", adapter)
    assert len(bound.updates) == bound.targeted > 0
    with manager.routed(["it", "it"]):
        assert apart(logits_of(model, ids), expected) < LOGITS[torch.float32]
    assert torch.equal(logits_of(model, ids), base)
    manager.merge_adapter("it")
    assert apart(logits_of(model, ids), expected) < LOGITS[torch.float32]
    manager.unmerge_adapter()
    assert torch.equal(logits_of(model, ids), base)
    assert_same_weights(model, before)


def test_rows_of_a_mixed_batch_equal_each_adapter_alone(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama()
    manager = AdapterManager(model)
    names = ["rslora", "dora", "saved-head", "saved-embedding", "patterns"]
    folders = {name: adapter_on_llama(seed=index, **KINDS[name]) for index, name in enumerate(names)}
    for name, folder in folders.items():
        manager.load(name, folder)
    rows: list[str | None] = [
        "dora",
        None,
        "rslora",
        "rslora",
        "saved-head",
        None,
        "saved-embedding",
        "patterns",
        "dora",
    ]
    ids = prompts(len(rows), 11)
    with manager.routed(rows):
        mixed = logits_of(model, ids)
    for index, adapter in enumerate(rows):
        oracle: Any = tiny_llama()
        if adapter is not None:
            oracle = PeftModel.from_pretrained(oracle, str(folders[adapter])).eval()
        assert apart(mixed[index : index + 1], logits_of(oracle, ids[index : index + 1])) < LOGITS[torch.float32]
        other = "dora" if adapter != "dora" else "rslora"
        wrong = PeftModel.from_pretrained(tiny_llama(), str(folders[other])).eval()
        assert apart(mixed[index : index + 1], logits_of(wrong, ids[index : index + 1])) > EFFECT


def test_packed_tokens_are_routed_one_by_one(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama()
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["head"]))
    ids = prompts(1, 6)
    with manager.routed(["it"] * 6, head=["it", "it"]), torch.no_grad():
        kept = model(input_ids=ids, logits_to_keep=torch.tensor([2, 5])).logits
    with manager.routed(["it"]):
        everything = logits_of(model, ids)
    assert apart(kept, everything[:, [2, 5]]) < LOGITS[torch.float32]


def test_two_path_dora_is_right_while_another_adapter_was_folded_at_load(adapter_on_llama: MakeAdapter) -> None:
    dora = adapter_on_llama(**KINDS["dora"])
    model = tiny_llama()
    manager = AdapterManager(model)
    manager.load("other", adapter_on_llama(seed=5, **KINDS["all-linear"]))
    manager.merge_adapter("other")
    manager.load("dora", dora)
    manager.unmerge_adapter()
    ids = prompts(1, 8)
    with manager.routed(["dora"]):
        got = logits_of(model, ids)
    expected = logits_of(PeftModel.from_pretrained(tiny_llama(), str(dora)).eval(), ids)
    assert apart(got, expected) < LOGITS[torch.float32]


def test_routing_is_gone_after_an_exception(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama()
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    ids = prompts(1, 5)
    base = logits_of(model, ids)
    with pytest.raises(IndexError), manager.routed(["it"]):
        logits_of(model, torch.tensor([[10**6]]))
    assert torch.equal(logits_of(model, ids), base)


def test_rows_are_never_computed_on_foreign_weights(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    manager.load("one", adapter_on_llama(**KINDS["plain"]))
    manager.load("two", adapter_on_llama(seed=2, **KINDS["plain"]))
    manager.merge_adapter("one")
    for rows in (["two"], [None]):
        with pytest.raises(AdapterInUse, match="unmerge_adapter"), manager.routed(rows):
            pass
    manager.unmerge_adapter()
    with manager.routed(["two"]):
        for change in (lambda: manager.merge_adapter("one"), manager.unmerge_adapter, lambda: manager.drop("one")):
            with pytest.raises(AdapterInUse):
                change()


@pytest.mark.parametrize("rows", [["it"], ["it", None], ["it"] * 5, []])
def test_a_batch_of_another_size_than_was_routed_is_refused(
    rows: list[str | None], adapter_on_llama: MakeAdapter
) -> None:
    model = tiny_llama()
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    ids = prompts(4, 3)
    base = logits_of(model, ids)
    with pytest.raises(RoutingMismatch), manager.routed(rows):
        logits_of(model, ids)
    assert torch.equal(logits_of(model, ids), base)


def test_loading_keeps_no_gradients(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama().requires_grad_(True)
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["dora"]))
    paths = model.get_submodule("model.layers.0.mlp.up_proj").__dict__[SITE].paths
    assert not paths["it"].gain_O.requires_grad


def test_detach_leaves_the_model_as_it_was(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama()
    attributes = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("a", adapter_on_llama(**KINDS["saved-head"]))
    manager.load("b", adapter_on_llama(**KINDS["all-linear"]))
    assert attributes != {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    manager.merge_adapter("a")
    manager.detach()
    assert attributes == {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    assert_same_weights(model, before)


def test_loading_a_name_again_replaces_it(adapter_on_llama: MakeAdapter) -> None:
    model, ids = tiny_llama(), prompts(1, 5)
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    with manager.routed(["it"]):
        first = logits_of(model, ids)
    replacement = adapter_on_llama(seed=9, **KINDS["dora"])
    manager.load("it", replacement)
    with manager.routed(["it"]):
        second = logits_of(model, ids)
    assert apart(first, second) > EFFECT
    expected = logits_of(PeftModel.from_pretrained(tiny_llama(), str(replacement)).eval(), ids)
    assert apart(second, expected) < LOGITS[torch.float32]
    manager.merge_adapter("it")
    with pytest.raises(AdapterInUse):
        manager.load("it", replacement)


def test_unknown_names_are_refused() -> None:
    manager = AdapterManager(tiny_llama())
    for call in (
        lambda: manager.merge_adapter("x"),
        lambda: manager.drop("x"),
        lambda: manager.routed(["x"]).__enter__(),
    ):
        with pytest.raises(AdapterNotLoaded, match="'x'"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "shape"),
        ({"num_hidden_layers": 1}, "has no place"),
        ({"intermediate_size": 80}, "shape"),
    ],
)
def test_an_adapter_of_another_base_is_refused_whole(
    changes: dict[str, Any], message: str, adapter_on_llama: MakeAdapter
) -> None:
    manager = AdapterManager(tiny_llama(**changes))
    with pytest.raises(BaseMismatch, match=message):
        manager.load("it", adapter_on_llama(**KINDS["all-linear"]))
    assert manager.adapters == {}
