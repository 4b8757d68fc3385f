"""`bench.fidelity`: altered checkpoints are what they say, by PEFT; and what arrives is measured right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.altered import of_rank, weaker, wrongly_scaled
from bench.demo_subjects import Arrivals, Judge, error, nf4, requantised, times
from bench.fidelity import PLAIN, coarse, headline, rounding
from lorafold.cli.demo import shipped_set
from lorafold.demo.tasks import TASKS, held_out


def deltas_by_peft(adapter: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    model = AutoModelForCausalLM.from_pretrained(shipped_set() / "base")
    adapted: Any = PeftModel.from_pretrained(model, str(adapter))
    layers = {name: module for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return {f"{name}.weight": layer.get_delta_weight("default").detach() for name, layer in layers.items()}


@pytest.fixture(scope="module")
def exact() -> Arrivals:
    return Arrivals(torch.float32)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(held_out(6))


@pytest.mark.parametrize("task", PLAIN)
def test_what_is_meant_is_what_peft_adds(exact: Arrivals, task: str) -> None:
    assert error(exact.meant(shipped_set() / task), deltas_by_peft(shipped_set() / task)) < 1e-6


@pytest.mark.parametrize("task", PLAIN)
def test_a_weaker_adapter_adds_exactly_so_much_less(exact: Arrivals, tmp_path: Path, task: str) -> None:
    altered = deltas_by_peft(weaker(shipped_set() / task, tmp_path / "weaker", 0.25))
    assert error(times(altered, 4), deltas_by_peft(shipped_set() / task)) < 1e-6


@pytest.mark.parametrize("task", PLAIN)
def test_a_cut_adapter_has_the_best_approximation(tmp_path: Path, task: str) -> None:
    whole = deltas_by_peft(shipped_set() / task)
    cut = deltas_by_peft(of_rank(shipped_set() / task, tmp_path / "cut", 2))
    for name, delta in whole.items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(cut[name], best, rtol=0, atol=1e-4 * float(delta.abs().max()))
    assert error(cut, whole) > 0.3
    same = deltas_by_peft(of_rank(shipped_set() / task, tmp_path / "same", 8))
    assert error(same, whole) < 1e-5


def test_a_wrong_scale_is_off_by_the_root_of_the_rank(tmp_path: Path) -> None:
    right, wrong = (
        deltas_by_peft(each)
        for each in (shipped_set() / "rot13", wrongly_scaled(shipped_set() / "rot13", tmp_path / "wrong"))
    )
    assert error(times(wrong, 8**0.5), right) < 1e-6
    assert error(wrong, right) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_loses_what_its_limit_says(tmp_path: Path, dtype: torch.dtype) -> None:
    arrivals = Arrivals(dtype)
    adapter = weaker(shipped_set() / "upper", tmp_path / "weaker", 2.0**-4)
    meant = arrivals.meant(adapter)
    lost = error(arrivals.merged(adapter), meant)
    assert lost == pytest.approx(rounding(arrivals.base, meant, dtype), rel=0.05)
    assert error(arrivals.unmerged(adapter), meant) < lost / 5


def test_a_fold_in_fp32_loses_nothing_that_could_be_seen(exact: Arrivals) -> None:
    for task in TASKS:
        assert exact.merged(shipped_set() / task)
    assert error(exact.merged(shipped_set() / "upper"), exact.meant(shipped_set() / "upper")) < 1e-5


def test_an_adapter_does_its_task_and_the_base_does_not(exact: Arrivals, judge: Judge) -> None:
    assert judge.accuracy("upper", exact.merged(shipped_set() / "upper")) == 1.0
    assert judge.accuracy("upper", {}) == 0.0
    assert judge.accuracy("rot13", exact.merged(shipped_set() / "upper")) == 0.0


def test_coarse_deltas_are_off_and_exact_ones_are_not(exact: Arrivals, judge: Judge) -> None:
    meant = exact.meant(shipped_set() / "upper")
    assert error({name: coarse(judge.base[name], delta, 0) for name, delta in meant.items()}, meant) == 0
    assert 0.2 < error({name: coarse(judge.base[name], delta, 1) for name, delta in meant.items()}, meant) < 0.4


def test_quantising_again_loses_what_serving_beside_keeps(exact: Arrivals, judge: Judge) -> None:
    meant = exact.meant(shipped_set() / "upper")
    beside, again = requantised(judge.base, meant)
    for name, delta in meant.items():
        dense = nf4(judge.base[name])
        torch.testing.assert_close(beside[name] + judge.base[name], dense + delta)
        assert not torch.allclose(again[name] + judge.base[name], dense + delta, atol=1e-3)


def test_the_headline_has_error_and_accuracy_by_what_was_done() -> None:
    about = {"task": "upper", "dtype": "bfloat16", "mode": "merged"}
    points = [
        {"part": "sizes", **about, "halvings": 0, "delta_error": 0.1, "accuracy": 1.0},
        {"part": "sizes", **about, "halvings": 2, "delta_error": 0.4, "accuracy": 0.5},
        {"part": "mistakes", "task": "upper", "kind": "nf4_requantised", "accuracy": 0.9},
    ]
    said = headline(points)
    assert said["sizes"] == {"bfloat16_merged": {"upper": [[0.1, 1.0], [0.4, 0.5]]}}
    assert said["mistakes"] == {"nf4_requantised": {"upper": 0.9}}
