"""What the cache shares and takes back, seen from outside: answers stay those of `generate()`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorafold.engine.rows import Part
from lorafold.requests import Delta, Finished, Sampling
from lorafold_adapters.policy import Plan, PolicyKind
from tests.engines import PAGE, Bench
from tests.models import KINDS, prompts, tiny_llama
from tests.test_parity import family, generated

MakeAdapter = Callable[..., Path]


def parts_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every part that reads a prompt, as they are scheduled."""
    read: list[int] = []
    real = bench.scheduler.schedule

    def schedule(plan: Plan) -> list[Part]:
        parts = real(plan)
        read.extend(part.tokens for part in parts if not part.decodes)
        return parts

    monkeypatch.setattr(bench.scheduler, "schedule", schedule)
    return read


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
def test_sequences_that_outgrow_the_cache_give_way_and_end_as_if_alone(name: str) -> None:
    asked = [prompts(1, 20 + index, seed=index)[0].tolist() for index in range(6)]
    expected = [generated(family(name, "cpu"), prompt, 50) for prompt in asked]
    with Bench(family(name, "cpu"), slots=6, pages=1 + 14) as bench:
        rows = bench.scheduler
        answers = [bench.submit(str(index), prompt, 50) for index, prompt in enumerate(asked)]
        for answer in answers:
            assert isinstance(answer.last, Finished)
        assert bench.engine.call(lambda: rows.preemptions).result(60) > 0
        assert bench.engine.call(lambda: rows.pool.available).result(60) == 14
    assert [answer.tokens for answer in answers] == expected


def test_a_prefix_is_read_once_and_a_longer_prompt_goes_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = prompts(1, 100)[0].tolist()
    longer = start + prompts(1, 30, seed=5)[0].tolist()
    with Bench(tiny_llama(), prefill=1000) as bench:
        read = parts_read(bench, monkeypatch)
        for name, prompt in (("cold", start), ("warm", start), ("longer", longer)):
            answer = bench.submit(name, prompt, 20)
            assert isinstance(answer.last, Finished)
            assert answer.tokens == generated(tiny_llama(), prompt, 20)
    known = 100 // PAGE * PAGE
    assert read == [100, 100 - known, 130 - known]


def test_an_answer_is_a_known_prefix_of_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(1, 40)[0].tolist()
    with Bench(tiny_llama(), prefill=1000) as bench:
        read = parts_read(bench, monkeypatch)
        first = bench.submit("first", prompt, 40)
        assert isinstance(first.last, Finished)
        turn = [*prompt, *first.tokens, 3]
        second = bench.submit("second", turn, 10)
        assert isinstance(second.last, Finished)
    assert read == [40, 81 - 79 // PAGE * PAGE]
    assert second.tokens == generated(tiny_llama(), turn, 10)


def test_no_prefix_is_shared_between_adapters_nor_lost_by_a_fold(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts(1, 64)[0].tolist()
    folders = [adapter_on_llama(seed=seed, **KINDS["plain"]) for seed in (1, 2)]
    oracles: list[Any] = [PeftModel.from_pretrained(tiny_llama(), str(folder)).eval() for folder in folders]
    expected = [generated(tiny_llama(), prompt, 12), *(generated(oracle, prompt, 12) for oracle in oracles)]
    with Bench(tiny_llama(), prefill=1000) as bench:
        read = parts_read(bench, monkeypatch)
        digests = [None, *(bench.load(folder) for folder in folders)]
        for policy in (PolicyKind.UNMERGED, PolicyKind.MERGED):
            for index, digest in enumerate(digests):
                answer = bench.submit(f"{policy}{index}", prompt, 12, adapter=digest, policy=policy)
                assert isinstance(answer.last, Finished)
                assert answer.tokens == expected[index]
    assert read == [64, 64, 64, 16, 16, 16]
    assert len({tuple(tokens) for tokens in expected}) == 3  # Negative control: a mix-up would show.


def test_completions_of_one_prompt_share_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(1, 70)[0].tolist()
    seeded = Sampling(temperature=1.0, seed=3)
    with Bench(tiny_llama(), prefill=1000) as bench:
        read = parts_read(bench, monkeypatch)
        several = bench.submit("several", prompt, 12, sampling=seeded, n=4)
        assert isinstance(several.last, Finished)
        alone = bench.submit("alone", prompt, 12, sampling=seeded)
        assert isinstance(alone.last, Finished)
    assert read == [70, 6, 6, 6, 6]
    deltas = [event for event in several.events if isinstance(event, Delta)]
    tokens = [[event.token_id for event in deltas if event.index == index] for index in range(4)]
    assert tokens[0] == alone.tokens
    assert len({tuple(each) for each in tokens}) == 4


def test_a_reloaded_base_knows_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(1, 64)[0].tolist()
    with Bench(tiny_llama(), prefill=1000) as bench:
        read = parts_read(bench, monkeypatch)
        with torch.no_grad():
            weight = bench.model.model.layers[0].mlp.up_proj.weight
            right = weight.clone()
            weight.mul_(2)
        wrong = bench.submit("on a damaged base", prompt, 12)
        assert isinstance(wrong.last, Finished)
        assert bench.engine.call(bench.engine.weights.verify).result(60).mismatched
        answer = bench.submit("after the reload", prompt, 12)
        assert isinstance(answer.last, Finished)
        assert torch.equal(weight, right)
    assert read == [64, 64]
    assert answer.tokens == generated(tiny_llama(), prompt, 12)
    assert wrong.tokens != answer.tokens
