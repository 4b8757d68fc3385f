"""Collects from PEFT's skeleton what the adapter does to each module of the base. Reads no values of its tensors."""

import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterCorrupt
from lorafold_adapters.skeleton import ADAPTER
from lorafold_adapters.updates import LowRank, NewRows, Replaced, ThroughPeft, Update

MAX_SCALING = 1e6
"""Beyond any scale that is trained with, and far below where fp32 overflows."""


def collect(skeleton: nn.Module, checkpoint: Checkpoint) -> dict[str, Update]:
    """The update of each module that PEFT put an adapter on."""
    updates: dict[str, Update] = {}
    for name, module in skeleton.named_modules():
        if name.rpartition(".")[2] == "base_layer" or ".token_adapter" in name or ".modules_to_save." in name:
            continue  # Part of a layer that was collected with what is around it.
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[ADAPTER].named_parameters()
            updates[name] = Replaced(parameters={key: value.detach() for key, value in saved})
        elif isinstance(module, TrainableTokensWrapper):
            updates[name] = collect_rows(module.token_adapter)
        elif isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            if ADAPTER in module.scaling:
                updates[name] = collect_low_rank(name, module)
        elif isinstance(module, BaseTunerLayer):
            updates[name] = collect_through_peft(module, checkpoint)
    return updates


def collect_low_rank(name: str, module: Any) -> LowRank:
    """Raises AdapterCorrupt for a scale that no training gives."""
    if not math.isfinite(module.scaling[ADAPTER]) or abs(module.scaling[ADAPTER]) > MAX_SCALING:
        raise AdapterCorrupt(f"the adapter scales '{name}' by {module.scaling[ADAPTER]}: correct lora_alpha and r")
    magnitude = module.lora_magnitude_vector[ADAPTER].weight if ADAPTER in module.lora_magnitude_vector else None
    magnitude_O = None if magnitude is None else magnitude.detach()
    if ADAPTER in module.lora_embedding_A:
        return LowRank(
            a_RI=module.lora_embedding_A[ADAPTER].detach(),
            b_OR=module.lora_embedding_B[ADAPTER].detach(),
            scaling=module.scaling[ADAPTER],
            magnitude_O=magnitude_O,
            stored_as_IO=True,
        )
    bias_O = module.lora_B[ADAPTER].bias
    return LowRank(
        a_RI=module.lora_A[ADAPTER].weight.detach(),
        b_OR=module.lora_B[ADAPTER].weight.detach(),
        scaling=module.scaling[ADAPTER],
        bias_O=None if bias_O is None else bias_O.detach(),
        magnitude_O=magnitude_O,
        stored_as_IO=isinstance(module.get_base_layer(), Conv1D),
    )


def collect_rows(module: Any) -> NewRows:
    """The rows of trainable_token_indices; a tied head has the same ones as the embedding."""
    values, index = module.trainable_tokens_delta[ADAPTER].detach(), module.token_indices[ADAPTER]
    rows = module.get_base_layer().weight.shape[0]
    if not all(type(row) is int and 0 <= row < rows for row in index) or len(set(index)) < len(index):
        raise AdapterCorrupt(
            f"trainable_token_indices are {list(index)[:9]}, not distinct token ids below {rows}: correct them"
        )
    return NewRows(index_K=torch.tensor(index, dtype=torch.int64), values_KM=values)


def collect_through_peft(module: Any, checkpoint: Checkpoint) -> ThroughPeft:
    """A layer of a method that PEFT folds; or of target_parameters, where layers lie in each other."""
    base = module.get_base_layer()
    names = tuple(name for name, parameter in base._parameters.items() if parameter is not None)
    if isinstance(module, ParamWrapper):
        inside = [wrapper for wrapper in module.modules() if isinstance(wrapper, ParamWrapper)]
        names = tuple(wrapper.parameter_name for wrapper in inside)
    method = "LoRA on target_parameters" if isinstance(module, ParamWrapper) else checkpoint.method
    return ThroughPeft(layer=module, names=names, method=method, adapter=ADAPTER)
