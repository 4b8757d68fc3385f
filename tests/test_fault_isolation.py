"""A fault in one completion's sampling or text ends its request alone. The fault is planted; everything else is real.

Oracle for the neighbours: what the same requests give where nobody fails.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafold.client import Client, ServerError
from lorafold.engine.sampling_state import SamplingState
from lorafold.errors import StepFailed
from lorafold.requests import Failed, Finished, Sampling
from tests.conftest import RunningServer, wait_until_idle
from tests.engines import Bench, Collected
from tests.models import prompts, tiny_llama

PROMPTS: list[list[int]] = prompts(3, 8).tolist()
BAD: list[int] = prompts(1, 8, seed=8)[0].tolist()
DRAWN = Sampling(temperature=1.5, top_k=30, top_p=0.9, frequency_penalty=0.3, seed=4)


def good_ones(bench: Bench) -> list[Collected]:
    samplings = [DRAWN, Sampling(), Sampling(temperature=1.0, min_p=0.01, seed=9)]
    return [
        bench.submit(str(place), prompt, 40, sampling=sampling, logprobs=2, stop=("y",))
        for place, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))
    ]


def undisturbed() -> list[list[int]]:
    with Bench(tiny_llama()) as bench:
        answers = good_ones(bench)
        assert all(isinstance(answer.last, Finished) for answer in answers)
        return [answer.tokens for answer in answers]


def assert_failed_alone(bench: Bench, bad: Collected, answers: list[Collected], said: str) -> None:
    last = bad.last
    assert isinstance(last, Failed)
    assert isinstance(last.error, StepFailed)
    assert said in str(last.error)
    assert all(isinstance(answer.last, Finished) for answer in answers)
    assert [answer.tokens for answer in answers] == undisturbed()
    assert bench.engine.call(lambda: bench.scheduler.rows).result(30) == ()


@pytest.mark.parametrize(
    "planted", [{"temperature": "warm"}, {"temperature": 1.0, "min_p": None}, {"repetition_penalty": "much"}]
)
def test_settings_that_raise_fail_their_request_alone(planted: dict[str, Any]) -> None:
    with Bench(tiny_llama()) as bench:
        answers = good_ones(bench)
        bad = bench.submit("bad", BAD, 40, sampling=Sampling(**planted))
        assert_failed_alone(bench, bad, answers, "could not be continued")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_detokeniser_that_raises_fails_its_request_alone(overlap: bool) -> None:
    with Bench(tiny_llama()) as bench:
        answer = bench.submit("good", BAD, 40)
        assert isinstance(answer.last, Finished)

    def decode(ids: Sequence[int]) -> str:
        if list(ids) == answer.tokens[1:3]:
            raise UnicodeError("planted")
        return "x" * len(ids)

    with Bench(tiny_llama(), overlap=overlap, decode=decode) as bench:
        answers = good_ones(bench)
        bad = bench.submit("bad", BAD, 40)
        assert_failed_alone(bench, bad, answers, "planted")


def test_a_request_that_cannot_be_started_fails_alone() -> None:
    with Bench(tiny_llama()) as bench:
        answers = good_ones(bench)
        bad = bench.submit("bad", BAD, 40, stop=7)
        assert_failed_alone(bench, bad, answers, "could not be started")


def test_a_completion_that_fails_fails_its_request_and_ends_the_others(
    server: RunningServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"temperature": 40.0, "max_tokens": 60, "ignore_eos": True}
    expected = client.generate("abcdef", n=2, seed=5, **options)
    real = SamplingState.uniform

    def uniform(state: SamplingState) -> float:
        if (state.sampling.seed, state.index) == (666, 1) and len(state.tokens) > 12:
            raise ArithmeticError("planted")
        return real(state)

    monkeypatch.setattr(SamplingState, "uniform", uniform)
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(client.generate, "abcdef", n=2, seed=5, **options)
        with pytest.raises(ServerError, match="planted") as caught:
            client.generate("abcdef", n=3, seed=666, **{**options, "max_tokens": 400})
        answer = neighbour.result()
    assert (caught.value.code, caught.value.reason) == ("INTERNAL", "STEP_FAILED")
    assert answer.token_ids == expected.token_ids
    assert answer.others[0].token_ids == expected.others[0].token_ids
    wait_until_idle(server)
