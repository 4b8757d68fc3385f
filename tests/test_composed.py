"""Composed adapters on a model: folded they are the formula, beside the weights they are exact or say how far off.

Oracles: the formula on deltas taken out of the folded weights of each part; PEFT's `cat`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.compose import Composition, Piece, combine
from lorafold_adapters.composed import Composed
from lorafold_adapters.errors import AdapterUnsupported, CompositionInvalid
from lorafold_adapters.undo_kinds import UndoKind
from tests.kinds import WORKING
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
    tiny_qwen,
    weights_of,
)
from tests.tolerances import EFFECT, LOGITS

MakeAdapter = Callable[..., Path]
DTYPES = [torch.float32, torch.bfloat16]
UNDO_KINDS: list[UndoKind] = ["checkpoint", "host", "device", "sparse"]
SPECS = {
    "linear": Composition(method="linear"),
    "ties": Composition(method="ties", density=0.5),
    "dare_linear": Composition(method="dare_linear", density=0.7, seed=3),
    "dare_ties": Composition(method="dare_ties", density=0.7, seed=3),
    "magnitude_prune": Composition(method="magnitude_prune", density=0.5),
    "svd": Composition(method="svd", rank=3),
}
FULL = {name: spec if name == "linear" else replace(spec, rank=96) for name, spec in SPECS.items()}
"""The same, of full rank on every module of the tiny models: exact beside the weights."""
WEIGHTS = (1.0, -0.6)


def bound_parts(manager: AdapterManager, folders: Sequence[Path]) -> list[tuple[BoundAdapter, float]]:
    return [(manager.bind(folder), weight) for folder, weight in zip(folders, WEIGHTS, strict=True)]


def true_deltas(folder: Path) -> dict[str, Tensor]:
    """What one adapter adds to a fp32 tiny_llama, by folding it alone in fp64."""
    model = tiny_llama().double()
    before = weights_of(model)
    manager = AdapterManager(model)
    (bound,) = [manager.bind(folder)]
    result = {}
    for name, change, base, _ in manager._weights.planned(bound):
        folded = torch.empty_like(base)
        change.forward(base, slice(0, base.shape[0]), folded)
        result[name] = (folded - before[name]).float()
    return result


@pytest.mark.parametrize("kinds", [("plain", "all-linear"), ("dora", "saved-head"), ("saved-norm", "head")], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_folded_it_is_the_base_plus_the_formula(
    name: str, kinds: tuple[str, str], adapter_on_llama: MakeAdapter
) -> None:
    folders = [adapter_on_llama(seed=seed, **KINDS[kind]) for seed, kind in enumerate(kinds)]
    model = tiny_llama()
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("it", manager.compose(bound_parts(manager, folders), SPECS[name]))
    manager.merge_adapter("it")
    parts = [true_deltas(folder) for folder in folders]
    changed = parts[0].keys() | parts[1].keys()
    for parameter, value in model.state_dict().items():
        if parameter not in changed:
            assert torch.equal(value, before[parameter])
            continue
        delta = formula(SPECS[name], parts, parameter)
        assert apart(value - before[parameter], delta) < 1e-4, parameter
        assert apart(value, before[parameter]) > 1e-3 or not delta.any(), parameter  # Negative control.


def formula(spec: Composition, parts: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    pieces = [
        Piece(index=index, weight=weight, delta=part[name].clone)
        for index, (part, weight) in enumerate(zip(parts, WEIGHTS, strict=True))
        if name in part
    ]
    return combine(spec, pieces, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ties", "dare_linear", "magnitude_prune"])
def test_a_fold_rounds_once(name: str, dtype: torch.dtype, adapter_on_llama: MakeAdapter) -> None:
    """Bit for bit: base plus delta in fp32, rounded to the dtype."""
    folders = [adapter_on_llama(seed=seed, **KINDS["all-linear"]) for seed in (1, 2)]
    model = tiny_llama(dtype=dtype)
    before = weights_of(model)
    manager = AdapterManager(model)
    bound = manager.load("it", manager.compose(bound_parts(manager, folders), SPECS[name]))
    manager.merge_adapter("it")
    for module, update in bound.updates.items():
        assert isinstance(update, Composed)
        base = before[f"{module}.weight"]
        change = update.changes(lambda _, base=base: base)["weight"]  # type: ignore[misc]
        delta = change.delta(base)  # type: ignore[attr-defined]
        assert torch.equal(model.get_parameter(f"{module}.weight"), (base.float() + delta).to(dtype))
        assert delta.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("undo", UNDO_KINDS)
def test_every_undo_gives_the_base_back_bit_for_bit(
    undo: UndoKind, dtype: torch.dtype, device: str, adapter_on_llama: MakeAdapter, tmp_path: Path
) -> None:
    tiny_llama(dtype=dtype).save_pretrained(tmp_path)
    model = on(device, tiny_llama(dtype=dtype))
    before = weights_of(model)
    manager = AdapterManager(model, undo=undo, source=tmp_path)
    folders = [adapter_on_llama(seed=seed, **KINDS[kind]) for seed, kind in enumerate(["dora", "saved-head"])]
    for name in ("linear", "ties", "dare_linear"):
        manager.load(name, manager.compose(bound_parts(manager, folders), SPECS[name]))
    folded: dict[str, dict[str, Tensor]] = {}
    for name in ["linear", "ties", "dare_linear", "ties", "linear"]:
        manager.merge_adapter(name)
        found = weights_of(model)
        assert all(torch.equal(value, found[key]) for key, value in folded.setdefault(name, found).items())
    manager.unmerge_adapter()
    assert_same_weights(model, before)
    assert manager.verify_base() == []
    assert any(not torch.equal(value, before[key]) for key, value in folded["ties"].items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_equals_pefts_cat_in_both_modes(dtype: torch.dtype, adapter_on_llama: MakeAdapter) -> None:
    folders = [adapter_on_llama(seed=seed, **KINDS["all-linear"]) for seed in (1, 2)]
    ids = prompts(2, 9)
    oracle = PeftModel.from_pretrained(
        tiny_llama(dtype=dtype), str(folders[0]), "one", autocast_adapter_dtype=False
    ).eval()
    oracle.load_adapter(str(folders[1]), "two", autocast_adapter_dtype=False)
    alone = logits_of(oracle, ids)
    oracle.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type="cat")
    oracle.set_adapter("both")
    expected = logits_of(oracle, ids)
    assert apart(alone, expected) > EFFECT
    model = tiny_llama(dtype=dtype)
    manager = AdapterManager(model)
    bound = manager.load("it", manager.compose(bound_parts(manager, folders), SPECS["linear"]))
    assert not any(isinstance(update, Composed) for update in bound.updates.values())
    manager.merge_adapter("it")
    assert apart(logits_of(model, ids), expected) < LOGITS[dtype]
    manager.unmerge_adapter()
    with manager.routed(["it", "it"]):
        assert apart(logits_of(model, ids), expected) < LOGITS[dtype]


@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear", "svd"])
@pytest.mark.parametrize("kind", [name for name, kind in WORKING.items() if kind.folded])
def test_any_two_adapters_of_a_kind_are_the_same_folded_and_beside_the_weights(
    kind: str, name: str, tmp_path: Path
) -> None:
    """Oracle: the other mode; the folded one is compared with the formula above."""
    made = WORKING[kind]
    folders = [made.save(tmp_path / str(seed), seed) for seed in (1, 2)]
    model, ids = made.base(), prompts(2, 9)
    plain, before = logits_of(model, ids), weights_of(model)
    manager = AdapterManager(model)
    bound = manager.load("it", manager.compose(bound_parts(manager, folders), FULL[name]))
    manager.merge_adapter("it")
    folded = logits_of(model, ids)
    assert apart(folded, plain) > EFFECT
    manager.unmerge_adapter()
    assert_same_weights(model, before)
    if bound.route_refusal is not None:
        assert "target_parameters" in bound.route_refusal
        assert "target_parameters" in kind
        return
    with manager.routed(["it", None]):
        mixed = logits_of(model, ids)
    assert apart(mixed[:1], folded[:1]) < 10 * LOGITS[torch.float32]  # One more decomposition, and its product.
    assert apart(mixed[1:], plain[1:]) < LOGITS[torch.float32]
    manager.detach()
    assert torch.equal(logits_of(model, ids), plain)


@pytest.mark.parametrize("kind", ["lora-bias", "dora-on-biases"])
@pytest.mark.parametrize("name", ["linear", "ties"])
def test_biases_are_composed_too(name: str, kind: str, adapter_on_qwen: MakeAdapter) -> None:
    folders = [adapter_on_qwen(seed=seed, **BIASED_KINDS[kind]) for seed in (1, 2)]
    model, ids = tiny_qwen(), prompts(1, 9)
    manager = AdapterManager(model)
    bound = manager.load("it", manager.compose(bound_parts(manager, folders), FULL[name]))
    assert bound.fold_refusal is None
    with manager.routed(["it"]):
        routed = logits_of(model, ids)
    manager.merge_adapter("it")
    assert apart(routed, logits_of(model, ids)) < 10 * LOGITS[torch.float32]
    biases = [module for module in bound.updates if "q_proj" in module]
    plain = tiny_qwen().state_dict()
    changed = [not torch.equal(model.state_dict()[f"{name}.bias"], plain[f"{name}.bias"]) for name in biases]
    assert all(changed) == (kind == "lora-bias")


def test_a_bias_where_the_base_has_none_runs_beside_the_weights_only(tmp_path: Path) -> None:
    folders = [
        save_adapter(tiny_llama(), tmp_path / str(seed), seed, target_modules=["q_proj"], lora_bias=True)
        for seed in (1, 2)
    ]
    model, ids = tiny_llama(), prompts(1, 9)
    manager = AdapterManager(model)
    found = []
    for name in ("linear", "ties"):
        bound = manager.load(name, manager.compose(bound_parts(manager, folders), FULL[name]))
        assert "adds a bias" in str(bound.fold_refusal)
        with manager.routed([name]):
            found.append(logits_of(model, ids))
    assert apart(found[0], found[1]) > EFFECT


def test_negating_an_adapter_takes_away_what_it_adds(adapter_on_llama: MakeAdapter) -> None:
    """Ilharco et al.: -tau of a fine-tuned model leads back to the base."""
    folder = adapter_on_llama(**KINDS["all-linear"])
    model = tiny_llama()
    plain = logits_of(model, prompts(1, 9))
    manager = AdapterManager(model)
    manager.load("it", folder)
    manager.merge_adapter("it")
    with_it = logits_of(model, prompts(1, 9))
    assert apart(with_it, plain) > EFFECT
    tuned = tiny_llama()
    tuned.load_state_dict(weights_of(model))
    again = AdapterManager(tuned)
    part = again.bind(folder)
    again.load("back", again.compose([(part, -1.0)], Composition(method="linear")))
    again.merge_adapter("back")
    assert apart(logits_of(tuned, prompts(1, 9)), plain) < LOGITS[torch.float32]
    again.load("further", again.compose([(part, 1.0)], Composition(method="linear")))
    again.merge_adapter("further")
    assert apart(logits_of(tuned, prompts(1, 9)), plain) > EFFECT


def test_a_form_that_loses_too_much_is_refused_with_its_number(adapter_on_llama: MakeAdapter) -> None:
    folders = [adapter_on_llama(seed=seed, **KINDS["all-linear"]) for seed in (1, 2)]
    model = tiny_llama()
    manager = AdapterManager(model, max_delta_error=0.3)
    parts = bound_parts(manager, folders)
    errors = []
    for rank in (2, 20, 40, 64):
        bound = manager.load("it", manager.compose(parts, Composition(method="ties", density=0.2, rank=rank)))
        error = manager.route_error("it")
        assert error is not None
        errors.append(error)
        assert (bound.route_refusal is None) == (error <= 0.3)
        lost = sum(route.error**2 * route.squares for route in bound.routes.values())
        assert error == pytest.approx((lost / sum(route.squares for route in bound.routes.values())) ** 0.5)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3 > errors[-1]
    assert errors[-1] < 1e-5
    manager.load("it", manager.compose(parts, Composition(method="ties", density=0.2, rank=2)))
    with pytest.raises(AdapterUnsupported, match=f"by {errors[0]:.3g} of its size"):
        manager.routed(["it"]).__enter__()
    manager.merge_adapter("it")  # Folded it is exact.
    manager.unmerge_adapter()
    manager.load("exact", manager.compose(parts, Composition(method="linear")))
    assert manager.route_error("exact") is None


def test_the_error_is_that_of_the_outputs(adapter_on_llama: MakeAdapter) -> None:
    """A form that is off by much differs from the folded one, a form that is off by little does not."""
    folders = [adapter_on_llama(seed=seed, **KINDS["all-linear"]) for seed in (1, 2)]
    model, ids = tiny_llama(), prompts(1, 9)
    manager = AdapterManager(model)
    distances = []
    for rank in (30, 64):
        spec = Composition(method="ties", density=0.5, rank=rank)
        manager.load("it", manager.compose(bound_parts(manager, folders), spec))
        with manager.routed(["it"]):
            routed = logits_of(model, ids)
        manager.merge_adapter("it")
        distances.append(apart(routed, logits_of(model, ids)))
        manager.unmerge_adapter()
    assert distances[1] < 10 * LOGITS[torch.float32] < 1e-3 < distances[0]


def test_a_digest_names_everything_that_decides(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    one, two = (manager.bind(adapter_on_llama(seed=seed, **KINDS["plain"])) for seed in (1, 2))
    dare = Composition(method="dare_ties", density=0.5, seed=1)
    made = [
        manager.compose(parts, spec)
        for parts, spec in [
            ([(one, 1.0), (two, 1.0)], dare),
            ([(two, 1.0), (one, 1.0)], dare),
            ([(one, 1.0), (two, 0.5)], dare),
            ([(one, 1.0), (two, 1.0)], Composition(method="dare_ties", density=0.5, seed=2)),
            ([(one, 1.0), (two, 1.0)], Composition(method="dare_ties", density=0.4, seed=1)),
            ([(one, 1.0), (two, 1.0)], Composition(method="dare_linear", density=0.5, seed=1)),
            ([(one, 1.0), (two, 1.0)], Composition(method="dare_ties", density=0.5, seed=1, rank=9)),
        ]
    ]
    assert len({bound.digest for bound in made}) == len(made)
    assert made[0].digest == manager.compose([(one, 1.0), (two, 1.0)], dare).digest
    assert made[0].kind == "DARE_TIES(LORA, LORA)"
    with pytest.raises(CompositionInvalid, match="is a composition"):
        manager.compose([(made[0], 1.0)], dare)
    with pytest.raises(CompositionInvalid, match="at least one"):
        manager.compose([], dare)


def test_loading_a_composition_reads_the_base_and_not_what_is_folded(adapter_on_llama: MakeAdapter) -> None:
    folders = [adapter_on_llama(seed=seed, **KINDS["dora"]) for seed in (1, 2)]
    found = []
    for fold_first in (False, True):
        model = tiny_llama(dtype=torch.bfloat16)
        manager = AdapterManager(model)
        if fold_first:
            manager.load("other", adapter_on_llama(seed=3, **KINDS["all-linear"]))
            manager.merge_adapter("other")
        manager.load("it", manager.compose(bound_parts(manager, folders), FULL["ties"]))
        manager.unmerge_adapter()
        with manager.routed(["it"]):
            found.append(logits_of(model, prompts(1, 9)))
    assert torch.equal(found[0], found[1])
