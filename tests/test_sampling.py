"""Drawing tokens. Oracle for the cuts: transformers' logits processors."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorafold.engine.sampling import Choice, choose, logprobs_of
from lorafold.requests import Sampling


def choice(seed: int = 0, logprobs: int | None = None, **sampling: Any) -> Choice:
    return Choice(Sampling(seed=seed, **sampling), random.Random(seed), logprobs)


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_is_the_largest_logit() -> None:
    values = logits(5)
    assert choose(values, [choice() for _ in range(5)]) == values.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1.0, "top_p": 0.6}]
)
def test_frequencies_are_those_of_transformers(sampling: dict[str, Any]) -> None:
    values = logits()
    expected = TemperatureLogitsWarper(sampling["temperature"])(None, values)
    if "top_k" in sampling:
        expected = TopKLogitsWarper(int(sampling["top_k"]))(None, expected)
    if "top_p" in sampling:
        expected = TopPLogitsWarper(sampling["top_p"])(None, expected)
    probabilities = expected.softmax(-1)[0]
    one = choice(**sampling)
    draws = 6000
    counts = Counter(choose(values, [one])[0] for _ in range(draws))
    assert {token for token in counts if token is not None} <= set(probabilities.nonzero().flatten().tolist())
    for token, probability in enumerate(probabilities.tolist()):
        spread = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) < 5 * spread + 1


def test_a_draw_depends_on_its_own_seed_and_row_alone() -> None:
    values = logits(4)
    alone = choose(values[2:3], [choice(seed=5, temperature=1.0)])
    others = [choice(seed=seed, temperature=2.0) for seed in (1, 2, 3)]
    assert choose(values, [*others[:2], choice(seed=5, temperature=1.0), others[2]])[2] == alone[0]
    different = {choose(values[2:3], [choice(seed=seed, temperature=1.0)])[0] for seed in range(20)}
    assert len(different) > 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100.0])
def test_extreme_temperatures_stay_numbers(temperature: float) -> None:
    values = logits()
    token = choose(values, [choice(temperature=temperature)])[0]
    assert token is not None
    if temperature < 1:
        assert token == int(values.argmax())


def test_a_row_of_nan_fails_alone() -> None:
    values = logits(3)
    values[1, 7] = float("nan")
    tokens = choose(values, [choice(), choice(), choice(temperature=1.0)])
    assert tokens[1] is None
    assert None not in (tokens[0], tokens[2])


def test_logprobs_are_the_models_own() -> None:
    values = logits(2)
    choices = [choice(logprobs=3), choice()]
    reported = logprobs_of(values, [4, 5], choices)
    expected = values[0].log_softmax(-1)
    assert reported[1] is None
    assert reported[0] is not None
    assert reported[0].logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in reported[0].top] == expected.topk(3).indices.tolist()
