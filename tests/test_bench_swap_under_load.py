"""What `bench.swap_under_load` counts: pauses between steps, and answers of other adapters. No server runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.alone import most_likely, right
from bench.judging import judge, reasons
from bench.load import Reply
from bench.low_rank import write_low_rank
from bench.models import shaped
from bench.pauses import Pause, Timeline, over_fold_time
from bench.swap_under_load import POLICIES, PROMPTS, STREAMS, load_of

CPU = torch.device("cpu")


def test_a_pause_is_from_the_end_of_a_step_to_the_begin_of_the_next() -> None:
    timeline = Timeline()
    timeline.step(10.0, 1.0)
    timeline.step(12.5, 2.0)
    assert timeline.pauses == [Pause(seconds=0.5)]


def test_a_change_belongs_to_the_pause_in_which_it_ends_and_to_no_other() -> None:
    timeline = Timeline()
    timeline.step(1.0, 1.0)
    timeline.change(0.2, folds=True)
    timeline.change(0.3, folds=True)
    timeline.step(2.5, 1.0)
    timeline.step(3.5, 1.0)
    assert timeline.pauses == [Pause(seconds=0.5, changing=0.5), Pause(seconds=0.0)]
    assert timeline.changes == [0.2, 0.3]


def test_decoding_does_not_stand_still_while_nobody_asks() -> None:
    timeline = Timeline()
    timeline.step(1.0, 1.0)
    timeline.idle()
    timeline.change(0.2, folds=True)
    timeline.step(100.0, 1.0)
    timeline.step(101.5, 1.0)
    assert timeline.pauses == [Pause(seconds=0.5)]


def test_pauses_are_weighed_with_the_changes_in_them() -> None:
    timelines = [Timeline(), Timeline()]
    for timeline, change in zip(timelines, (0.1, 0.3), strict=True):
        timeline.step(0.0, 0.0)
        timeline.change(change, folds=True)
        timeline.step(change + 0.1, 0.0)
        timeline.step(change + 0.15, 0.0)
        timeline.change(0.01, folds=False)
    found = over_fold_time(timelines)
    assert found["longest"] == pytest.approx(0.2 / 0.1)
    assert found["median"] == pytest.approx((0.2 / 0.1 + 0.4 / 0.3) / 2, abs=1e-3)
    assert found["longest_over_median_fold"] == pytest.approx(0.4 / 0.2)
    assert found["p99_of_others"] == pytest.approx(0.05 / 0.2)


def test_pauses_without_a_fold_anywhere_are_not_weighed() -> None:
    with pytest.raises(ValueError, match="ever folded"):
        over_fold_time([Timeline()])


def test_every_deployment_has_as_many_streams_and_asks_every_prompt() -> None:
    load = load_of(100, [Path("a")], seconds=1)
    assert len(load.streams) == STREAMS
    for number, asked in enumerate(load.streams):
        assert {deployment for deployment, _ in asked} == {list(POLICIES)[number % len(POLICIES)]}
        assert {prompt for _, prompt in asked} == set(range(PROMPTS))


def test_a_token_that_is_as_likely_but_for_rounding_is_right_and_a_less_likely_one_is_not() -> None:
    logits = torch.tensor([[[1.0, 2.0, 2.00001], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    answers = {(1, 0): True, (2, 0): True, (0, 0): False, (2, 1): False}
    for answer, expected in answers.items():
        assert most_likely(logits, torch.tensor([[0, *answer]]), prompt=1).tolist() == [expected]


PROMPT = [list(range(8)), list(range(20, 28))]


def folded_answer(folder: Path, prompt: list[int]) -> list[int]:
    """Greedy, with the adapter added to the weights by hand."""
    from safetensors.torch import load_file

    model = shaped("tiny", CPU, torch.float32)
    factors = load_file(folder / "adapter_model.safetensors")
    for name, module in model.named_modules():
        if (key := f"base_model.model.{name}.lora_A.weight") in factors:
            module.get_parameter("weight").data += factors[key.replace("_A.", "_B.")] @ factors[key]
    ids = list(prompt)
    for _ in range(16):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, scratch = shaped("tiny", CPU, torch.float32), tmp_path_factory.mktemp("adapters")
    return {name: write_low_rank(model, scratch / name, seed, 4) for seed, name in enumerate("ab")}


def test_an_answer_is_right_for_its_adapter_and_for_no_other(folders: dict[str, Path]) -> None:
    base = shaped("tiny", CPU, torch.float32)
    answers = [folded_answer(folders["a"], prompt) for prompt in PROMPT]
    assert right(base, folders["a"], PROMPT, answers) == [True, True]
    assert right(base, folders["b"], PROMPT, answers) == [False, False]
    assert right(base, folders["a"], PROMPT, [answers[0], [*answers[1][:-1], answers[1][-1] ^ 1]]) == [True, False]


def test_wrong_and_lost_answers_are_counted_apart(folders: dict[str, Path]) -> None:
    base = shaped("tiny", CPU, torch.float32)
    good = Reply(deployment="x", prompt=0, digest="a", tokens=folded_answer(folders["a"], PROMPT[0]))
    replies = [good, good, replace(good, digest="b"), replace(good, digest="?"), replace(good, tokens=[], lost="gone")]
    verdict = judge(base, folders, PROMPT, replies)
    assert (verdict.requests, verdict.judged, verdict.wrong, verdict.lost) == (5, 4, 2, 1)
    assert reasons(replies) == ["gone"]
    assert judge(base, folders, PROMPT, [good]).told_apart == 1.0
