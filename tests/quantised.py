"""Tiny models whose linear layers bitsandbytes quantised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.models import tiny_qwen

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

KINDS = ["nf4", "nf4-double", "int8"]


def quantisation(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Options that `transformers` quantises by while it loads."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    double = kind == "nf4-double"
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=double
    )


def quantised_qwen(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", *, repacks: bool = False
) -> Any:
    """A Qwen with biases, saved to `folder` in 16 bits and quantised as it is loaded; computes in `dtype`.

    `repacks`: as bitsandbytes has it on CPUs with AVX512-BF16, where its first forward pass repacks 4-bit weights, in
    bfloat16, and fails on rows as short as these.
    """
    if not (folder / "config.json").exists():
        tiny_qwen(dtype=torch.bfloat16).save_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation(kind, dtype), dtype=dtype, device_map={"": device}
    )
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu &= repacks
    return model.eval().requires_grad_(False)


def blobs(model: torch.nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Every parameter and every part of a quantisation: the identity of the object, and a copy of the values."""
    objects = dict(model.named_parameters(remove_duplicate=False))
    return {name: (id(objects.get(name)), tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_same_blobs(model: torch.nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    """The same objects, and bit for bit the same values."""
    after = blobs(model)
    assert after.keys() == before.keys()
    for name, (place, tensor) in before.items():
        assert after[name][0] == place, name
        assert after[name][1].dtype == tensor.dtype, name
        assert torch.equal(after[name][1], tensor), name
