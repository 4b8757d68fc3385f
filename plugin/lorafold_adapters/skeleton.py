"""Lets PEFT resolve a checkpoint on a skeleton of the base: its modules without their weights.

PEFT knows which module each tensor belongs to, which patterns apply and what the scales are; the live model never
becomes a PeftModel and is not touched. Whoever calls this holds a lock: while PEFT builds its layers it patches
`nn.Module.register_parameter` for the whole process (peft#3605).
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterError, AdapterUnsupported, BaseMismatch

ADAPTER = "default"
REMEDY = "serve it on the base it was trained on"
SHAPES = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)", re.DOTALL
)


def resolve(checkpoint: Checkpoint, model: PreTrainedModel) -> nn.Module:
    """The base as a PeftModel without base weights that holds the checkpoint's own tensors.

    Raises AdapterCorrupt if the adapter contradicts itself, BaseMismatch if it does not fit, AdapterUnsupported.
    """
    is_lora = checkpoint.method == "LORA"
    config = peft_config(checkpoint)
    with torch.device("meta"):
        skeleton: Any = type(model)(plain(model.config))
    if not is_lora:
        # Other methods make tables of their own besides what they train; those must not be on `meta`.
        skeleton = skeleton.to_empty(device="cpu")  # Never read or written, so it takes no memory.
    try:
        peft_model = get_peft_model(skeleton, config, low_cpu_mem_usage=is_lora)
    except Exception as error:  # PEFT checks options here and there, and raises what it likes.
        raise injection_error(error, checkpoint) from error
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            forget_base_weights(module)
            # PEFT would move the tensors to the skeleton's device, where they would lose their values.
            module.__dict__["_move_adapter_to_device_of_base_layer"] = lambda *_, **__: None
    try:
        result: Any = set_peft_model_state_dict(peft_model, dict(checkpoint.tensors), low_cpu_mem_usage=True)
    except RuntimeError as error:
        raise shape_error(str(error)) from error
    except KeyError as error:
        raise AdapterCorrupt(
            f"the adapter's files lack {error}, which its configuration asks for: copy it again"
        ) from error
    refuse_missing(peft_model, result.missing_keys, checkpoint)
    base: nn.Module = peft_model.get_base_model()
    return base


def peft_config(checkpoint: Checkpoint) -> Any:
    """PEFT's configuration object. Raises AdapterCorrupt."""
    options = {**checkpoint.options, "inference_mode": True}
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(checkpoint.method)].from_peft_type(**options)
    except Exception as error:
        raise AdapterCorrupt(f"PEFT cannot use adapter_config.json: {first_sentence(error)}: correct it") from error


def plain(config: Any) -> Any:
    """A copy of a model's configuration without its quantisation: the skeleton's layers are ordinary ones."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def forget_base_weights(layer: Any) -> None:
    """Puts the base weights under a tuner layer on `meta`, where copying the layer copies none of them."""
    base = layer.get_base_layer()
    for name, parameter in base._parameters.items():
        if parameter is not None and not parameter.is_meta:
            base._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def injection_error(error: Exception, checkpoint: Checkpoint) -> AdapterError:
    """PEFT could not put its layers on the skeleton: what that says of the adapter."""
    sentence = first_sentence(error)
    if "not found in the base model" in sentence or "No modules were targeted" in sentence:
        return BaseMismatch(f"the adapter does not fit this base: {sentence}: {REMEDY}")
    if "is not supported" in sentence:
        return AdapterUnsupported(f"PEFT's {checkpoint.method} cannot change this base: {sentence}")
    return AdapterCorrupt(f"PEFT cannot apply adapter_config.json: {sentence}: correct it")


def first_sentence(error: Exception) -> str:
    """The start of a library's message, without its advice."""
    return str(error).split(". ")[0].rstrip(".")


def refuse_missing(peft_model: nn.Module, missing: Iterable[str], checkpoint: Checkpoint) -> None:
    """Raises AdapterCorrupt if a tensor that the configuration asks for was not in the files.

    Layers tied to one another share a tensor, which the files have under one of their names.
    """
    loaded = {tensor.data_ptr() for tensor in checkpoint.tensors.values()}
    state = peft_model.state_dict()
    own = [name for name in missing if re.search(rf"\.{ADAPTER}(\.|$)", name)]
    own = [name for name in own if state[name].data_ptr() not in loaded]
    if own:
        name = own[0].removeprefix("base_model.model.").replace(f".{ADAPTER}", "")
        raise AdapterCorrupt(f"the adapter's configuration asks for '{name}', which its files lack: copy it again")


def shape_error(message: str) -> AdapterError:
    """Tells a tensor that contradicts the adapter's own rank from one that was made for another base."""
    found = SHAPES.search(message)
    if found is None:
        return BaseMismatch(f"the adapter does not fit this base ({message}): {REMEDY}")
    name = found[1].removeprefix("base_model.model.").replace(f".{ADAPTER}", "")
    has, needs = ([int(size) for size in shape.split(",") if size.strip()] for shape in (found[2], found[3]))
    rank_axis = 0 if ".lora_A" in name else 1 if ".lora_B" in name else None
    if rank_axis is not None and len(has) == len(needs) == 2 and has[rank_axis] != needs[rank_axis]:
        return AdapterCorrupt(
            f"tensor '{name}' has rank {has[rank_axis]} where adapter_config.json says {needs[rank_axis]}: "
            "the folder mixes two training runs; copy the adapter again"
        )
    return BaseMismatch(f"tensor '{name}' has shape {has}, this base needs {needs}: {REMEDY}")
