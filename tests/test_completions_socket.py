"""Several completions of a prompt, penalties, and where answers end, through a real socket."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafold.client import Client, ServerError
from lorafold.demo.reference import Reference
from lorafold.demo.tasks import held_out
from lorafold.v1 import generation_pb2 as pb
from tests.conftest import RunningServer, wait_until_idle

EVERYTHING: dict[str, Any] = {
    "temperature": 60.0,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "seed": 11,
    "max_tokens": 30,
    "stop": ["\0"],
    "logprobs": 3,
    "ignore_eos": True,
    "deployment": "rot13",
}


def test_n_completions_each_have_their_own_draws(client: Client) -> None:
    answer = client.generate("abcdef", n=5, **EVERYTHING)
    everybody = [answer, *answer.others]
    assert [item.index for item in everybody] == [0, 1, 2, 3, 4]
    assert len({tuple(item.token_ids) for item in everybody}) == 5
    for item in everybody:
        assert (item.started.seed, item.started.request_id) == (11, answer.started.request_id)
        assert item.finish_reason == "length"
        assert item.finished.completion_tokens == len(item.token_ids) == len(item.logprobs) == 30
        assert item.finished.answered_by.deployment == "rot13"


def test_a_completion_is_the_same_whatever_n_is_and_whoever_else_runs(client: Client) -> None:
    alone = client.generate("abcdef", **EVERYTHING)
    with ThreadPoolExecutor(8) as pool:
        crowd = [pool.submit(client.generate, prompt, n=2, temperature=9.0) for prompt in held_out(6)]
        three = pool.submit(client.generate, "abcdef", n=3, **EVERYTHING).result()
        assert all(other.result().token_ids for other in crowd)
    assert three.token_ids == alone.token_ids
    two = client.generate("abcdef", n=2, **EVERYTHING)
    assert two.others[0].token_ids == three.others[0].token_ids != alone.token_ids


def test_a_stream_of_completions_says_what_the_whole_answer_says(client: Client) -> None:
    whole = client.generate("abcdef", n=3, **EVERYTHING)
    stream = client.stream("abcdef", n=3, **EVERYTHING)
    text = ["", "", ""]
    for index, piece in stream.pieces():
        text[index] += piece
    everybody = [stream.answer, *stream.answer.others]
    assert text == [item.text for item in everybody] == [item.text for item in (whole, *whole.others)]
    assert [item.token_ids for item in everybody] == [item.token_ids for item in (whole, *whole.others)]
    assert [item.logprobs for item in everybody] == [item.logprobs for item in (whole, *whole.others)]
    assert "".join(client.stream("abcdef", n=3, **EVERYTHING)) == whole.text


def test_a_stream_tells_each_completion_from_start_to_finish(client: Client) -> None:
    sampling = pb.Sampling(temperature=60.0, seed=1)
    spec = pb.GenerationSpec(text="abcdef", n=4, sampling=sampling, max_tokens=6, ignore_eos=True)
    told: dict[int, list[str]] = {}
    for event in client.stubs.generation.StreamGenerate(pb.StreamGenerateRequest(spec=spec)):
        told.setdefault(event.index, []).append(event.WhichOneof("event") or "")
    assert sorted(told) == [0, 1, 2, 3]
    for kinds in told.values():
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert {*kinds[1:-1]} == {"delta"}


def test_cancelling_ends_every_completion(server: RunningServer, client: Client) -> None:
    stream = client.stream("abc", n=16, temperature=90.0, seed=1, max_tokens=400, ignore_eos=True)
    pieces = stream.pieces()
    assert len({next(pieces)[0] for _ in range(40)}) > 1
    stream.cancel()
    wait_until_idle(server)


def test_more_completions_than_the_queue_holds_are_refused_whole(server: RunningServer, client: Client) -> None:
    scheduler = server.app.parts.engine._scheduler
    most = scheduler.max_batch, scheduler._max_waiting
    scheduler.max_batch, scheduler._max_waiting = 1, 2
    try:
        with pytest.raises(ServerError) as caught:
            client.generate("abc", n=4, temperature=1.0)
        assert (caught.value.code, caught.value.field) == ("INVALID_ARGUMENT", "spec.n")
        assert "ask for 3" in str(caught.value)
        assert caught.value.retry_after is None
        assert client.generate("abc", n=3, temperature=1.0).others
        running = client.stream("abc", max_tokens=400, ignore_eos=True)
        next(running.pieces())
        with pytest.raises(ServerError) as caught:
            client.generate("abc", n=3, temperature=1.0)
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert caught.value.retry_after == 1.0
        running.cancel()
    finally:
        scheduler.max_batch, scheduler._max_waiting = most
    wait_until_idle(server)


def test_a_stop_token_ends_an_answer_and_is_its_last_id(client: Client, reference: Reference) -> None:
    d = reference.tokenizer("d", add_special_tokens=False).input_ids[0]
    answer = client.generate("abcdef", stop_token_ids=[d])
    assert (answer.text, answer.finish_reason, answer.finished.stop_token_id) == ("abc", "stop_token", d)
    assert answer.token_ids[-1] == d
    held_back = client.generate("abcdef", stop_token_ids=[d], stop=["cz"])
    assert (held_back.text, held_back.finish_reason) == ("abc", "stop_token")
    untouched = client.generate("abc", stop_token_ids=[d])
    assert (untouched.text, untouched.finish_reason) == ("abc", "end_of_sequence")
    assert not untouched.finished.HasField("stop_token_id")


def test_an_ignored_end_of_sequence_is_a_token_like_any_other(client: Client) -> None:
    ended = client.generate("abc")
    end = ended.token_ids[-1]
    going = client.generate("abc", ignore_eos=True, max_tokens=20)
    assert going.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert (len(going.token_ids), going.finish_reason) == (20, "length")
    assert going.text.startswith("abc")
    stopped = client.generate("abc", ignore_eos=True, stop_token_ids=[end])
    assert (stopped.token_ids, stopped.finish_reason) == (ended.token_ids, "stop_token")


def test_penalties_change_a_greedy_answer_as_transformers_would(client: Client, reference: Reference) -> None:
    prompt = "abcabcabc"
    ids = reference.tokenizer(prompt, return_tensors="pt")
    out = reference._model("").generate(**ids, do_sample=False, max_new_tokens=12, repetition_penalty=9.0)
    expected = out[0, ids["input_ids"].shape[1] :].tolist()
    assert client.generate(prompt, repetition_penalty=9.0, max_tokens=12).token_ids == expected
    assert client.generate(prompt, max_tokens=12).token_ids != expected
