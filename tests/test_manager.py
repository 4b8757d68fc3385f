"""Both paths against PEFT, bit-exact undo, and what the manager refuses. Oracle: PeftModel.from_pretrained."""

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
    AdapterUnsupported,
    BaseMismatch,
    FoldFailed,
    RoutingMismatch,
)
from lorafold_adapters.two_path import SITE
from tests.models import (
    BIASED_KINDS,
    DEVICES,
    KINDS,
    apart,
    logits_of,
    on,
    prompts,
    save_adapter,
    tiny_llama,
    tiny_qwen,
)
from tests.tolerances import EFFECT, LOGITS, WEIGHTS

MakeAdapter = Callable[..., Path]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all-linear", "dora", "rslora"])
def test_folded_weights_equal_peft_merge(
    kind: str, dtype: torch.dtype, device: str, adapter_on_llama: MakeAdapter
) -> None:
    adapter = adapter_on_llama(**KINDS[kind])
    oracle = PeftModel.from_pretrained(on(device, tiny_llama(dtype=dtype)), str(adapter)).merge_and_unload()
    model = on(device, tiny_llama(dtype=dtype))
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("it", adapter)
    manager.merge_adapter("it")
    for name, expected in oracle.state_dict().items():
        changed = not torch.equal(before[name], expected)
        assert changed == ("_proj" in name)
        assert apart(model.state_dict()[name].float(), expected.float()) < WEIGHTS[dtype], name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_sequence_of_folds_gives_the_base_back_bit_for_bit(
    dtype: torch.dtype, device: str, adapter_on_llama: MakeAdapter
) -> None:
    model = on(device, tiny_llama(dtype=dtype))
    before = weights_of(model)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    manager = AdapterManager(model)
    names = ["plain", "dora", "saved-head", "one-layer", "saved-norm"]
    for name in names:
        manager.load(name, adapter_on_llama(**KINDS[name]))
    generator = torch.Generator().manual_seed(3)
    for step in torch.randint(0, len(names) + 1, (60,), generator=generator).tolist():
        if step == len(names):
            manager.unmerge_adapter()
            assert_same_weights(model, before)
        else:
            manager.merge_adapter(names[step])
            assert manager.fold_state.folded == names[step]
    manager.unmerge_adapter()
    assert_same_weights(model, before)
    assert places == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert manager.verify_base() == []


def test_peft_does_not_give_a_bf16_base_back(adapter_on_llama: MakeAdapter) -> None:
    """Negative control of the test above: the same comparison finds PEFT's drift."""
    model = PeftModel.from_pretrained(tiny_llama(dtype=torch.bfloat16), str(adapter_on_llama(**KINDS["all-linear"])))
    before = weights_of(model)
    model.merge_adapter()
    model.unmerge_adapter()
    with pytest.raises(AssertionError):
        assert_same_weights(model, before)


def test_a_fold_does_not_depend_on_what_was_folded_before(adapter_on_llama: MakeAdapter) -> None:
    one, two = adapter_on_llama(**KINDS["all-linear"]), adapter_on_llama(seed=2, **KINDS["dora"])
    direct, detour = tiny_llama(dtype=torch.bfloat16), tiny_llama(dtype=torch.bfloat16)
    for model, sequence in ((direct, ["two"]), (detour, ["one", "two", "one", "two"])):
        manager = AdapterManager(model)
        manager.load("one", one)
        manager.load("two", two)
        for name in sequence:
            manager.merge_adapter(name)
    assert_same_weights(detour, weights_of(direct))


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


def test_a_fold_that_fails_half_way_gives_the_base_back(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafold_adapters import delta, fold

    model = tiny_llama()
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("good", adapter_on_llama(**KINDS["plain"]))
    manager.load("bad", adapter_on_llama(seed=2, **KINDS["all-linear"]))
    manager.merge_adapter("good")
    real, calls = delta.folded_weight, [0]

    def failing(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise MemoryError("injected")
        return real(*args)

    monkeypatch.setattr(fold, "folded_weight", failing)
    with pytest.raises(FoldFailed, match="injected"):
        manager.merge_adapter("bad")
    assert calls[0] == 5
    assert_same_weights(model, before)
    assert manager.fold_state.folded is None
    monkeypatch.undo()
    manager.merge_adapter("bad")
    manager.unmerge_adapter()
    assert_same_weights(model, before)


def test_a_fold_that_overflows_fp16_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(), tmp_path, lora_alpha=3_900_000, **KINDS["plain"])
    model = tiny_llama(dtype=torch.float16)
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("loud", adapter)
    with pytest.raises(FoldFailed, match="infinite"):
        manager.merge_adapter("loud")
    assert_same_weights(model, before)


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


def test_generation_grows_with_every_change(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    seen = [manager.fold_state.generation]
    changes: list[Callable[[], object]] = [lambda: manager.merge_adapter("it"), manager.unmerge_adapter]
    for change in changes:
        change()
        seen.append(manager.fold_state.generation)
    assert seen == sorted(set(seen))
    assert manager.unmerge_adapter() is False
    assert manager.fold_state.generation == seen[-1]


def test_detach_leaves_the_model_as_it_was(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama()
    classes = {name: type(module) for name, module in model.named_modules()}
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("a", adapter_on_llama(**KINDS["saved-head"]))
    manager.load("b", adapter_on_llama(**KINDS["all-linear"]))
    assert classes != {name: type(module) for name, module in model.named_modules()}
    manager.merge_adapter("a")
    manager.detach()
    assert classes == {name: type(module) for name, module in model.named_modules()}
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


def test_verify_base_names_the_tensor_that_differs() -> None:
    model = tiny_llama()
    manager = AdapterManager(model)
    assert manager.verify_base() == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert manager.verify_base() == ["model.layers.1.mlp.up_proj.weight"]


def test_the_fingerprint_is_of_the_content() -> None:
    digests = {AdapterManager(tiny_llama(seed, dtype)).base.digest for seed in (0, 1) for dtype in DTYPES}
    assert len(digests) == 6
    assert AdapterManager(tiny_llama()).base.digest in digests


def test_a_saved_head_is_not_folded_into_tied_embeddings(tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(tie_word_embeddings=False), tmp_path, **KINDS["saved-head"])
    model, ids = tiny_llama(tie_word_embeddings=True), prompts(1, 5)
    manager = AdapterManager(model)
    manager.load("it", adapter)
    with pytest.raises(AdapterUnsupported, match="tied"):
        manager.merge_adapter("it")
    oracle = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), str(adapter)).eval()
    with manager.routed(["it"]):
        assert apart(logits_of(model, ids), logits_of(oracle, ids)) < LOGITS[torch.float32]


def test_a_lora_bias_is_not_folded_where_there_is_no_bias(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    manager.load("it", adapter_on_llama(**BIASED_KINDS["lora-bias"]))
    with pytest.raises(AdapterUnsupported, match="has none"):
        manager.merge_adapter("it")


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
        ({"num_hidden_layers": 1}, "have no place"),
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
