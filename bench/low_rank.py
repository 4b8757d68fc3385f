"""Adapters whose speed is measured: PEFT checkpoints, written within a second at any size.

Their factors are normal, so that the strength of a delta is known without computing one.
"""

import math
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.adapters import ALL_LINEAR, STRENGTH


def write_low_rank(
    model: PreTrainedModel, folder: Path, seed: int, rank: int, targets: Collection[str] = ALL_LINEAR
) -> Path:
    """A checkpoint for `model`; rms(delta) is `STRENGTH` times rms(weight)."""
    folder.mkdir()
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(targets))
    config.save_pretrained(str(folder))
    numbers = torch.Generator().manual_seed(seed)
    strength = STRENGTH * model.config.initializer_range
    factors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in targets:
            shrink, expand = drawn_factors(module.in_features, module.out_features, rank, strength, numbers)
            factors[f"base_model.model.{name}.lora_A.weight"] = shrink
            factors[f"base_model.model.{name}.lora_B.weight"] = expand
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def drawn_factors(
    inputs: int, outputs: int, rank: int, strength: float, numbers: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] in fp32 with rms(BA) = `strength`: the elements of BA are sums of R products."""
    a_RI = torch.randn(rank, inputs, generator=numbers) / math.sqrt(inputs)
    b_OR = torch.randn(outputs, rank, generator=numbers) * strength * math.sqrt(inputs / rank)
    return a_RI, b_OR
