"""Rows to choose tokens for, and transformers' own warpers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorafold.engine.sampling import sample
from lorafold.engine.sampling_state import SamplingState
from lorafold.requests import Sampling

PROMPT = (3, 5, 5, 9)


def state(answer: Sequence[int] = (), *, index: int = 0, logprobs: int | None = None, **sampling: Any) -> SamplingState:
    return SamplingState(Sampling(**sampling), [*PROMPT, *answer], len(PROMPT), index, logprobs)


def logits(rows: int = 1, seed: int = 0, vocabulary: int = 40, device: str = "cpu") -> Tensor:
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2).to(device)


def tokens(logits_SV: Tensor, rows: Sequence[SamplingState]) -> list[int | None]:
    return [pick.token for pick in sample(logits_SV, rows).read()]


def warped(logits_SV: Tensor, *, temperature: float, **cuts: Any) -> Tensor:
    """The logits after transformers' own warpers, in its own order."""
    warpers: dict[str, Callable[[Any], LogitsProcessor]] = {
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    chain = [TemperatureLogitsWarper(temperature), *(warpers[name](value) for name, value in cuts.items())]
    for warper in chain:
        logits_SV = warper(None, logits_SV)
    return logits_SV
