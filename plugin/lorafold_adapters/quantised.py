"""Modules whose weight is quantised: which they are, what their weight is worth, and how it is quantised again.

bitsandbytes is optional, and imported only where a module of it is there. Knows nothing of adapters. Shapes in the
names: O out-features, I in-features.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorafold_adapters.errors import BaseCorrupt

FOUR_BIT, EIGHT_BIT = "Params4bit", "Int8Params"
"""bitsandbytes' classes of parameters."""
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How a class of another library is called, by a part of its name, among those that PEFT has a LoRA layer for.
PEFT_SERVES = {
    "torchao": "torchao",
    "HQQLinear": "HQQ",
    "WQLinear": "AWQ",
    "Awq": "AWQ",
    "Eetq": "EETQ",
    "QuantizedLinear": "AQLM",
    "QuantLinear": "GPTQ",
}


def is_quantised(module: nn.Module) -> bool:
    """True for a linear layer of bitsandbytes with a 4-bit or int8 weight."""
    weight = module._parameters.get("weight")
    return type(weight).__name__ in (FOUR_BIT, EIGHT_BIT) and not weight_is_plain(weight)


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of bitsandbytes, by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if is_quantised(module)}


def weight_is_plain(weight: Any) -> bool:
    """True for a floating-point weight that arithmetic may be done on as it is."""
    return weight is not None and weight.dtype in PLAIN and not type(weight).__module__.startswith("torchao")


def other_kind(module: nn.Module) -> str | None:
    """What a linear layer is quantised with, if it is and bitsandbytes did not do it."""
    if not hasattr(module, "in_features") and not hasattr(module, "infeatures"):
        return None
    weight = getattr(module, "weight", None)
    if is_quantised(module) or weight_is_plain(weight):
        return None
    name = f"{type(weight).__module__} {type(module).__name__}"
    return next((kind for part, kind in PEFT_SERVES.items() if part in name), type(module).__name__)


def is_served_unmerged(module: nn.Module) -> bool:
    """True if PEFT has a layer for what `other_kind` found, or would take it for an ordinary linear layer."""
    return isinstance(module, nn.Linear) or other_kind(module) in PEFT_SERVES.values()


def keep_as_loaded(model: nn.Module) -> None:
    """Call before the first forward pass: keeps bitsandbytes from changing what it loaded while it runs.

    It would cast biases to the dtype it computes in, and on CPUs with AVX512-BF16 repack weights in a way that cannot
    be undone exactly. Raises BaseCorrupt if the second happened already.
    """
    for name, module in quantised_modules(model).items():
        layer: Any = module
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise BaseCorrupt(
                f"'{name}' was repacked by a forward pass: load the base again and call keep_as_loaded(model), "
                "or make the manager, before the first one"
            )
        if type(layer.weight).__name__ == FOUR_BIT:
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None and layer.compute_dtype is not None:
                layer.bias.data = layer.bias.data.to(layer.compute_dtype)


def compute_dtype(module: nn.Module, activations: torch.dtype) -> torch.dtype:
    """What a layer of bitsandbytes computes in: what its configuration says for 4-bit, or else the activations'."""
    return getattr(module, "compute_dtype", None) or activations


def like_activations(module: nn.Module, activations: torch.dtype) -> Tensor:
    """A tensor of the dtype and on the device that a module's outputs have: its weight, unless that is quantised."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight_is_plain(weight):
        return weight
    stored = next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]))
    return torch.empty(0, dtype=activations, device=stored.device)


def shape_of(module: nn.Module) -> torch.Size:
    """Of the weight, dequantised."""
    layer: Any = module
    return torch.Size((layer.out_features, layer.in_features))


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """The weight [O, I] in fp32, with the values that bitsandbytes computes with before it rounds to its own dtype."""
    from bitsandbytes import functional as bnb

    layer: Any = module
    weight = layer.weight
    if type(weight).__name__ == EIGHT_BIT:
        scales_O = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        dense_OI: Tensor = bnb.int8_vectorwise_dequant(weight.data, scales_O.to(weight.device))
        return dense_OI.float()
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # It would round to the dtype that was quantised.
    return bnb.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]


@torch.no_grad()
def requantised(module: nn.Module, dense_OI: Tensor) -> nn.Module:
    """A layer like `module` that holds `dense_OI`, quantised with the same settings, and shares its bias."""
    from bitsandbytes import nn as bnb

    layer: Any = copy.copy(module)
    for attribute in [name for name in layer.__dict__ if name.startswith("_lorafold") or name == "forward"]:
        del layer.__dict__[attribute]
    layer.__class__ = getattr(type(module), "lorafold_base", type(module))
    layer._parameters = dict(module._parameters)
    old: Any = module.weight
    if type(old).__name__ == EIGHT_BIT:
        layer.state = copy.copy(layer.state)
        layer.state.reset_grads()
        # bitsandbytes only quantises what comes from the CPU.
        weight = bnb.Int8Params(dense_OI.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        settings = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        weight = bnb.Params4bit(
            dense_OI, requires_grad=False, quant_storage=old.quant_storage, module=layer, **settings
        )
    layer._parameters["weight"] = weight.to(old.device)
    return layer  # type: ignore[no-any-return]


def take_over(model: nn.Module, fresh: nn.Module) -> None:
    """Makes the scales of every quantised weight of `model` what `fresh`, the same base newly loaded, has."""
    others: Mapping[str, Any] = quantised_modules(fresh)
    for name, module in quantised_modules(model).items():
        layer: Any = module
        if type(layer.weight).__name__ == EIGHT_BIT:
            scales_O = others[name].state.SCB if others[name].state.SCB is not None else others[name].weight.SCB
            (layer.weight if layer.state.SCB is None else layer.state).SCB = scales_O.to(layer.weight.device)
        else:
            state = copy.deepcopy(others[name].weight.quant_state)
            state.to(layer.weight.device)
            layer.weight.quant_state = layer.quant_state = state


def bytes_of(module: nn.Module) -> int:
    """What a layer of bitsandbytes takes, without its bias."""
    tensors = {key: value for key, value in module.state_dict().items() if key != "bias"}
    return sum(tensor.nbytes for tensor in tensors.values())


class Dense:
    """Computes what `module` would with a dense weight; takes its bias from it at every call."""

    def __init__(self, module: nn.Module, weight_OI: Tensor) -> None:
        self.weight_OI = weight_OI
        self._parameters = module._parameters

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs, in the dtype of `inputs`."""
        weight_OI, bias_O = self.weight_OI, self._parameters.get("bias")
        own_O = None if bias_O is None else bias_O.to(weight_OI.dtype)
        return functional.linear(inputs.to(weight_OI.dtype), weight_OI, own_O).to(inputs.dtype)
