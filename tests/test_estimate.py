"""Estimates against counting: PyTorch's own counter of operations on a forward pass, and the sizes of tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorafold_adapters import AdapterManager, read_checkpoint
from lorafold_adapters.compose import Composition
from lorafold_adapters.estimate import base_cost, low_rank_cost, two_path_cost
from tests.kinds import WORKING
from tests.models import ALL_LINEAR, prompts, save_adapter, tiny_llama

TOKENS = 3
COUNTED = [
    "LoRA on any subset of the linear layers",
    "`rank_pattern`, `alpha_pattern`",
    "DoRA",
    "`modules_to_save`: head",
    "LoRA on the embedding",
    "LoRA on Conv1D (GPT-2)",
    "`trainable_token_indices`, embedding tied to the head",
]


def added_in_place(_: Any, left_TR: Any, right_RO: Any, **__: Any) -> int:
    """Operations of `addmm_`, by shapes, which the counter does not know."""
    return int(2 * left_TR[0] * left_TR[1] * right_RO[1])


def counted(model: Any, *, routed: AdapterManager | None = None) -> int:
    """Operations of one forward pass that are products with weights: eager attention's own are left out."""
    ids = prompts(1, TOKENS)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place})
    with torch.no_grad(), counter:
        if routed is None:
            model(input_ids=ids, use_cache=False)
        else:
            with routed.routed(["it"]):
                model(input_ids=ids, use_cache=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", COUNTED)
def test_the_two_path_operations_are_those_that_are_counted(name: str, tmp_path: Path) -> None:
    kind = WORKING[name]
    model = kind.base()
    manager = AdapterManager(model)
    bound = manager.load("it", kind.save(tmp_path))
    extra = counted(model, routed=manager) - counted(model)
    assert extra == TOKENS * two_path_cost(bound, model, 4).flops > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bases_operations_are_those_that_are_counted(name: str) -> None:
    kind = WORKING["LoRA on Conv1D (GPT-2)" if name == "gpt2" else "rsLoRA"]
    model = kind.base()
    model.set_attn_implementation("eager")
    attention = 2 * 2 * TOKENS * TOKENS * 64 * 2  # Two products, [T, T] by width, in each of two layers.
    assert counted(model) == TOKENS * base_cost(model).flops + attention


def test_only_the_experts_that_a_token_uses_count() -> None:
    model = WORKING["`target_parameters` (experts of a MoE)"].base()
    experts = sum(tensor.numel() for name, tensor in model.named_parameters() if "experts" in name)
    others = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert base_cost(model).flops == 2 * (others + experts // 2)


def test_bytes_are_those_of_the_factors(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    checkpoint = read_checkpoint(save_adapter(tiny_llama(), tmp_path, target_modules=ALL_LINEAR))
    bound = AdapterManager(model).bind(checkpoint)
    numbers = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    cost = two_path_cost(bound, model, model.dtype.itemsize)
    assert cost.nbytes == 2 * numbers
    assert cost.flops == 2 * numbers
    assert low_rank_cost(8, 64, 96, 2).nbytes == 8 * (64 + 96) * 2


@pytest.mark.parametrize("spec", [Composition(method="linear"), Composition(method="ties", density=0.5)])
def test_a_composition_costs_what_runs_beside_the_weights(spec: Composition, tmp_path: Path) -> None:
    model = tiny_llama()
    manager = AdapterManager(model, max_delta_error=2)
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "use_dora": spec.method == "linear"}
    parts = [manager.bind(save_adapter(tiny_llama(), tmp_path / str(seed), seed, **options)) for seed in (1, 2)]
    bound = manager.load("it", manager.compose([(parts[0], 1.0), (parts[1], -0.5)], spec))
    extra = counted(model, routed=manager) - counted(model)
    assert extra == TOKENS * two_path_cost(bound, model, 4).flops > 0
