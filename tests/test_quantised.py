"""Quantised bases: both modes, exact undo, requantising, provenance. Oracles: PEFT on the same base, dense weights."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lorafold_adapters import AdapterManager, stand_ins
from lorafold_adapters.binding import refuse_unserved_module
from lorafold_adapters.errors import AdapterUnsupported, BaseMismatch, DeltaLost, DeviceFull, FoldFailed
from lorafold_adapters.quantised import dequantised, keep_as_loaded, other_kind, quantised_modules
from lorafold_adapters.stand_ins import FoldOptions, StandIns
from lorafold_adapters.updates import LowRank
from tests.models import ALL_LINEAR, DEVICES, apart, logits_of, prompts, save_adapter, tiny_qwen
from tests.quantised import KINDS, assert_same_blobs, blobs, quantised_qwen
from tests.tolerances import EFFECT, QUANTISED

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL_LINEAR},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True},
    "biases and head": {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]},
}
ANY_LOSS = float("inf")


def an_adapter(folder: Path, seed: int = 1, name: str = "lora", **changes: Any) -> Path:
    return save_adapter(tiny_qwen(), folder, seed, **{**ADAPTERS[name], **changes})


def dequantise_targets(model: Any, targets: list[str], dtype: torch.dtype) -> Any:
    """Makes ordinary linear layers of those that an adapter changes."""
    for name, layer in quantised_modules(model).items():
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        if own in targets:
            plain = nn.Linear(1, 1, bias=False)
            plain.in_features, plain.out_features = layer.in_features, layer.out_features  # type: ignore[assignment]
            plain.weight = nn.Parameter(dequantised(layer).to(dtype), requires_grad=False)
            plain.bias = layer.bias  # type: ignore[assignment]
            setattr(model.get_submodule(parent), own, plain)
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_equal_peft_and_the_blob_comes_back(
    kind: str, dtype: torch.dtype, name: str, device: str, tmp_path: Path
) -> None:
    folder, ids = an_adapter(tmp_path / "it", name=name), prompts(2, 9).to(device)
    model = quantised_qwen(kind, tmp_path / "base", dtype, device)
    manager = AdapterManager(model, max_delta_error=ANY_LOSS)
    before, plain = blobs(model), logits_of(model, ids)
    oracle = quantised_qwen(kind, tmp_path / "base", dtype, device)
    unmerged = logits_of(PeftModel.from_pretrained(oracle, str(folder), autocast_adapter_dtype=False).eval(), ids)
    targets = ADAPTERS[name]["target_modules"]
    twin = dequantise_targets(quantised_qwen(kind, tmp_path / "base", dtype, device), targets, dtype)
    merged = logits_of(PeftModel.from_pretrained(twin, str(folder), autocast_adapter_dtype=False).eval(), ids)
    assert apart(plain, unmerged) > EFFECT  # Negative control: the adapter does something.

    manager.load("it", folder)
    with manager.routed(["it", "it"]):
        assert apart(logits_of(model, ids), unmerged) < QUANTISED[kind][dtype]
    manager.merge_adapter("it")
    folded = logits_of(model, ids)
    some_stay_quantised = targets != ALL_LINEAR
    assert apart(folded, merged) < QUANTISED[kind if some_stay_quantised else "dense"][dtype]
    assert apart(plain, folded) > EFFECT
    assert manager.fold_state.provenance == "dequantised base"
    assert manager.unmerge_adapter()
    assert torch.equal(logits_of(model, ids), plain)
    assert_same_blobs(model, before)
    assert manager.verify_base() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_adds_to_what_the_base_computes_with(kind: str, tmp_path: Path) -> None:
    """An adapter of nothing, folded, gives the base's own logits, but for the inputs, which int8 rounds as well."""
    folder = an_adapter(tmp_path / "it")
    model, ids = quantised_qwen(kind, tmp_path / "base"), prompts(2, 9)
    manager = AdapterManager(model, max_delta_error=ANY_LOSS)
    bound = manager.load("it", folder)
    for update in bound.updates.values():
        assert isinstance(update, LowRank)
        update.b_OR.zero_()
    manager.merge_adapter("it")
    folded = logits_of(model, ids)
    manager.unmerge_adapter()
    assert apart(folded, logits_of(model, ids)) < QUANTISED[kind][torch.float32]


@pytest.mark.parametrize("requantise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_folds_gives_the_blob_back(kind: str, requantise: bool, tmp_path: Path) -> None:
    model = quantised_qwen(kind, tmp_path / "base")
    manager = AdapterManager(model, max_delta_error=ANY_LOSS, quantised=FoldOptions(requantise=requantise))
    before = blobs(model)
    for index, name in enumerate([*ADAPTERS, "one layer"]):
        changes = {"layers_to_transform": [1]} if name == "one layer" else {}
        manager.load(name, an_adapter(tmp_path / name, index, name if name in ADAPTERS else "lora", **changes))
    names = [*ADAPTERS, "one layer"]
    ids, direct = prompts(1, 5), {}
    for name in names:
        manager.merge_adapter(name)
        direct[name] = logits_of(model, ids)
        manager.unmerge_adapter()
    for step in torch.randint(0, len(names) + 1, (20,), generator=torch.Generator().manual_seed(3)).tolist():
        if step == len(names):
            manager.unmerge_adapter()
        else:
            manager.merge_adapter(names[step])
            assert torch.equal(logits_of(model, ids), direct[names[step]])  # Whatever was folded before.
    manager.detach()
    assert_same_blobs(model, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_requantising_erases_a_small_delta_and_the_gate_says_so(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "small", lora_alpha=0.05)
    errors = {}
    for requantise in (False, True):
        model = quantised_qwen("nf4", tmp_path / "base", torch.bfloat16)
        before = blobs(model)
        manager = AdapterManager(model, max_delta_error=ANY_LOSS, quantised=FoldOptions(requantise=requantise))
        manager.load("it", folder)
        errors[requantise] = manager.fidelity("it").delta_error
        gated = AdapterManager(model, max_delta_error=0.9, quantised=FoldOptions(requantise=requantise))
        gated.load("it", folder)
        if requantise:
            with pytest.raises(DeltaLost, match=rf"{errors[True]:.3g} of its size.*requantised"):
                gated.merge_adapter("it")
            assert_same_blobs(model, before)
            assert gated.fold_state.folded is None
        else:
            gated.merge_adapter("it")
    assert errors[False] < 0.5 < 0.9 < errors[True]


def test_requantising_keeps_most_of_a_large_delta(tmp_path: Path) -> None:
    """What is measured is what is folded: the stand-in's own values give the same error."""
    model = quantised_qwen("int8", tmp_path / "base")
    manager = AdapterManager(model, quantised=FoldOptions(requantise=True))
    base = {name: dequantised(module) for name, module in quantised_modules(model).items()}
    bound = manager.load("it", an_adapter(tmp_path / "it", lora_alpha=32))
    manager.merge_adapter("it")
    error, size = 0.0, 0.0
    for name, module in quantised_modules(model).items():
        update = bound.updates[name.removesuffix(".weight")]
        assert isinstance(update, LowRank)
        delta = update.b_OR @ update.a_RI * update.scaling
        error += float((dequantised(module.__dict__["forward"]) - base[name] - delta).square().sum())
        size += float(delta.square().sum())
    assert manager.fidelity("it").delta_error == pytest.approx((error / size) ** 0.5, rel=1e-3)
    assert 0 < manager.fidelity("it").delta_error < 0.1


def test_a_fold_can_start_from_the_16_bit_checkpoint(tmp_path: Path) -> None:
    folder, ids = an_adapter(tmp_path / "it"), prompts(2, 9)
    model = quantised_qwen("nf4", tmp_path / "base")
    before, plain = blobs(model), logits_of(model, ids)
    options = FoldOptions(provenance="16-bit checkpoint")
    manager = AdapterManager(model, quantised=options)
    manager.load("it", folder)
    manager.merge_adapter("it")
    assert manager.fold_state.provenance == "16-bit checkpoint"
    sixteen = tiny_qwen()
    sixteen.load_state_dict(tiny_qwen(dtype=torch.bfloat16).state_dict())
    expected = logits_of(PeftModel.from_pretrained(sixteen, str(folder)).eval(), ids)
    assert apart(logits_of(model, ids), expected) < QUANTISED["dense"][torch.float32]
    manager.unmerge_adapter()
    assert torch.equal(logits_of(model, ids), plain)
    assert_same_blobs(model, before)
    with pytest.raises(BaseMismatch, match="name the folder of the 16-bit checkpoint"):
        AdapterManager(model, source=folder, quantised=options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_is_said_beforehand_and_taken_before_anything_changes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised_qwen(kind, tmp_path / "base", torch.bfloat16)
    manager = AdapterManager(model, max_delta_error=ANY_LOSS)
    manager.load("one", an_adapter(tmp_path / "one", layers_to_transform=[0]))
    bound = manager.load("all", an_adapter(tmp_path / "all"))
    manager.fidelity("all")
    manager.merge_adapter("one")
    folded = logits_of(model, prompts(1, 5))

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(StandIns, "_at", full)
        with pytest.raises(DeviceFull, match="serve it unmerged"):
            manager.merge_adapter("all")
    assert manager.fold_state.folded == "one"
    assert torch.equal(logits_of(model, prompts(1, 5)), folded)
    manager.merge_adapter("all")
    weights = sum(dequantised(module).numel() for module in quantised_modules(model).values())
    assert manager.extra_bytes(bound) == 2 * weights == manager.fold_state.undo_bytes


@pytest.mark.parametrize("requantise", [False, True])
def test_a_fold_that_fails_half_way_gives_the_blob_back(
    requantise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised_qwen("nf4", tmp_path / "base")
    before, plain = blobs(model), logits_of(model, prompts(1, 5))
    manager = AdapterManager(model, max_delta_error=ANY_LOSS, quantised=FoldOptions(requantise=requantise))
    manager.load("it", an_adapter(tmp_path / "it"))
    manager.fidelity("it")
    calls = [0]

    def failing(values: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise MemoryError("injected")
        return torch.stack(torch.aminmax(values))

    monkeypatch.setattr(stand_ins, "extent", failing)
    with pytest.raises(FoldFailed, match="injected"):
        manager.merge_adapter("it")
    assert torch.equal(logits_of(model, prompts(1, 5)), plain)
    assert_same_blobs(model, before)
    assert manager.fold_state.undo_bytes == 0


class Killed(BaseException):
    """What a thread that is killed from outside sees."""


@pytest.mark.parametrize("requantise", [False, True])
def test_wherever_a_thread_is_killed_the_blob_can_be_given_back(requantise: bool, tmp_path: Path) -> None:
    model = quantised_qwen("nf4", tmp_path / "base")
    before, ids = blobs(model), prompts(1, 3)
    manager = AdapterManager(model, max_delta_error=ANY_LOSS, quantised=FoldOptions(requantise=requantise))
    for index, name in enumerate("ab"):
        changes: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"][index:], "layers_to_transform": [0]}
        manager.load(name, an_adapter(tmp_path / name, index, **changes))
        manager.fidelity(name)
    base = logits_of(model, ids)
    manager.merge_adapter("a")
    folded = logits_of(model, ids)
    line, ended = 0, False
    while not ended:
        manager.merge_adapter("a")
        ended = not killed_at_line(line, lambda: manager.merge_adapter("b"))
        if not ended and not manager.fold_state.dirty:
            known = base if manager.fold_state.folded is None else folded
            assert torch.equal(logits_of(model, ids), known), line
        manager.unmerge_adapter()
        assert torch.equal(logits_of(model, ids), base)
        assert manager.fold_state.undo_bytes == 0
        line += 1
    assert_same_blobs(model, before)
    assert line > 40


def killed_at_line(number: int, work: Callable[[], object]) -> bool:
    """Runs `work` and raises Killed at the `number`th line of the stand-ins that it comes to; False if never."""
    left = [number]

    def trace(frame: Any, event: str, _: object) -> Any:
        here = frame.f_code.co_filename.endswith(("lorafold_adapters/stand_ins.py", "lorafold_adapters/quantised.py"))
        if here and event == "line":
            left[0] -= 1
            if left[0] == -1:
                raise Killed
        return trace if here or "lorafold_adapters" in frame.f_code.co_filename else None

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Killed:
        return True
    finally:
        sys.settrace(previous)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_blobs_and_scales_and_stable(kind: str, tmp_path: Path) -> None:
    first = quantised_qwen(kind, tmp_path / "base")
    manager = AdapterManager(first)
    logits_of(first, prompts(1, 5))  # bitsandbytes moves scales about in its first forward pass.
    assert manager.verify_base() == []
    assert AdapterManager(quantised_qwen(kind, tmp_path / "base")).base.digest == manager.base.digest
    other = "int8" if kind != "int8" else "nf4"
    assert AdapterManager(quantised_qwen(other, tmp_path / "base")).base.digest != manager.base.digest
    layer: Any = first.model.layers[1].mlp.up_proj
    scales = layer.state.SCB if kind == "int8" else layer.weight.quant_state.absmax
    scales.view(torch.uint8)[3] ^= 1
    assert any("up_proj" in name for name in manager.verify_base())


def test_reload_makes_scales_what_was_loaded(tmp_path: Path) -> None:
    model = quantised_qwen("nf4", tmp_path / "base")
    manager = AdapterManager(model)
    plain = logits_of(model, prompts(1, 5))
    model.model.layers[0].mlp.up_proj.weight.quant_state.absmax[0] += 1
    assert manager.verify_base() != []
    manager.reload(quantised_qwen("nf4", tmp_path / "base"))
    assert manager.verify_base() == []
    assert torch.equal(logits_of(model, prompts(1, 5)), plain)


def test_bitsandbytes_is_kept_from_changing_what_it_loaded(tmp_path: Path) -> None:
    """Negative control: without that, its forward pass casts biases to the dtype it computes in."""
    model = quantised_qwen("nf4", tmp_path / "base")
    torch.nn.Module.to(model, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    logits_of(model, prompts(1, 5))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} != dtypes
    kept = quantised_qwen("nf4", tmp_path / "base", repacks=True)
    torch.nn.Module.to(kept, torch.bfloat16)
    keep_as_loaded(kept)
    before = blobs(kept)
    logits_of(kept, prompts(1, 5))
    assert_same_blobs(kept, before)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in kept.modules())


class HQQLinear(nn.Module):
    """Stands for the class of that name: as much of it as the refusals look at."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.W_q = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)


class SecretLinear(HQQLinear):
    """A kind that PEFT has no layer for."""


def low_rank(**changes: Any) -> LowRank:
    return LowRank(a_RI=torch.zeros(2, 8), b_OR=torch.zeros(8, 2), scaling=1.0, **changes)


def test_other_kinds_are_refused_by_name_where_their_weight_is_needed() -> None:
    """Stand-ins by class name only: no other quantising library runs here."""
    assert (other_kind(HQQLinear()), other_kind(nn.Linear(8, 8))) == ("HQQ", None)
    refuse_unserved_module("it", low_rank(), HQQLinear())  # Unmerged, plain LoRA: nothing is needed of the weight.
    with pytest.raises(AdapterUnsupported, match=r"'it' with DoRA, which needs the weight.*HQQ"):
        refuse_unserved_module("it", low_rank(magnitude_O=torch.ones(8)), HQQLinear())
    with pytest.raises(AdapterUnsupported, match="SecretLinear: PEFT has no layer"):
        refuse_unserved_module("it", low_rank(), SecretLinear())


def test_another_kind_runs_unmerged_and_is_not_folded(tmp_path: Path) -> None:
    """A weight in a dtype that nothing here knows to fold into, in a subclass of nn.Linear, as FP8 bases have."""
    model: Any = tiny_qwen()
    manager_of_plain = AdapterManager(tiny_qwen())
    folder, ids = an_adapter(tmp_path / "it", target_modules=["up_proj"]), prompts(2, 9)
    manager_of_plain.load("it", folder)

    class FP8Linear(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)

    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = FP8Linear
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.to(torch.float8_e4m3fn)
    plain = logits_of(model, ids)
    manager = AdapterManager(model)
    assert "FP8Linear; only the NF4" in str(manager.load("it", folder).fold_refusal)
    with manager.routed(["it", "it"]):
        routed = logits_of(model, ids)
    assert apart(plain, routed) > EFFECT
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.float()
        layer.mlp.up_proj.__class__ = nn.Linear
    oracle = PeftModel.from_pretrained(model, str(folder)).eval()
    assert apart(routed, logits_of(oracle, ids)) < QUANTISED["dense"][torch.float32]
    with pytest.raises(AdapterUnsupported, match="FP8Linear"):
        manager.merge_adapter("it")
