"""Whether answers are what an adapter gives alone: the oracle is PEFT on transformers, one adapter at a time.

Greedy answers are checked by one forward over prompt and answer: each token must be the most likely one after those
before it. Where another one is as likely but for rounding (`NEAR`), either is right, and the rest is checked after the
one that was chosen.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from bench.models import shell

NEAR = 1e-4
"""Of the largest logit, in fp32: folded, two-path and PEFT sum in other orders, each some 1e-5 off at most."""
ROWS = 32
"""Answers in one forward."""


@torch.inference_mode()
def right(
    base: LlamaForCausalLM, folder: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[bool]:
    """For each prompt: whether `answers` has what the adapter in `folder` says to it. All prompts are of one length,
    and so are all answers. `base` stays as it is.
    """
    model = PeftModel.from_pretrained(shell(base), str(folder), autocast_adapter_dtype=False).eval()
    found: list[bool] = []
    for start in range(0, len(prompts), ROWS):
        pairs = list(zip(prompts, answers, strict=True))[start : start + ROWS]
        ids_RT = torch.tensor([[*prompt, *answer] for prompt, answer in pairs], device=base.device)
        logits_RTV = model(input_ids=ids_RT, attention_mask=torch.ones_like(ids_RT)).logits
        found.extend(most_likely(logits_RTV, ids_RT, len(prompts[0])).tolist())
    return found


def most_likely(logits_RTV: Tensor, ids_RT: Tensor, prompt: int) -> Tensor:
    """For each row R: whether all tokens after the first `prompt` are the most likely ones after those before them."""
    logits_RAV, chosen_RA = logits_RTV[:, prompt - 1 : -1].float(), ids_RT[:, prompt:]
    reached_RA = logits_RAV.gather(-1, chosen_RA[..., None]).squeeze(-1)
    near_RA = NEAR * logits_RAV.abs().amax(-1)
    return (reached_RA >= logits_RAV.amax(-1) - near_RA).all(-1)
