"""Adapters to measure with: real PEFT checkpoints, made on the spot, seeded, as strong as asked."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

ADAPTER = "default"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = [*ATTENTION, *MLP]
STRENGTH = 0.03
"""rms(delta) over rms(weight) unless a kind says otherwise."""

# Kinds of adapter: what LoraConfig is called with, and `strength`. Each fits a Llama with biases in its attention.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "attention": {"target_modules": ATTENTION, "r": 8},
    "mlp": {"target_modules": MLP, "r": 2},
    "all-linear": {"target_modules": ALL_LINEAR, "r": 16},
    "rank-1": {"target_modules": ALL_LINEAR, "r": 1, "lora_alpha": 1},
    "weak": {"target_modules": ALL_LINEAR, "lora_alpha": 1, "strength": 0.003},
    "strong": {"target_modules": ALL_LINEAR, "lora_alpha": 64, "strength": 0.3},
    "rslora": {"target_modules": ALL_LINEAR, "use_rslora": True, "lora_alpha": 5},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True, "strength": 0.1},
    "patterns": {"target_modules": ALL_LINEAR, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    "one-layer": {"target_modules": ALL_LINEAR, "layers_to_transform": [1], "strength": 0.1},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "bias": {"target_modules": ["k_proj", "o_proj"], "lora_bias": True},
    "saved-head": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-norm": {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]},
}


def write_adapter(base: PreTrainedModel, folder: Path, seed: int, *, strength: float = STRENGTH, **config: Any) -> Path:
    """A PEFT checkpoint for models like `base`, which is left as it was.

    Every low-rank delta has `strength` times the rms of the weight that it is added to.
    """
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(base, LoraConfig(**options), adapter_name=ADAPTER)
    randomise(adapted, strength)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    adapted.unload()
    return folder


@torch.no_grad()
def randomise(adapted: PeftModel, strength: float) -> None:
    """Gives every trained tensor random values, then scales each B."""
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.mul_(1 + strength * torch.randn_like(parameter))
        elif parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        wanted = strength * rms(layer.get_base_layer().weight)
        layer.lora_B[ADAPTER].weight.mul_(wanted / rms(layer.get_delta_weight(ADAPTER)))


def rms(tensor: Tensor) -> Tensor:
    """The root of the mean square."""
    return tensor.float().square().mean().sqrt()
