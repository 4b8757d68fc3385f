"""Choosing tokens. Oracles: transformers' logits processors, and a plain choice in exact fractions, written here."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.engine.sampling import Pick, sample
from lorafold.engine.sampling_state import SamplingState
from tests.models import DEVICES
from tests.sampling_rows import logits, state, tokens, warped
from tests.tolerances import CHI_SQUARE

OPTIONS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 4.0]), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
    },
)
ANSWERS = st.lists(st.integers(0, 39), max_size=12)
ROWS = st.lists(st.builds(lambda answer, options: state(answer, **options), ANSWERS, OPTIONS), min_size=1, max_size=6)


def plain(logits_V: Tensor, row: SamplingState) -> int:
    """One row by the definitions: a loop over tokens, and exact fractions from the fp32 weights on."""
    given, answer = row.sampling, row.tokens[row.prompt :]
    values = [torch.tensor(value) for value in logits_V.tolist()]
    for token in {*row.tokens} if given.penalised else ():
        value, factor = values[token], torch.tensor(given.repetition_penalty)
        value = value * factor if value < 0 else value / factor
        off = torch.tensor(given.frequency_penalty) * answer.count(token)
        values[token] = value - (torch.tensor(given.presence_penalty) * (token in answer) + off)
    if given.greedy:
        return values.index(max(values))
    scaled = (torch.stack(values) - max(values)) / (given.temperature * math.log(2.0))
    weights = [Fraction(float(weight)) for weight in scaled.exp2()]
    kept = {token for token, weight in enumerate(weights) if sum(other > weight for other in weights) < given.top_k}
    kept = kept or {*range(len(weights))}
    total = sum(weights[token] for token in kept)

    def above(weight: Fraction) -> Fraction:
        return Fraction(sum(weights[token] for token in kept if weights[token] > weight))

    nucleus = {token for token in kept if above(weights[token]) < Fraction(given.top_p) * total}
    nucleus = {token for token in nucleus if float(weights[token]) >= torch.tensor(given.min_p)}
    point = Fraction(row.uniform()) * sum(weights[token] for token in nucleus)
    for token in sorted(nucleus):
        point -= weights[token]
        if point < 0:
            return token
    raise AssertionError("a point beyond the total")


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(0, 10**6))
def test_a_batch_is_chosen_as_each_row_by_the_definitions(rows: list[SamplingState], seed: int) -> None:
    values = logits(len(rows), seed)
    assert tokens(values, rows) == [plain(values[row], given) for row, given in enumerate(rows)]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 10**6), st.sampled_from([40, 300, 5000]))
def test_a_row_alone_and_in_a_batch_is_the_same(rows: list[SamplingState], seed: int, vocabulary: int) -> None:
    values = logits(len(rows), seed, vocabulary)
    together = tokens(values, rows)
    assert together == [tokens(values[row : row + 1], [given])[0] for row, given in enumerate(rows)]
    assert together[::-1] == tokens(values.flip(0), rows[::-1])


def test_equally_likely_tokens_are_drawn_alike_alone_and_in_a_batch() -> None:
    values = (logits(8, 3, 3000) * 2).round() / 2  # As coarse as a low precision makes them: hundreds of ties.
    rows = [state(temperature=1.5, top_k=7 * row + 1, top_p=0.9, seed=row) for row in range(8)]
    alone = [tokens(values[row : row + 1], [given])[0] for row, given in enumerate(rows)]
    assert tokens(values, rows) == alone
    assert len({*alone}) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_chooses_the_same_tokens(device: str) -> None:
    values = logits(6, 1, 3000)
    rows = [
        state((1, 2, 2), temperature=temperature, top_k=top_k, top_p=top_p, frequency_penalty=0.5, seed=7)
        for temperature, top_k, top_p in [(0, 0, 1), (1, 0, 1), (1, 9, 1), (2, 0, 0.9), (1, 900, 1), (3, 900, 0.5)]
    ]
    assert tokens(values.to(device), rows) == tokens(values, rows)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.2},
    ],
)
def test_frequencies_are_those_of_transformers(sampling: dict[str, Any]) -> None:
    """Chi-square over positions of one seed, indices of one request, and seeds."""
    values = logits()
    probabilities = warped(values, **sampling).softmax(-1)[0].tolist()
    draws = 4000
    rows = {
        "position": [state([0] * place, seed=1, **sampling) for place in range(draws)],
        "index": [state(index=index, seed=1, **sampling) for index in range(draws)],
        "seed": [state(seed=seed, **sampling) for seed in range(draws)],
    }
    likely = [token for token, probability in enumerate(probabilities) if probability * draws >= 5]
    for name, drawing in rows.items():
        counts = Counter(tokens(values.expand(draws, -1), drawing))
        assert all(probabilities[token] > 0 for token in counts if token is not None)
        expected = {token: draws * probabilities[token] for token in likely}
        chi = sum((counts[token] - count) ** 2 / count for token, count in expected.items())
        freedom = max(len(likely) - 1, 1)
        assert chi < freedom + CHI_SQUARE * math.sqrt(2 * freedom), name
    flat = sum((counts[token] - draws / len(likely)) ** 2 / (draws / len(likely)) for token in likely)
    assert flat > freedom + CHI_SQUARE * math.sqrt(2 * freedom)  # Negative control: they are not equally likely.


def test_draws_differ_by_seed_index_and_position_and_by_nothing_else() -> None:
    one = state((1, 2), temperature=1.0, seed=5, index=1)
    same = state((7, 8), temperature=2.0, seed=5, index=1, top_k=3)
    assert one.uniform() == same.uniform()
    others = [
        state((1, 2), seed=6, index=1),
        state((1, 2), seed=5, index=2),
        state((1,), seed=5, index=1),
        state((1, 2), seed=2**64 - 1, index=1),
    ]
    assert len({row.uniform() for row in (one, *others)}) == 5
    assert all(0.0 <= row.uniform() < 1.0 for row in others)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100.0])
def test_extreme_temperatures_stay_numbers(temperature: float) -> None:
    values = logits()
    token = tokens(values, [state(temperature=temperature)])[0]
    assert token is not None
    if temperature < 1:
        assert token == int(values.argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"repetition_penalty": 1.1}]
)
def test_a_row_that_is_no_numbers_fails_alone(bad: float, sampling: dict[str, Any]) -> None:
    values = logits(3, vocabulary=900)
    expected = tokens(values, [state(logprobs=1, **sampling)] * 3)
    values[1, 7] = bad
    picks = sample(values, [state(logprobs=1, **sampling)] * 3).read()
    assert picks[1] == Pick(None)
    assert [picks[0].token, picks[2].token] == [expected[0], expected[2]]
    assert picks[2].logprobs is not None


@pytest.mark.parametrize("planted", [{"temperature": "warm"}, {"temperature": 1.0, "top_p": None}, {"seed": -1}])
def test_a_row_whose_settings_raise_fails_alone(planted: dict[str, Any]) -> None:
    values = logits(4, vocabulary=900)
    good = [state((1,), temperature=1.0, top_k=9, seed=row, logprobs=2, presence_penalty=1.0) for row in range(3)]
    expected = sample(values[[0, 2, 3]], good).read()
    picks = sample(values, [good[0], state(**{"temperature": 1.0, **planted}), *good[1:]]).read()
    assert [picks[0], *picks[2:]] == expected
    assert picks[1].token is None
    assert isinstance(picks[1].fault, Exception)


def test_logits_with_minus_infinity_are_never_drawn() -> None:
    values = logits(1)
    values[0, 1:] = -math.inf
    assert {*tokens(values.expand(50, -1), [state(temperature=9.0, seed=seed) for seed in range(50)])} == {0}


def test_logprobs_are_the_models_own() -> None:
    """Oracle: log_softmax of the logits as they came, whatever the row's penalties and cuts."""
    values = logits(4)
    rows = [
        state((1, 1), logprobs=3, temperature=0.5, top_k=2, frequency_penalty=2.0),
        state(),
        state(logprobs=0),
        state(logprobs=20),
    ]
    picks = sample(values, rows).read()
    expected = values.log_softmax(-1)
    assert picks[1].logprobs is None
    for row, count in ((0, 3), (2, 0), (3, 20)):
        told = picks[row].logprobs
        assert told is not None
        assert told.token_id == picks[row].token
        assert told.logprob == pytest.approx(float(expected[row, told.token_id]))
        top = expected[row].topk(count)
        assert [token for token, _ in told.top] == top.indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(top.values.tolist())
    assert sample(values, [state()] * 4).read()[0].logprobs is None
