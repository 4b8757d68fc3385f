"""Checkpoints of the demo set, altered: weaker, of lower rank, or read with the wrong scale. Plain PEFT folders."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold_adapters.truncate import truncated_product

CONFIG, TENSORS, STAMP = "adapter_config.json", "adapter_model.safetensors", "lorafold_stamp.json"
A, B = ".lora_A.weight", ".lora_B.weight"
Options = dict[str, Any]


def weaker(adapter: Path, folder: Path, factor: float) -> Path:
    """Every low-rank product times `factor`; exact for powers of two."""

    def scaled(options: Options, tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(B):
                tensors[name] = tensors[name] * factor

    return altered(adapter, folder, scaled)


def of_rank(adapter: Path, folder: Path, rank: int) -> Path:
    """Every low-rank product replaced by its best approximation of `rank`, padded with zeros where it has less."""

    def cut(options: Options, tensors: dict[str, Tensor]) -> None:
        for name in [name.removesuffix(A) for name in tensors if name.endswith(A)]:
            a_RI, b_OR = tensors[name + A], tensors[name + B]
            left_OR, right_RI = truncated_product(scaling(options, name, a_RI.shape[0]) * b_OR, a_RI, rank)
            missing = rank - right_RI.shape[0]
            tensors[name + A] = torch.nn.functional.pad(right_RI, (0, 0, 0, missing))
            tensors[name + B] = torch.nn.functional.pad(left_OR, (0, missing)).contiguous()
        options.update(r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={})

    return altered(adapter, folder, cut)


def wrongly_scaled(adapter: Path, folder: Path) -> Path:
    """As if `use_rslora` had been lost, or set by mistake: alpha / r for alpha / sqrt(r), or the reverse."""
    return altered(adapter, folder, lambda options, _: options.update(use_rslora=not options["use_rslora"]))


def scaling(options: Options, module: str, rank: int) -> float:
    """PEFT's factor of B A, for one module (`LoraConfig`; patterns match ends of names)."""
    alphas: dict[str, float] = options["alpha_pattern"]
    alpha = next((value for key, value in alphas.items() if module.endswith(key)), options["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if options["use_rslora"] else rank)


def altered(adapter: Path, folder: Path, change: Callable[[Options, dict[str, Tensor]], None]) -> Path:
    """A copy of `adapter` whose options and tensors `change` has changed. Its stamp is left out."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns(STAMP))
    options, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    change(options, tensors)
    (folder / CONFIG).write_text(json.dumps(options))
    save_file(tensors, folder / TENSORS)
    return folder
