"""Logits to token ids, per request: greedy, or temperature, top-k, top-p and a draw of the request's own generator.

A row's draw depends on its own logits and seed alone, so its neighbours in the batch cannot change it.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.requests import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Choice:
    """How to choose from one row of logits."""

    sampling: Sampling
    rng: random.Random
    logprobs: int | None


def choose(logits_BV: Tensor, choices: list[Choice]) -> list[int | None]:
    """One token id per row; None where the model's logits are not numbers."""
    greedy = logits_BV.argmax(dim=-1).tolist()
    broken = torch.isnan(logits_BV).any(dim=-1).tolist()
    return [
        None if broken[row] else greedy[row] if choice.sampling.greedy else draw(logits_BV[row], choice)
        for row, choice in enumerate(choices)
    ]


def draw(logits_V: Tensor, choice: Choice) -> int:
    """Inverse-CDF sampling in float64 from the cut distribution; one number from `choice.rng` per call."""
    sampling = choice.sampling
    logits = logits_V.double()
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(dim=-1)
    ids = None
    if sampling.top_k or sampling.top_p < 1.0:
        probabilities, ids = cut(probabilities, sampling)
    mass = probabilities.cumsum(dim=-1)
    point = choice.rng.random() * float(mass[-1])
    index = min(int(torch.searchsorted(mass, point, right=True)), mass.numel() - 1)
    return index if ids is None else int(ids[index])


def cut(probabilities_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The kept probabilities, largest first, and their token ids.

    top_p keeps the smallest set that reaches it (Holtzman et al. 2020), counted after top_k, as transformers does.
    """
    count = min(sampling.top_k or probabilities_V.numel(), probabilities_V.numel())
    kept, ids = probabilities_V.topk(count)
    before = kept.cumsum(dim=-1) - kept
    size = max(1, int((before < sampling.top_p * kept.sum()).sum()))
    return kept[:size], ids[:size]


def logprobs_of(logits_BV: Tensor, tokens: list[int | None], choices: list[Choice]) -> list[TokenLogprobs | None]:
    """For the rows that ask for them: log probabilities under the model itself, before temperature and cuts."""
    if all(choice.logprobs is None for choice in choices):
        return [None] * len(choices)
    return [
        None if token is None or choice.logprobs is None else report(logits_BV[row], token, choice.logprobs)
        for row, (token, choice) in enumerate(zip(tokens, choices, strict=True))
    ]


def report(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """The token's log probability and the `count` largest ones."""
    logprobs = logits_V.float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, logprobs.numel()))
    return TokenLogprobs(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
