"""Every kind of adapter in docs/adapters.md, made by PEFT: on which base, with which options."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from transformers import PreTrainedModel

from tests.models import ALL_LINEAR, save_adapter, tiny, tiny_llama, tiny_qwen

MakeBase = Callable[..., PreTrainedModel]


def tied_llama(**options: Any) -> PreTrainedModel:
    return tiny_llama(tie_word_embeddings=True, **options)


def gpt2(**options: Any) -> PreTrainedModel:
    return tiny("GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **options)


def mixtral(**options: Any) -> PreTrainedModel:
    return tiny("Mixtral", num_local_experts=4, **options)


def gemma(**options: Any) -> PreTrainedModel:
    return tiny("Gemma3Text", head_dim=16, tie_word_embeddings=False, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One row of the table."""

    options: dict[str, Any]
    base: MakeBase = tiny_llama
    method: type[peft.PeftConfig] = peft.LoraConfig
    folded: bool = True
    routed: bool = True
    fold_refusal: str = ""
    """What the refusal says, where it cannot be folded."""

    def save(self, folder: Path, seed: int = 1) -> Path:
        """A checkpoint with random tensors."""
        return save_adapter(self.base(), folder, seed, method=self.method, **self.options)


def lora(base: MakeBase = tiny_llama, *, fold_refusal: str = "", **options: Any) -> Kind:
    return Kind(options=options, base=base, folded=not fold_refusal, fold_refusal=fold_refusal)


def by_peft(method: type[peft.PeftConfig], **options: Any) -> Kind:
    return Kind(options={"target_modules": ["q_proj", "v_proj", "down_proj"], **options}, method=method, routed=False)


WORKING: dict[str, Kind] = {
    "LoRA on any subset of the linear layers": lora(target_modules=ALL_LINEAR),
    "rsLoRA": lora(target_modules=ALL_LINEAR, use_rslora=True, lora_alpha=5),
    "`rank_pattern`, `alpha_pattern`": lora(
        target_modules=ALL_LINEAR, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 9}
    ),
    "`layers_to_transform`": lora(target_modules=ALL_LINEAR, layers_to_transform=[1]),
    "`lora_bias`, where the layer has a bias": lora(tiny_qwen, target_modules=["q_proj", "v_proj"], lora_bias=True),
    "`lora_bias`, where it has none": lora(
        target_modules=["q_proj", "v_proj"], lora_bias=True, fold_refusal="adds a bias"
    ),
    "DoRA": lora(target_modules=ALL_LINEAR, use_dora=True),
    "DoRA on layers with a bias": lora(tiny_qwen, target_modules=["q_proj", "k_proj"], use_dora=True),
    "`modules_to_save`: head": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "`modules_to_save`: embedding": lora(target_modules=["o_proj"], modules_to_save=["embed_tokens"]),
    "`modules_to_save`: norms": lora(target_modules=["o_proj"], modules_to_save=["input_layernorm"]),
    "`modules_to_save`: head, tied to the embedding": lora(
        tied_llama, target_modules=["q_proj"], modules_to_save=["lm_head"], fold_refusal="tied"
    ),
    "LoRA on the head": lora(target_modules=["q_proj", "lm_head"], embeddings=True),
    "LoRA on the embedding": lora(target_modules=["q_proj", "embed_tokens"], embeddings=True),
    "LoRA on an embedding that scales its output": lora(gemma, target_modules=["q_proj", "embed_tokens"]),
    "DoRA on the embedding": lora(target_modules=["embed_tokens"], use_dora=True),
    "LoRA on the embedding, tied to the head": lora(
        tied_llama, target_modules=["q_proj", "embed_tokens"], fold_refusal="tied"
    ),
    '`bias="lora_only"`': lora(tiny_qwen, target_modules=["q_proj", "v_proj"], bias="lora_only"),
    '`bias="all"`': lora(tiny_qwen, target_modules=["q_proj"], bias="all"),
    "`trainable_token_indices`": lora(target_modules=["q_proj"], trainable_token_indices=[1, 5, 9]),
    "`trainable_token_indices`, embedding tied to the head": lora(
        tied_llama, target_modules=["q_proj"], trainable_token_indices=[1, 5, 9]
    ),
    "LoRA on Conv1D (GPT-2)": lora(gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "DoRA on Conv1D (GPT-2)": lora(gpt2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
    "`target_parameters` (experts of a MoE)": Kind(
        options={"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        base=mixtral,
        routed=False,
    ),
    "LoHa": by_peft(peft.LoHaConfig, r=4),
    "LoKr": by_peft(peft.LoKrConfig, r=4),
    "OFT": by_peft(peft.OFTConfig, r=0, oft_block_size=8),
    "IA3": by_peft(peft.IA3Config, feedforward_modules=["down_proj"]),
    "HRA": by_peft(peft.HRAConfig, r=4),
    "MiSS": by_peft(peft.MissConfig, r=4),
    "FourierFT": by_peft(peft.FourierFTConfig, n_frequency=50),
}

# What is refused when its files are read: options that PEFT may have written, and the sentence's key words.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA, OLoRA, CorDA, LoRA-GA, not converted": ({"init_lora_weights": "pissa"}, "convert the adapter with PEFT"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "serve it on the base that was written after the initialisation"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "switches on in mid-prompt"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "routes each token"),
    "QA-LoRA": ({"use_qalora": True}, "pools its input"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "rewrites the base weights"),
    "`layer_replication`": ({"layer_replication": [[0, 2]]}, "changes the number of layers"),
    "Megatron's parallel layers": ({"megatron_config": {"a": 1}}, "Megatron"),
    "every other method of PEFT": ({"peft_type": "PREFIX_TUNING"}, "LORA is served"),
}
