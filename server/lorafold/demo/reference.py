"""What transformers' `generate()` with PEFT answers to the same prompts: the oracle of the demo and of the tests."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reference:
    """Greedy answers of one base with any of its adapters, each computed alone."""

    def __init__(self, base: str | Path) -> None:
        self._base = base
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.answer = cache(self._answer)
        """(prompt, adapter folder or '', max tokens) to token ids."""
        self._model = cache(self._load)

    def _load(self, adapter: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._base)
        return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    @torch.inference_mode()
    def _answer(self, prompt: str, adapter: str, max_tokens: int) -> tuple[int, ...]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        ids = self._model(adapter).generate(
            input_ids=inputs.input_ids,
            attention_mask=torch.ones_like(inputs.input_ids),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        return tuple(ids[0, inputs.input_ids.shape[1] :].tolist())

    def text(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
