"""Adapters that would be bound in part, or routed to the wrong rows: refused, by what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import AdapterCorrupt, AdapterUnsupported, RoutingMismatch
from lorafold_adapters.modes import runs_row_by_row
from lorafold_adapters.updates import LowRank
from tests.kinds import gemma, gpt2, mixtral
from tests.models import apart, logits_of, prompts, save_adapter, tiny_llama, tiny_qwen
from tests.tolerances import LOGITS


@pytest.mark.parametrize("bias", ["all", "oft_only"])
def test_biases_beside_a_method_that_peft_folds_are_refused(bias: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 0, "oft_block_size": 8}
    save_adapter(tiny_qwen(), tmp_path / "trained", method=peft.OFTConfig, bias=bias, **options)
    with pytest.raises(AdapterUnsupported, match="bias"):
        AdapterManager(tiny_qwen()).bind(tmp_path / "trained")
    save_adapter(tiny_qwen(), tmp_path / "plain", method=peft.OFTConfig, **options)
    AdapterManager(tiny_qwen()).bind(tmp_path / "plain")  # Negative control.


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_trained_bias_that_is_missing_is_named(bias: str, tmp_path: Path) -> None:
    save_adapter(tiny_qwen(), tmp_path, target_modules=["q_proj", "v_proj"], bias=bias)
    AdapterManager(tiny_qwen()).bind(tmp_path)  # Negative control.
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.base_layer.bias"]
    save_file(tensors, file)
    with pytest.raises(AdapterCorrupt, match=r"lack 'model\.layers\.1\.self_attn\.v_proj\.bias'"):
        AdapterManager(tiny_qwen()).bind(tmp_path)


@pytest.mark.parametrize("index", [[1, 5, 1000], [1, 5, -1], [1, 5, 5], [1, 5, 9.5]])
def test_token_indices_are_distinct_tokens_of_the_base(index: list[Any], tmp_path: Path) -> None:
    save_adapter(tiny_llama(), tmp_path, target_modules=["q_proj"], trainable_token_indices=[1, 5, 9])
    AdapterManager(tiny_llama()).bind(tmp_path)  # Negative control.
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": index}))
    with pytest.raises(AdapterCorrupt, match="trainable_token_indices"):
        AdapterManager(tiny_llama()).load("it", tmp_path)


@pytest.mark.parametrize(("base", "module"), [(gemma, "q_norm"), (mixtral, "gate")])
def test_a_replaced_module_that_sees_no_whole_rows_is_folded_only(base: Any, module: str, tmp_path: Path) -> None:
    save_adapter(base(), tmp_path, target_modules=["q_proj"], modules_to_save=[module])
    model, ids = base(), prompts(2, 9)
    oracle = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    manager = AdapterManager(model)
    bound = manager.load("it", tmp_path)
    assert bound.route_refusal is not None
    assert module in bound.route_refusal
    with pytest.raises(AdapterUnsupported, match=module):
        manager.routed(["it", None]).__enter__()
    manager.merge_adapter("it")
    assert apart(logits_of(model, ids), logits_of(oracle, ids)) < LOGITS[torch.float32]


def test_a_layer_that_all_rows_share_is_not_routed_row_by_row(tmp_path: Path) -> None:
    """GPT-2's position embedding runs once for the whole batch."""
    save_adapter(gpt2(), tmp_path, target_modules=["c_attn"], modules_to_save=["wpe"], fan_in_fan_out=True)
    model = gpt2()
    manager = AdapterManager(model)
    manager.load("it", tmp_path)
    with manager.routed(["it", None]), pytest.raises(RoutingMismatch, match="row by row"):
        logits_of(model, prompts(2, 4))
    oracle = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
    with manager.routed(["it"]):
        routed = logits_of(model, prompts(1, 4))
    assert apart(routed, logits_of(oracle, prompts(1, 4))) < LOGITS[torch.float32]


def test_single_experts_see_some_tokens_only() -> None:
    """transformers keeps experts in one tensor where it can; models of one module for each are told by their names."""
    update, layer, model = (
        LowRank(a_RI=torch.ones(1, 2), b_OR=torch.ones(2, 1), scaling=1.0),
        nn.Linear(2, 2),
        tiny_llama(),
    )
    assert not runs_row_by_row("model.layers.0.mlp.experts.3.up_proj", update, layer, model)
    assert runs_row_by_row("model.layers.0.mlp.shared_expert.up_proj", update, layer, model)
