"""Adapters of a form that was bound before: equal to what PEFT makes of them, tensor for tensor, without PEFT."""

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold_adapters import AdapterManager, Checkpoint, read_checkpoint, structures
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import content_digest
from lorafold_adapters.errors import AdapterCorrupt, BaseMismatch
from lorafold_adapters.skeleton import resolve
from lorafold_adapters.updates import LowRank, ThroughPeft, Update
from tests.kinds import WORKING
from tests.models import ALL_LINEAR, KINDS, tiny_llama, tiny_qwen

MakeAdapter = Callable[..., Path]
OWN = re.compile(r"(embed_tokens|lm_head)\.(base_layer\.)?weight$")
BY_PEFT = {"target_parameters (experts of a MoE)", "LoHa", "LoKr", "OFT", "IA3", "HRA", "MiSS", "FourierFT"}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the checkpoints that PEFT resolved, in order."""
    seen: list[str] = []

    def noting(checkpoint: Checkpoint, model: Any) -> Any:
        seen.append(checkpoint.digest)
        return resolve(checkpoint, model)

    monkeypatch.setattr(structures, "resolve", noting)
    return seen


def with_values(checkpoint: Checkpoint, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    """The same form with other values."""
    saved = bool(checkpoint.options.get("modules_to_save"))
    copies = {  # PEFT saves the base's own embeddings beside LoRA on them, which must stay what they are.
        name: tensor.clone() if not saved and OWN.search(name) else change(tensor)
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=copies, digest=content_digest(checkpoint.options, copies))


def with_options(checkpoint: Checkpoint, **options: Any) -> Checkpoint:
    changed = {**checkpoint.options, **options}
    return dataclasses.replace(checkpoint, options=changed, digest=content_digest(changed, checkpoint.tensors))


def plain(update: Update) -> dict[str, Any]:
    """An update's fields; of a layer of PEFT, its tensors."""
    if isinstance(update, ThroughPeft):
        return {"method": update.method, "names": update.names, "tensors": dict(enumerate(update.tensors()))}
    return {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}  # type: ignore[arg-type]


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.requires_grad is other.requires_grad is False
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            assert_equal(value, other[key])
    else:
        assert one == other


def assert_same_adapter(one: BoundAdapter, other: BoundAdapter) -> None:
    assert list(one.updates) == list(other.updates)
    for name, update in one.updates.items():
        assert type(update) is type(other.updates[name])
        assert_equal(plain(update), plain(other.updates[name]))
    for field in ("digest", "kind", "targeted", "bound", "fold_refusal", "route_refusal"):
        assert getattr(one, field) == getattr(other, field), field


@pytest.mark.parametrize("name", WORKING)
def test_bound_from_memory_equals_bound_by_peft(name: str, tmp_path: Path, resolved: list[str]) -> None:
    kind = WORKING[name]
    first = read_checkpoint(kind.save(tmp_path))
    second = with_values(first, lambda tensor: tensor * 1.5 + 0.01)
    assert second.digest != first.digest
    manager = AdapterManager(kind.base())
    before = manager.bind(first)
    warm = manager.bind(second)
    by_peft = resolved.count(second.digest)
    assert by_peft == (1 if name.replace("`", "") in BY_PEFT else 0)
    assert_same_adapter(warm, AdapterManager(kind.base()).bind(second))
    assert resolved.count(second.digest) == by_peft + 1  # Oracle: a manager that remembers nothing.
    placed = {tensor.data_ptr() for update in warm.updates.values() for tensor in update.tensors()}
    assert by_peft or placed.isdisjoint(t.data_ptr() for u in before.updates.values() for t in u.tensors())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alpha=st.integers(1, 64),
    rslora=st.booleans(),
    pattern=st.dictionaries(st.sampled_from(ALL_LINEAR), st.integers(1, 64), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_configuration_is_bound_as_by_peft(
    alpha: int, rslora: bool, pattern: dict[str, int], seed: int, adapter_on_llama: MakeAdapter
) -> None:
    warm = self_warmed(adapter_on_llama)
    torch.manual_seed(seed)
    changed = with_values(warm[1], torch.rand_like)
    changed = with_options(changed, lora_alpha=alpha, use_rslora=rslora, alpha_pattern=pattern)
    assert_same_adapter(warm[0].bind(changed), AdapterManager(tiny_llama()).bind(changed))
    assert_same_adapter(warm[0].bind(changed), AdapterManager(tiny_llama()).bind(changed))


WARMED: list[tuple[AdapterManager, Checkpoint]] = []


def self_warmed(make: MakeAdapter) -> tuple[AdapterManager, Checkpoint]:
    """One manager for all examples, so that each meets what others left behind."""
    if not WARMED:
        WARMED.append((AdapterManager(tiny_llama()), read_checkpoint(make(target_modules=ALL_LINEAR))))
    return WARMED[0]


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {".*_proj": 2, "q_proj": 4}}, 0.5),
        ({"alpha_pattern": {"q_proj": 4, ".*_proj": 2}}, 1.0),
        ({"target_modules": ["v_proj", "q_proj"]}, None),
        ({"target_modules": ["q_proj", "v_proj"]}, None),
        ({"base_model_name_or_path": "somewhere/else", "inference_mode": False}, None),
    ],
)
def test_what_decides_the_scale_is_part_of_the_form(
    options: dict[str, Any], scaling: float | None, adapter_on_llama: MakeAdapter, resolved: list[str]
) -> None:
    manager = AdapterManager(tiny_llama())
    first = read_checkpoint(adapter_on_llama(**KINDS["plain"]))
    name = "model.layers.0.self_attn.q_proj"
    known = manager.bind(first).updates[name]
    changed = with_options(first, **options)
    update = manager.bind(changed).updates[name]
    assert isinstance(update, LowRank)
    assert isinstance(known, LowRank)
    assert known.scaling == 2.0
    assert update.scaling == (2.0 if scaling is None else scaling)
    assert len(resolved) == (1 if scaling is None else 2)


def test_other_ranks_shapes_and_names_are_resolved_anew(adapter_on_llama: MakeAdapter, resolved: list[str]) -> None:
    manager = AdapterManager(tiny_llama())
    folders = [
        adapter_on_llama(**KINDS["plain"]),
        adapter_on_llama(r=8, **KINDS["plain"]),
        adapter_on_llama(rank_pattern={"q_proj": 3}, **KINDS["plain"]),
        adapter_on_llama(target_modules=["q_proj"]),
    ]
    for index, folder in enumerate(folders, start=1):
        manager.bind(folder)
        assert len(resolved) == index
    manager.bind(adapter_on_llama(seed=7, **KINDS["plain"]))
    assert len(resolved) == len(folders)  # Negative control: the first form again.


def test_a_folder_that_is_refused_is_refused_every_time(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    good = read_checkpoint(adapter_on_llama(**KINDS["plain"]))
    manager.bind(good)
    names = sorted(good.tensors)  # Of q_proj and v_proj, A before B.
    short = dataclasses.replace(good, tensors={name: good.tensors[name] for name in names[1:]})
    narrow = dataclasses.replace(good, tensors={**good.tensors, names[0]: good.tensors[names[0]][:, :-1].clone()})
    for _ in range(2):
        with pytest.raises(AdapterCorrupt, match="lack"):
            manager.bind(short)
        with pytest.raises(BaseMismatch, match="shape"):
            manager.bind(narrow)
        with pytest.raises(AdapterCorrupt, match="scales"):
            manager.bind(with_options(good, lora_alpha=1e30))


def test_copies_of_the_base_are_compared_for_every_adapter(tmp_path: Path, resolved: list[str]) -> None:
    kind = WORKING["LoRA on the head"]
    first = read_checkpoint(kind.save(tmp_path))
    manager = AdapterManager(kind.base())
    manager.bind(first)
    copied = next(name for name in first.tensors if name.endswith("lm_head.base_layer.weight"))
    other = dataclasses.replace(first, tensors={**first.tensors, copied: first.tensors[copied] + 1})
    with pytest.raises(BaseMismatch, match="copy of its base's"):
        manager.bind(other)
    assert len(resolved) == 1  # The form was known.


def test_trained_biases_are_checked_for_every_adapter(tmp_path: Path) -> None:
    kind = WORKING['`bias="all"`']
    first = read_checkpoint(kind.save(tmp_path))
    manager = AdapterManager(tiny_qwen())
    manager.bind(first)
    bias = next(name for name in first.tensors if name.endswith("v_proj.bias"))
    with pytest.raises(AdapterCorrupt, match="lack"):
        manager.bind(dataclasses.replace(first, tensors={n: t for n, t in first.tensors.items() if n != bias}))


def test_tensors_that_share_memory_are_never_mixed_up(adapter_on_llama: MakeAdapter, resolved: list[str]) -> None:
    """By its place alone such a tensor has two names."""
    first = read_checkpoint(adapter_on_llama(**KINDS["plain"]))
    one, other = [name for name in first.tensors if "q_proj.lora_A" in name]
    aliased = dataclasses.replace(first, tensors={**first.tensors, one: first.tensors[other]})
    manager = AdapterManager(tiny_llama())
    manager.bind(aliased)
    got = manager.bind(first)
    assert len(resolved) == 2
    assert_same_adapter(got, AdapterManager(tiny_llama()).bind(first))


def test_only_so_many_forms_are_remembered(
    adapter_on_llama: MakeAdapter, resolved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structures, "FORMS", 2)
    manager = AdapterManager(tiny_llama())
    first = read_checkpoint(adapter_on_llama(**KINDS["plain"]))
    for alpha, resolutions in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        manager.bind(with_options(first, lora_alpha=alpha))
        assert len(resolved) == resolutions, alpha


def test_threads_that_bind_at_once_get_their_own_values(adapter_on_llama: MakeAdapter, resolved: list[str]) -> None:
    manager = AdapterManager(tiny_llama())
    first = read_checkpoint(adapter_on_llama(**KINDS["patterns"]))
    different = [with_values(first, lambda tensor, n=n: tensor + n) for n in range(8)]  # type: ignore[misc]
    start = threading.Barrier(len(different))

    def bind(checkpoint: Checkpoint) -> BoundAdapter:
        start.wait()
        return manager.bind(checkpoint)

    with ThreadPoolExecutor(len(different)) as pool:
        bound = list(pool.map(bind, different))
    assert len(resolved) == 1
    for checkpoint, got in zip(different, bound, strict=True):
        assert_same_adapter(got, AdapterManager(tiny_llama()).bind(checkpoint))
    assert json.dumps([one.digest for one in bound]) == json.dumps([one.digest for one in different])
