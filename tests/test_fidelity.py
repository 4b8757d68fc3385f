"""What a fold keeps of a delta, against arithmetic in fp64; and the gate that refuses what would arrive broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafold.client import ServerError, translated
from lorafold.v1 import weights_pb2
from lorafold_adapters import AdapterManager, gate
from lorafold_adapters.delta import AddProduct
from lorafold_adapters.errors import DeltaLost
from lorafold_adapters.fidelity import Fidelity, ParameterFidelity, measure
from lorafold_adapters.stamp import STAMP_FILE
from lorafold_adapters.undo import Rounding
from tests.conftest import DEMO, demo_config, serving
from tests.deployments import create
from tests.models import KINDS, assert_same_weights, save_adapter, tiny_llama, weights_of

MakeAdapter = Callable[..., Path]


def spread(rms: float, dtype: torch.dtype) -> tuple[Tensor, AddProduct]:
    """A weight of rms 0.02 and an update of `rms` times that."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(512, 256, generator=generator)).to(dtype)
    left, right = torch.randn(512, 16, generator=generator), torch.randn(16, 256, generator=generator)
    return weight, AddProduct(left_NR=left, right_RM=right, scaling=0.02 * rms / 4)


def measured(rms: float, dtype: torch.dtype) -> ParameterFidelity:
    weight, change = spread(rms, dtype)
    return measure("w", change, weight, Rounding(function=lambda exact: exact.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rms", [0.003, 0.03, 0.3])
def test_every_number_equals_its_definition(rms: float, dtype: torch.dtype) -> None:
    weight, change = spread(rms, dtype)
    found = Fidelity(parameters=(measured(rms, dtype),))
    delta = change.scaling * change.left_NR.double() @ change.right_RM.double()
    folded = (weight.double() + delta).to(dtype)
    lost = folded.double() - weight.double() - delta
    assert found.delta_over_weight == pytest.approx(float(delta.norm() / weight.double().norm()), rel=1e-4)
    assert found.delta_error == pytest.approx(float(lost.norm() / delta.norm()), rel=2e-2, abs=1e-6)
    assert found.unchanged_share == pytest.approx(float((folded == weight).double().mean()), abs=1e-3)


def test_a_coarser_dtype_loses_more_of_a_smaller_delta() -> None:
    """The known figures for bf16 (about 48 % lost at a ratio of 0.003, 17 % at 0.01, 1.7 % at 0.1)."""
    errors = {
        (dtype, rms): Fidelity(parameters=(measured(rms, dtype),)).delta_error
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for rms in (0.003, 0.01, 0.1)
    }
    assert errors[torch.bfloat16, 0.003] == pytest.approx(0.48, abs=0.05)
    assert errors[torch.bfloat16, 0.01] == pytest.approx(0.17, abs=0.03)
    assert errors[torch.bfloat16, 0.1] == pytest.approx(0.017, abs=0.005)
    assert errors[torch.float16, 0.01] < errors[torch.bfloat16, 0.01] / 4
    assert errors[torch.float32, 0.003] < 1e-4


def test_measuring_changes_nothing_and_is_the_same_while_another_adapter_is_folded(
    adapter_on_llama: MakeAdapter,
) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    reports = []
    for folded in (False, True):
        manager = AdapterManager(model)
        manager.load("it", adapter_on_llama(**KINDS["dora"]))
        manager.load("other", adapter_on_llama(seed=2, **KINDS["all-linear"]))
        if folded:
            manager.merge_adapter("other")
        reports.append(manager.fidelity("it"))
        manager.detach()
        assert_same_weights(model, before)
    assert reports[0] == reports[1]
    assert len(reports[0].by_parameter()) == 14
    worst = max(report.delta_error for report in reports[0].by_parameter().values())
    assert worst >= reports[0].delta_error > 0


def test_what_is_folded_often_is_not_measured_again(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two reports; many adapters are measured once, and one is folded between them."""
    monkeypatch.setattr(gate, "REMEMBERED", 2)
    manager = AdapterManager(tiny_llama())
    bound = [manager.load(f"{seed}", adapter_on_llama(seed=seed, **KINDS["plain"])) for seed in range(5)]
    manager.fidelity("0")
    for seed in range(1, 5):
        manager.merge_adapter("0")
        manager.unmerge_adapter()
        manager.fidelity(f"{seed}")
    assert manager.gate.parameters(bound[0]) == 0
    assert manager.gate.parameters(bound[1]) > 0  # Negative control.


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that bf16 weights lose nearly all of."""
    return save_adapter(tiny_llama(), tmp_path_factory.mktemp("faint"), lora_alpha=1e-3, **KINDS["all-linear"])


def test_an_adapter_that_would_arrive_broken_is_not_folded(faint: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("faint", faint)
    with pytest.raises(DeltaLost, match=r"by 0\.\d+ of its size.*max_delta_error \(0\.25\)"):
        manager.merge_adapter("faint")
    assert_same_weights(model, before)
    assert manager.fold_state.generation == 0
    fine = AdapterManager(tiny_llama())
    fine.load("faint", faint)
    assert fine.merge_adapter("faint") > 0  # Negative control: fp32 weights keep it.


def faint_copy(folder: Path) -> Path:
    """A demo adapter at a ten-thousandth of its strength."""
    shutil.copytree(DEMO / "upper", folder)
    (folder / STAMP_FILE).unlink()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 16e-4}))
    return folder


def test_merged_is_refused_with_the_number_and_auto_stays_unmerged_with_the_reason(tmp_path: Path) -> None:
    faint = faint_copy(tmp_path / "faint")
    base = {"model": str(DEMO / "base"), "device": "cpu", "dtype": "bfloat16"}
    with serving(demo_config(base=base, deployments=[])) as server:
        with pytest.raises(ServerError, match=r"by 0\.986 of its size") as caught:
            create(server.client, "faint", faint, "merged")
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "DELTA_LOST")
        made = create(server.client, "faint", faint, "auto")
        assert made.fidelity.delta_error == pytest.approx(1, abs=0.02)
        assert made.fidelity.unchanged_share > 0.98
        assert "by 0.986 of its size" in made.fold_refusal
        assert server.client.generate("hello", deployment="faint", max_tokens=4).mode == "unmerged"
        with pytest.raises(ServerError, match=r"by 0\.986 of its size"), translated():
            server.client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="faint"))
        strong = create(server.client, "upper", DEMO / "upper", "merged")  # Negative control.
        assert strong.fidelity.delta_error < 0.02
        assert not strong.fold_refusal
        assert server.client.generate("hello", deployment="upper", max_tokens=4).mode == "merged"


def test_an_operator_sets_the_limit(tmp_path: Path) -> None:
    base = {"model": str(DEMO / "base"), "device": "cpu", "dtype": "bfloat16"}
    with (
        serving(demo_config(base=base, deployments=[], fold={"max_delta_error": 0.001})) as server,
        pytest.raises(ServerError, match=r"max_delta_error \(0\.001\)"),
    ):
        create(server.client, "upper", DEMO / "upper", "merged")
