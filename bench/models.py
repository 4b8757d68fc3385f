"""The models that are measured, with random weights, and the one place where an AdapterManager is made."""

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from lorafold_adapters import AdapterManager
from lorafold_adapters.undo_kinds import UndoKind

# Shapes whose speed is measured: what LlamaConfig is called with.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    },
    "short": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 8192,
    },
    "mid": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 8192,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
GAIN = 1.28
"""Of a layer with random weights: with it answers vary; at transformers' own 0.02 most repeat one token."""


def shaped(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of one of `SHAPES` with random weights, drawn on `device`, that never ends an answer by itself."""
    torch.manual_seed(0)
    options = SHAPES[shape]
    config = LlamaConfig(
        **options,
        max_position_embeddings=8192,
        initializer_range=GAIN / math.sqrt(options["hidden_size"]),
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return placed(model, device, dtype)


def shell(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model over the same tensors: what is done to its modules does not show on `model`'s."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors(model).values()})


def llama(layers: int) -> LlamaForCausalLM:
    """768 wide, 12 heads; 97 M parameters with 12 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=8192,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tiny() -> LlamaForCausalLM:
    """64 wide, 2 layers, biases in the attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def placed(model: LlamaForCausalLM, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model itself, for inference, on `device` in `dtype`."""
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return cast(LlamaForCausalLM, model.eval().requires_grad_(False))


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def weight_bytes(model: torch.nn.Module) -> int:
    """Memory of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The folder, with the model in it."""
    logging.disable_progress_bar()
    model.save_pretrained(str(folder))
    return folder


def attach(model: PreTrainedModel, undo: UndoKind, folder: Path) -> AdapterManager:
    """A manager that gives the base back by `undo`; `folder` holds the model as `save_pretrained` wrote it."""
    return AdapterManager(model, undo=undo, source=folder, max_delta_error=float("inf"))


def undo_bytes(manager: AdapterManager) -> int:
    """Memory that the undo holds now beside the weights."""
    return manager.fold_state.undo_bytes


def undo_kinds(device: torch.device) -> tuple[UndoKind, ...]:
    """The kinds of undo that are measured on `device`; the first is the headline."""
    return ("sparse", "device", "host", "checkpoint") if device.type == "cuda" else ("sparse", "host", "checkpoint")
