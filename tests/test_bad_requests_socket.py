"""Bad requests through a real socket: own status, a sentence with field and remedy, no cost, nobody disturbed."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lorafold.client import Client, ServerError, translated
from lorafold.demo.reference import Reference
from lorafold.v1 import deployment_pb2, weights_pb2
from lorafold.v1 import generation_pb2 as pb
from tests.conftest import DEMO, RunningServer

Spec = dict[str, Any]
INVALID = "INVALID_ARGUMENT"

# What is sent, the status, the field that is named, and words of the sentence.
CASES: dict[str, tuple[Spec, str, str, str]] = {
    "unknown deployment": ({"text": "a", "deployment": "nobody"}, "NOT_FOUND", "", "'nobody'"),
    "no prompt": ({}, INVALID, "spec.text", "set text, token_ids or messages"),
    "empty text": ({"text": ""}, INVALID, "spec.text", "empty"),
    "two prompts": ({"text": "a", "token_ids": [5]}, INVALID, "spec.token_ids", "contradict"),
    "three prompts": (
        {"text": "a", "token_ids": [5], "messages": [pb.ChatMessage(role="user", content="a")]},
        INVALID,
        "spec.token_ids",
        "contradict",
    ),
    "token beyond the vocabulary": ({"token_ids": [1, 68]}, INVALID, "spec.token_ids", "ids are 0 to 67"),
    "huge token": ({"token_ids": [2**62]}, INVALID, "spec.token_ids", "ids are 0 to 67"),
    "negative token": ({"token_ids": [-1]}, INVALID, "spec.token_ids", "ids are 0 to 67"),
    "prompt beyond the context": ({"text": "a" * 600}, INVALID, "spec.text", "send at most 511"),
    "max_tokens 0": ({"text": "a", "max_tokens": 0}, INVALID, "spec.max_tokens", "at least one"),
    "max_tokens beyond the context": ({"text": "a", "max_tokens": 600}, INVALID, "spec.max_tokens", "leave 509"),
    "temperature below 0": (
        {"text": "a", "sampling": pb.Sampling(temperature=-0.1)},
        INVALID,
        "spec.sampling.temperature",
        "-0.1",
    ),
    "temperature NaN": (
        {"text": "a", "sampling": pb.Sampling(temperature=math.nan)},
        INVALID,
        "spec.sampling.temperature",
        "nan",
    ),
    "temperature infinite": (
        {"text": "a", "sampling": pb.Sampling(temperature=math.inf)},
        INVALID,
        "spec.sampling.temperature",
        "inf",
    ),
    "top_p 0": (
        {"text": "a", "sampling": pb.Sampling(temperature=1, top_p=0)},
        INVALID,
        "spec.sampling.top_p",
        "more than 0",
    ),
    "top_p NaN": (
        {"text": "a", "sampling": pb.Sampling(temperature=1, top_p=math.nan)},
        INVALID,
        "spec.sampling.top_p",
        "nan",
    ),
    "min_p above 1": (
        {"text": "a", "sampling": pb.Sampling(temperature=1, min_p=1.5)},
        INVALID,
        "spec.sampling.min_p",
        "0 to 1",
    ),
    "min_p without temperature": (
        {"text": "a", "sampling": pb.Sampling(min_p=0.1)},
        INVALID,
        "spec.sampling.min_p",
        "no effect",
    ),
    "repetition_penalty 0": (
        {"text": "a", "sampling": pb.Sampling(repetition_penalty=0)},
        INVALID,
        "spec.sampling.repetition_penalty",
        "0.01 to 100",
    ),
    "repetition_penalty NaN": (
        {"text": "a", "sampling": pb.Sampling(repetition_penalty=math.nan)},
        INVALID,
        "spec.sampling.repetition_penalty",
        "nan",
    ),
    "presence_penalty too large": (
        {"text": "a", "sampling": pb.Sampling(presence_penalty=2.1)},
        INVALID,
        "spec.sampling.presence_penalty",
        "-2 to 2",
    ),
    "frequency_penalty infinite": (
        {"text": "a", "sampling": pb.Sampling(frequency_penalty=-math.inf)},
        INVALID,
        "spec.sampling.frequency_penalty",
        "-2 to 2",
    ),
    "no completions": ({"text": "a", "n": 0}, INVALID, "spec.n", "1 to 16"),
    "too many completions": (
        {"text": "a", "n": 17, "sampling": pb.Sampling(temperature=1)},
        INVALID,
        "spec.n",
        "1 to 16",
    ),
    "greedy completions": ({"text": "a", "n": 2}, INVALID, "spec.n", "all equal"),
    "stop token beyond the vocabulary": (
        {"text": "a", "stop_token_ids": [5, 68]},
        INVALID,
        "spec.stop_token_ids",
        "ids are 0 to 67",
    ),
    "negative stop token": ({"text": "a", "stop_token_ids": [-1]}, INVALID, "spec.stop_token_ids", "-1 is not"),
    "too many stop tokens": (
        {"text": "a", "stop_token_ids": [5] * 65},
        INVALID,
        "spec.stop_token_ids",
        "at most 64",
    ),
    "seed without temperature": (
        {"text": "a", "sampling": pb.Sampling(seed=3)},
        INVALID,
        "spec.sampling.seed",
        "no effect",
    ),
    "empty stop string": ({"text": "a", "stop": [""]}, INVALID, "spec.stop", "0 characters"),
    "too many stop strings": ({"text": "a", "stop": ["x"] * 17}, INVALID, "spec.stop", "at most 16"),
    "too many logprobs": ({"text": "a", "logprobs": 21}, INVALID, "spec.logprobs", "at most 20"),
    "message without a role": (
        {"messages": [pb.ChatMessage(content="a")]},
        INVALID,
        "spec.messages[0].role",
        "'user'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_request_is_refused_with_its_field_and_remedy(name: str, client: Client) -> None:
    spec, code, field, words = CASES[name]
    for call in (
        lambda: client.stubs.generation.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(**spec))),
        lambda: list(client.stubs.generation.StreamGenerate(pb.StreamGenerateRequest(spec=pb.GenerationSpec(**spec)))),
    ):
        with pytest.raises(ServerError) as caught, translated():
            call()
        assert (caught.value.code, caught.value.field) == (code, field)
        assert words in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert caught.value.reason


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (pb.GenerationSpec(text="a" * 10_000), "spec.text"),
        (pb.GenerationSpec(token_ids=[5] * 10_000), "spec.token_ids"),
        (pb.GenerationSpec(messages=[pb.ChatMessage()] * 10_000), "spec.messages"),
        (pb.GenerationSpec(messages=[pb.ChatMessage(role="user", content="a" * 10_000)]), "spec.messages"),
    ],
)
def test_what_can_never_fit_is_refused_unread(spec: pb.GenerationSpec, field: str, client: Client) -> None:
    with pytest.raises(ServerError, match="never fit") as caught, translated():
        client.stubs.generation.Generate(pb.GenerateRequest(spec=spec))
    assert (caught.value.code, caught.value.field) == (INVALID, field)


def test_a_long_input_does_not_hide_the_status(client: Client) -> None:
    with pytest.raises(ServerError) as caught:
        client.generate("a", deployment="n" * 6000)
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "DEPLOYMENT_NOT_FOUND")


def test_what_no_message_can_hold_is_refused_before_it_is_sent(client: Client) -> None:
    bad: list[Any] = [[("user",)], [1.5], [{"role": "user"}]]
    for prompt in bad:
        with pytest.raises(ServerError) as caught:
            client.generate(prompt)
        assert caught.value.code == INVALID
    assert client.generate("abcdef", stop="de").text == "abc"


def test_a_request_without_a_spec_is_refused(client: Client) -> None:
    with pytest.raises(ServerError, match="spec: is missing"), translated():
        client.stubs.generation.Generate(pb.GenerateRequest())


def test_a_field_this_server_does_not_know_is_refused(client: Client) -> None:
    spec = pb.GenerationSpec(text="a", sampling=pb.Sampling(temperature=1.0))
    spec.sampling.MergeFromString(bytes([0x98, 0x06, 0x01]))  # Field 99, a varint.
    with pytest.raises(ServerError, match=r"spec\.sampling: has field number 99") as caught, translated():
        client.stubs.generation.Generate(pb.GenerateRequest(spec=spec))
    assert caught.value.code == INVALID


def test_bytes_that_are_no_message_end_that_call_alone(server: RunningServer, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary("/lorafold.v1.GenerationService/Generate")
        with pytest.raises(grpc.RpcError):
            call(b"\xff\xff\xff")
    assert client.generate("abcdef").text == "abcdef"


def draining(**timeout: int) -> weights_pb2.MergeAdapterRequest:
    """A fold by hand with a timeout."""
    return weights_pb2.MergeAdapterRequest(deployment="upper", drain_timeout=Duration(**timeout))


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (
            lambda stubs: stubs.deployments.GetDeployment(deployment_pb2.GetDeploymentRequest(name="nobody")),
            "NOT_FOUND",
            "'nobody'",
        ),
        (
            lambda stubs: stubs.deployments.DeleteDeployment(deployment_pb2.DeleteDeploymentRequest(name="base")),
            "NOT_FOUND",
            "built in",
        ),
        (
            lambda stubs: stubs.deployments.CreateDeployment(deployment_pb2.CreateDeploymentRequest()),
            INVALID,
            "is missing",
        ),
        (
            lambda stubs: stubs.deployments.CreateDeployment(
                deployment_pb2.CreateDeploymentRequest(
                    deployment=deployment_pb2.Deployment(name="no spaces", adapter_path="x")
                )
            ),
            INVALID,
            "'no spaces'",
        ),
        (
            lambda stubs: stubs.deployments.CreateDeployment(
                deployment_pb2.CreateDeploymentRequest(
                    deployment=deployment_pb2.Deployment(name="base", adapter_path="x")
                )
            ),
            INVALID,
            "not 'base'",
        ),
        (
            lambda stubs: stubs.deployments.CreateDeployment(
                deployment_pb2.CreateDeploymentRequest(deployment=deployment_pb2.Deployment(name="x"))
            ),
            INVALID,
            "adapter_path",
        ),
        (
            lambda stubs: stubs.deployments.CreateDeployment(
                deployment_pb2.CreateDeploymentRequest(
                    deployment=deployment_pb2.Deployment(
                        name="x",
                        adapter_path=str(DEMO / "upper"),
                        policy=77,  # type: ignore[arg-type]
                    )
                )
            ),
            INVALID,
            "77 is no policy",
        ),
        (
            lambda stubs: stubs.deployments.CreateDeployment(
                deployment_pb2.CreateDeploymentRequest(
                    deployment=deployment_pb2.Deployment(name="upper", adapter_path=str(DEMO / "upper"))
                )
            ),
            "ALREADY_EXISTS",
            "'upper'",
        ),
        (
            lambda stubs: stubs.deployments.UpdateDeployment(
                deployment_pb2.UpdateDeploymentRequest(deployment=deployment_pb2.Deployment(name="upper"))
            ),
            INVALID,
            "changes nothing",
        ),
        (
            lambda stubs: stubs.deployments.UpdateDeployment(
                deployment_pb2.UpdateDeploymentRequest(
                    deployment=deployment_pb2.Deployment(name="upper"), update_mask={"paths": ["name"]}
                )
            ),
            INVALID,
            "'name' cannot be updated",
        ),
        (lambda stubs: stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest()), INVALID, "nothing to fold"),
        (
            lambda stubs: stubs.weights.MergeAdapter(draining(seconds=10**11)),
            INVALID,
            "positive time of at most a year",
        ),
        (lambda stubs: stubs.weights.MergeAdapter(draining(seconds=-1)), INVALID, "is -1 s: give a positive time"),
        (lambda stubs: stubs.weights.MergeAdapter(draining(nanos=2 * 10**9)), INVALID, "drain_timeout"),
        (
            lambda stubs: stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="nobody")),
            "NOT_FOUND",
            "'nobody'",
        ),
    ],
)
def test_bad_deployment_and_weights_calls(call: Callable[[Any], object], code: str, words: str, client: Client) -> None:
    with pytest.raises(ServerError) as caught, translated():
        call(client.stubs)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_bad_requests_leave_other_streams_as_they_are(client: Client, reference: Reference) -> None:
    prompt = "undisturbed by it"
    expected = reference.answer(prompt, str(DEMO / "rot13"), 30)

    def good(_: int) -> tuple[int, ...]:
        stream = client.stream(prompt, deployment="rot13", max_tokens=30)
        list(stream)
        return tuple(stream.answer.token_ids)

    def bad(name: str) -> str:
        spec, code, _, _ = CASES[name]
        with pytest.raises(ServerError) as caught, translated():
            client.stubs.generation.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(**spec)))
        assert caught.value.code == code
        return name

    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(good, range(30))
        refused = pool.map(bad, [*CASES] * 3)
        assert set(answers) == {expected}
        assert set(refused) == set(CASES)
