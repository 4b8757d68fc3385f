"""The models that are measured, with random weights, and the one place where an AdapterManager is made."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from lorafold_adapters import AdapterManager
from lorafold_adapters.undo_kinds import UndoKind


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
