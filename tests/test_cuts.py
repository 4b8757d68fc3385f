"""Penalties and cuts, and the largest logit. Oracles: transformers' logits processors, and the definitions, counted."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from lorafold.engine.cuts import candidates, least_weights
from lorafold.engine.largest import largest
from lorafold.requests import Sampling
from tests.sampling_rows import PROMPT, logits, state, tokens, warped
from tests.tolerances import NUCLEUS


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 300, 70_000, 65_536 + 255])
def test_greedy_is_the_first_of_the_largest_logits(vocabulary: int) -> None:
    values = logits(3, 5, vocabulary).round()
    values[2, vocabulary // 2] = math.nan
    value_S, place_S = largest(values)
    assert place_S[:2].tolist() == [row.index(max(row)) for row in values[:2].tolist()]
    assert value_S[:2].tolist() == values[:2].amax(-1).tolist()
    assert math.isnan(value_S[2])
    assert tokens(values, [state()] * 3)[2] is None


CUTS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 400},
    {"top_k": 2000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.99},
    {"top_p": 0.9999},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 600, "top_p": 0.7},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("cut", CUTS)
def test_the_kept_tokens_are_those_of_transformers(cut: dict[str, Any], temperature: float) -> None:
    values = logits(4, 2, 3000)
    theirs = warped(values, temperature=temperature, **cut).isfinite()
    weights = ((values - values.amax(-1, keepdim=True)) / temperature).exp()
    cuts = [Sampling(temperature=temperature, **cut)] * 4
    ours = weights >= least_weights(weights, cuts)[:, None]
    # Cumulative sums in fp32 may end a nucleus a token earlier or later: that token has next to no probability.
    assert float((weights * (ours != theirs)).sum() / weights.sum()) < NUCLEUS
    assert 0 < int(ours.sum()) < ours.numel()
    few = candidates(weights, cuts)
    assert torch.equal(few.least_D[few.enough_D], least_weights(weights, cuts)[few.enough_D])


def test_a_few_candidates_are_enough_for_a_peaked_row_and_not_for_a_flat_one() -> None:
    values = logits(2, 4, 3000)
    weights = (values - values.amax(-1, keepdim=True)) * torch.tensor([[4.0], [0.01]])
    few = candidates(weights.exp(), [Sampling(temperature=1.0, top_p=0.9)] * 2)
    assert few.enough_D.tolist() == [True, False]


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    values = logits(2)
    answers = [(1, 2, 2), (39,)]
    ids = [torch.tensor([[*PROMPT, *answer]]) for answer in answers]
    penalise = RepetitionPenaltyLogitsProcessor(penalty)
    rows = [state(answer, repetition_penalty=penalty) for answer in answers]
    expected = [int(penalise(ids[row], values[row : row + 1].clone()).argmax()) for row in range(2)]
    assert tokens(values, rows) == expected


def test_penalties_follow_an_answer_that_grows() -> None:
    """Oracle: the definition of OpenAI's API, counted anew at each step. Prompt tokens are not counted."""
    values = logits(1, 6)
    row = state(presence_penalty=0.4, frequency_penalty=0.9)
    counts: Counter[int] = Counter()
    said = []
    for _ in range(30):
        lowered = [
            value - 0.4 * (counts[token] > 0) - 0.9 * counts[token] for token, value in enumerate(values[0].tolist())
        ]
        token = tokens(values, [row])[0]
        assert token == lowered.index(max(lowered))
        row.tokens.append(token)
        counts[token] += 1
        said.append(token)
    assert len({*said}) > 3
    assert {int(values.argmax())} == {*tokens(values, [state()])}  # Negative control: no penalty, no change.
