"""Tiny models and real PEFT checkpoints on them, made on the spot, seeded."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 64
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# The kinds of adapter that are served, each as the LoraConfig that makes it.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": ALL_LINEAR},
    "rslora": {"target_modules": ALL_LINEAR, "use_rslora": True, "lora_alpha": 5},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True},
    "patterns": {"target_modules": ALL_LINEAR, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    "one-layer": {"target_modules": ALL_LINEAR, "layers_to_transform": [1]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved-head": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-norm": {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]},
}
# Kinds that need a base whose layers have biases.
BIASED_KINDS: dict[str, dict[str, Any]] = {
    "lora-bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "dora-on-biases": {"target_modules": ["q_proj", "k_proj"], "use_dora": True},
}


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Random weights; no biases, untied embeddings."""
    torch.manual_seed(seed)
    return frozen(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})), dtype)


def tiny_qwen(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights; q, k and v have biases."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "tie_word_embeddings": False}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return frozen(model, dtype)


def frozen(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `dtype`, for inference."""
    torch.nn.Module.to(model, dtype=dtype)
    model.eval().requires_grad_(False)
    return model


def on(device: str, model: PreTrainedModel) -> PreTrainedModel:
    """The model, moved to `device`."""
    torch.nn.Module.to(model, device=device)
    return model


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Random weights, biases too; `family` is the prefix of transformers' classes."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return frozen(model, dtype)


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    seed: int = 1,
    *,
    method: type[PeftConfig] = LoraConfig,
    embeddings: bool = False,
    **config: Any,
) -> Path:
    """A PEFT checkpoint for a base like `model`, with every tensor random, so that it changes what the model says.

    `embeddings` also saves the base's own embeddings, as PEFT does where they were resized. Uses `model` up: PEFT
    writes into it.
    """
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8} if method is LoraConfig else {}
    adapted = get_peft_model(model, method(**{"task_type": "CAUSAL_LM", **defaults, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.15 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), save_embedding_layers=embeddings)
    return folder


def prompts(rows: int, length: int, seed: int = 7) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits [rows, length, vocabulary] in fp32."""
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits.float()
    return result


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
