"""Exports against folds: the checkpoint that was written, loaded by transformers, is the folded base bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafold_adapters import AdapterManager, export
from lorafold_adapters.checkpoint_names import plan_names
from lorafold_adapters.compose import Composition
from lorafold_adapters.errors import (
    AdapterUnsupported,
    BaseCorrupt,
    DeltaLost,
    ExportExists,
    ExportFailed,
    ExportUnsupported,
)
from lorafold_adapters.export import Exported, Order, Progress, export_merged
from lorafold_adapters.provenance import Origin, Source
from lorafold_adapters.undo_kinds import UndoKind
from tests.kinds import WORKING, Kind
from tests.models import DEVICES, assert_same_weights, logits_of, on, prompts, tiny_llama, weights_of

FOLDED = {name: kind for name, kind in WORKING.items() if kind.folded}
ROUNDED = ["LoRA on any subset of the linear layers", "DoRA", "`modules_to_save`: head"]
CASES = [(name, torch.float32) for name in FOLDED] + [(name, torch.bfloat16) for name in ROUNDED]
PLAIN = Kind(options={"target_modules": ["q_proj", "v_proj"]})


class Case:
    """A base that was loaded from its files, and an adapter on it."""

    def __init__(self, folder: Path, kind: Kind = PLAIN, dtype: torch.dtype = torch.float32) -> None:
        kind.base(dtype=dtype).save_pretrained(folder / "base")
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "base")
        self.manager = AdapterManager(self.model, max_delta_error=1)
        self.bound = self.manager.load("it", kind.save(folder / "adapter"))
        self.out = folder / "out"

    def export(self, **options: Any) -> Exported:
        *_, last = export_merged(self.manager, Order(bound=self.bound, out=self.out, **options))
        assert isinstance(last, Exported)
        return last


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("base", "adapter"))


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_what_was_exported_is_what_is_folded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = Case(tmp_path, FOLDED[name], dtype)
    base = weights_of(case.model)
    case.export(shard_size=30_000)
    assert_same_weights(case.model, base)
    written = loaded(case.out)
    case.manager.merge_adapter("it")
    assert_same_weights(written, weights_of(case.model))
    assert any(not torch.equal(tensor, base[key]) for key, tensor in written.state_dict().items())
    assert written.dtype == dtype


def test_the_exported_checkpoint_has_the_names_that_transformers_saves(tmp_path: Path) -> None:
    """Experts are stacked in the model and single in the files."""
    case = Case(tmp_path, WORKING["`target_parameters` (experts of a MoE)"])
    case.export(shard_size=20_000)
    names = set(json.loads((case.out / "model.safetensors.index.json").read_text())["weight_map"])
    case.model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert names == set(json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["weight_map"])
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names


def test_it_is_exported_from_the_base_while_another_adapter_is_folded(case: Case, tmp_path: Path) -> None:
    case.manager.load("other", PLAIN.save(tmp_path / "other", seed=9))
    case.manager.merge_adapter("other")
    folded = weights_of(case.model)
    case.export()
    assert_same_weights(case.model, folded)
    case.manager.merge_adapter("it")
    assert_same_weights(loaded(case.out), weights_of(case.model))


def test_shards_hold_no_more_than_they_may_and_one_file_has_no_index(case: Case) -> None:
    done = case.export(shard_size=40_000)
    assert len(done.files) > 3
    sizes = [(case.out / file).stat().st_size for file in done.files]
    assert max(sizes) < 40_000 + 4_000
    index = json.loads((case.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    assert set(index["weight_map"].values()) == set(done.files)
    case.out = case.out.with_name("whole")
    assert case.export().files == ("model.safetensors",)
    assert not (case.out / "model.safetensors.index.json").exists()
    assert_same_weights(loaded(case.out), weights_of(loaded(case.out.with_name("out"))))


def test_elements_of_several_sizes_in_one_file_are_read_back(tmp_path: Path) -> None:
    case = Case(tmp_path, dtype=torch.bfloat16)
    case.model.register_buffer("odd", torch.arange(3, dtype=torch.uint8))
    case.model.register_buffer("wide", torch.arange(5, dtype=torch.float64))
    case.export()
    from safetensors.torch import load_file

    written = load_file(case.out / "model.safetensors")
    assert torch.equal(written["odd"], torch.arange(3, dtype=torch.uint8))
    assert torch.equal(written["wide"], torch.arange(5, dtype=torch.float64))


def test_progress_grows_to_the_end(case: Case) -> None:
    *steps, last = export_merged(case.manager, Order(bound=case.bound, out=case.out))
    assert all(isinstance(step, Progress) for step in steps)
    bytes_done = [step.bytes_done for step in steps if isinstance(step, Progress)]
    assert bytes_done == sorted(set(bytes_done))
    end = steps[-1]
    assert isinstance(end, Progress)
    assert isinstance(last, Exported)
    assert (end.tensors_done, end.bytes_done) == (end.tensors_total, end.bytes_total) == (last.tensors, last.nbytes)


def test_the_provenance_says_what_it_was_made_from(case: Case) -> None:
    source = Source(name="sql", digest=case.bound.digest, kind="LORA")
    done = case.export(origin=Origin(base_name="tiny", sources=(source,)))
    facts = json.loads((case.out / "lorafold.json").read_text())
    assert facts == done.provenance
    assert facts["base"] == {"name": "tiny", "fingerprint": case.manager.base.digest, "dtype": "float32"}
    assert facts["adapters"] == [{"name": "sql", "digest": case.bound.digest, "kind": "LORA", "weight": 1.0}]
    assert facts["fidelity"]["delta_error"] == done.fidelity.delta_error < 1e-5
    assert facts["versions"]["torch"] == version("torch")


@pytest.mark.parametrize("step", ["write_tensors", "write_configs", "sync_folder"])
def test_a_failure_leaves_nothing(step: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(case.out.parent.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, step, fail)
    with pytest.raises(ExportFailed, match="No space left on device"):
        case.export()
    assert set(case.out.parent.iterdir()) == before


def test_a_damaged_base_is_not_exported(case: Case) -> None:
    case.model.get_parameter("model.layers.1.mlp.up_proj.weight").data.view(-1)[7] += 0.5
    with pytest.raises(BaseCorrupt, match="up_proj"):
        case.export()
    assert left_behind(case.out.parent) == []


def test_leaving_early_leaves_nothing(case: Case) -> None:
    steps = export_merged(case.manager, Order(bound=case.bound, out=case.out))
    next(steps)
    assert len(left_behind(case.out.parent)) == 1
    assert not case.out.exists()
    steps.close()
    assert left_behind(case.out.parent) == []


def test_a_full_disk_is_found_before_anything_is_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ExportFailed, match="make room"):
        case.export()
    assert left_behind(case.out.parent) == []


def test_a_folder_that_is_taken_is_refused_before_anything_is_read(case: Case) -> None:
    case.out.mkdir()
    case.export()  # An empty one is no loss.
    before = {path: path.read_bytes() for path in case.out.iterdir()}
    case.bound = replace(case.bound, updates={})  # Reading it would fail.
    with pytest.raises(ExportExists, match="choose another folder"):
        case.export()
    assert {path: path.read_bytes() for path in case.out.iterdir()} == before


def test_what_cannot_be_folded_is_not_exported(tmp_path: Path, adapter_on_llama: Callable[..., Path]) -> None:
    case = Case(tmp_path)
    case.bound = case.manager.bind(adapter_on_llama(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(AdapterUnsupported, match="adds a bias"):
        case.export()
    strict = AdapterManager(case.model, max_delta_error=0)
    case.bound = strict.bind(tmp_path / "adapter")
    with pytest.raises(DeltaLost):
        list(export_merged(strict, Order(bound=case.bound, out=case.out)))
    assert left_behind(tmp_path) == []


def test_a_model_that_is_saved_only_as_a_whole_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorafold_adapters.checkpoint_names as names

    def mixing(_: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{name}.{len(tensors)}": tensor for name, tensor in tensors.items()}

    monkeypatch.setattr(names, "saved_as", mixing)
    with pytest.raises(ExportUnsupported, match="only as a whole"):
        plan_names(case.model, case.model.state_dict())


def test_tensors_that_are_saved_together_are_planned_layer_by_layer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorafold_adapters.checkpoint_names as names

    def fused(_: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rest = dict(tensors)
        for name in [name for name in tensors if name.endswith("k_proj.weight")]:
            rest[name.replace("k_proj", "kv_proj")] = torch.cat(
                [rest.pop(name), rest.pop(name.replace("k_proj", "v_proj"))]
            )
        return rest

    monkeypatch.setattr(names, "saved_as", fused)
    groups = plan_names(case.model, case.model.state_dict())
    assert sorted(len(group.names) for group in groups) == [1, 1, 1, 9, 9]


def test_a_composition_is_exported_as_it_is_folded(tmp_path: Path) -> None:
    case = Case(tmp_path, dtype=torch.bfloat16)
    other = case.manager.bind(PLAIN.save(tmp_path / "other", seed=9))
    spec = Composition(method="ties", density=0.5)
    case.bound = case.manager.load("it", case.manager.compose([(case.bound, 1.0), (other, -0.5)], spec))
    case.export()
    case.manager.merge_adapter("it")
    assert_same_weights(loaded(case.out), weights_of(case.model))


def test_greedy_text_of_the_export_is_the_folded_models(case: Case) -> None:
    ids = prompts(2, 6)
    base = logits_of(case.model, ids)
    case.export()
    written = loaded(case.out)
    case.manager.merge_adapter("it")
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    ours: Any = case.model
    theirs: Any = written
    assert torch.equal(theirs.generate(ids, **options), ours.generate(ids, **options))
    assert not torch.equal(logits_of(written, ids), base)


@pytest.mark.parametrize("undo", ["sparse", "device", "host"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_base_on_any_device_with_any_undo_is_exported(device: str, undo: UndoKind, tmp_path: Path) -> None:
    model = on(device, tiny_llama(dtype=torch.bfloat16))
    manager = AdapterManager(model, undo=undo)
    bound = manager.load("it", PLAIN.save(tmp_path / "adapter"))
    manager.merge_adapter("it")
    list(export_merged(manager, Order(bound=bound, out=tmp_path / "deep" / "out")))
    assert_same_weights(on(device, loaded(tmp_path / "deep" / "out")), weights_of(model))
