"""Folding: equal to PEFT's merge, and undone bit for bit whatever happens. Oracles: PEFT, torch.equal."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lorafold_adapters import AdapterManager, copies, fold, folded, records
from lorafold_adapters import manager as manager_module
from lorafold_adapters import undo as undo_module
from lorafold_adapters.delta import AddProduct
from lorafold_adapters.errors import AdapterUnsupported, FoldFailed
from lorafold_adapters.undo_kinds import UndoKind
from tests.models import (
    BIASED_KINDS,
    DEVICES,
    KINDS,
    apart,
    assert_same_weights,
    logits_of,
    on,
    prompts,
    save_adapter,
    tiny_llama,
    weights_of,
)
from tests.tolerances import LOGITS, WEIGHTS

MakeAdapter = Callable[..., Path]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNDO_KINDS: list[UndoKind] = ["checkpoint", "host", "device", "sparse"]


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
@pytest.mark.parametrize("undo", UNDO_KINDS)
def test_any_sequence_of_folds_gives_the_base_back_bit_for_bit(
    undo: UndoKind, dtype: torch.dtype, device: str, adapter_on_llama: MakeAdapter, tmp_path: Path
) -> None:
    tiny_llama(dtype=dtype).save_pretrained(tmp_path)
    model = on(device, tiny_llama(dtype=dtype))
    before = weights_of(model)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    manager = AdapterManager(model, undo=undo, source=tmp_path)
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


@pytest.mark.parametrize("undo", UNDO_KINDS)
@pytest.mark.parametrize("place", ["before", "inside", "after", "nan"])
def test_a_fold_that_fails_half_way_gives_the_base_back(
    place: str, undo: UndoKind, adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    manager = AdapterManager(model, undo=undo)
    manager.load("good", adapter_on_llama(**KINDS["plain"]))
    manager.load("bad", adapter_on_llama(seed=2, **KINDS["all-linear"]))
    manager.merge_adapter("good")
    manager.fidelity("bad")
    calls = fail_at_call(5, place, monkeypatch)
    with pytest.raises(FoldFailed, match="NaN" if place == "nan" else "injected"):
        manager.merge_adapter("bad")
    assert calls[0] >= 5
    assert_same_weights(model, before)
    assert manager.fold_state.folded is None
    assert not manager.fold_state.dirty
    monkeypatch.undo()
    manager.merge_adapter("bad")
    manager.unmerge_adapter()
    assert_same_weights(model, before)


def fail_at_call(number: int, place: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the fold's arithmetic fail at its `number`th chunk, before, inside or after it; or give a NaN."""
    real, calls = AddProduct.forward, [0]

    def forward(change: AddProduct, base: Tensor, rows: slice, out: Tensor) -> Tensor | None:
        calls[0] += 1
        if calls[0] == number and place == "before":
            raise MemoryError("injected")
        memo = real(change, base, rows, out)
        if calls[0] == number and place == "inside":
            out[: out.shape[0] // 2] = 7.0
            raise MemoryError("injected")
        if calls[0] == number and place == "nan":
            out[0, 0] = float("nan")
        return memo

    def after(values: Tensor) -> Tensor:
        if calls[0] == number and place == "after":
            raise MemoryError("injected")
        return real_extent(values)

    real_extent = undo_module.extent
    monkeypatch.setattr(AddProduct, "forward", forward)
    for module in (copies, records):
        monkeypatch.setattr(module, "extent", after)
    return calls


TRACED = {module.__file__ for module in (copies, fold, folded, manager_module, records, undo_module)}


class Killed(BaseException):
    """What a thread that is killed from outside sees."""


@pytest.mark.parametrize("undo", UNDO_KINDS)
def test_wherever_a_thread_is_killed_the_base_can_be_given_back(undo: UndoKind, adapter_on_llama: MakeAdapter) -> None:
    """A trace function raises at every line in turn that changes or keeps track of weights."""
    folders = [adapter_on_llama(**KINDS["plain"]), adapter_on_llama(seed=2, **KINDS["saved-norm"])]
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    manager = AdapterManager(model, undo=undo)
    for name, folder in zip("ab", folders, strict=True):
        manager.load(name, folder)
        manager.fidelity(name)
    expected: dict[str | None, dict[str, Tensor]] = {None: before}
    for name in "ba":
        manager.merge_adapter(name)
        expected[name] = weights_of(model)
    line, ended = 0, False
    while not ended:
        manager.merge_adapter("a")
        ended = not killed_at_line(line, lambda: manager.merge_adapter("b"))
        if not manager.fold_state.dirty:
            assert_same_weights(model, expected[manager.fold_state.folded])
        killed_at_line(line, manager.unmerge_adapter)
        if not manager.fold_state.dirty:
            assert_same_weights(model, expected[manager.fold_state.folded])
        manager.unmerge_adapter()
        assert_same_weights(model, before)
        line += 1
    assert line > 50


def killed_at_line(number: int, work: Callable[[], object]) -> bool:
    """Runs `work` and raises Killed at the `number`th line of `TRACED` that it comes to; False if it never does."""
    left = [number]

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == -1:
                raise Killed
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Killed:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_a_fold_that_overflows_fp16_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(), tmp_path, lora_alpha=3_900_000, **KINDS["plain"])
    model = tiny_llama(dtype=torch.float16)
    before = weights_of(model)
    manager = AdapterManager(model, max_delta_error=float("inf"))
    manager.load("loud", adapter)
    with pytest.raises(FoldFailed, match="infinite"):
        manager.merge_adapter("loud")
    assert_same_weights(model, before)


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
