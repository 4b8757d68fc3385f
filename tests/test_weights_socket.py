"""Folding by hand through a real socket: what a hold does to others, how it ends, and whether the base is intact."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafold.client import ServerError
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import generation_pb2, weights_pb2
from tests.conftest import RunningServer, demo_config, metric, serving


@pytest.fixture
def own() -> Iterator[RunningServer]:
    """A server of each test's own: a hold disturbs everybody."""
    with serving(demo_config()) as running:
        yield running


def test_folding_by_hand_holds_until_it_is_released(own: RunningServer) -> None:
    client = own.client
    weights = client.stubs.weights
    held = weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
    assert held.fold_state.pinned
    assert held.fold_state.deployments == ["rot13"]
    assert held.weight_bytes > 0
    answer = client.generate("Hello", deployment="rot13")
    assert (answer.text, answer.mode) == ("Uryyb", "merged")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, "Hello", deployment="shift")
        assert client.generate("Hello", deployment="rot13").mode == "merged"
        assert not waiting.done()
        found = weights.GetFoldState(weights_pb2.GetFoldStateRequest())
        assert (found.fold_state.pinned, found.fold_state.reason) == (True, "folded by hand and held")
        assert not found.HasField("decision")
        released = weights.UnmergeAdapter(weights_pb2.UnmergeAdapterRequest())
        assert not released.fold_state.pinned
        assert waiting.result(30).text == "Ifmmp"
    assert client.generate("Hello", deployment="rot13").mode == "unmerged"
    verified = weights.VerifyBase(weights_pb2.VerifyBaseRequest())
    assert verified.restored
    assert verified.tensors_checked == 39


def test_what_the_policy_wants_is_told_while_somebody_has_requests(own: RunningServer) -> None:
    weights = own.client.stubs.weights
    own.client.generate("Hello", deployment="rot13")
    assert not weights.GetFoldState(weights_pb2.GetFoldStateRequest()).HasField("decision")
    weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
    released = weights.ReleaseFoldState(weights_pb2.ReleaseFoldStateRequest()).fold_state
    assert (released.pinned, released.reason) == (False, "folded by hand and held, then released")


def test_a_request_whose_time_is_up_while_it_waits_counts_as_that(
    own: RunningServer, until: Callable[..., None]
) -> None:
    own.client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
    with pytest.raises(ServerError, match=r"lorafold (status|weights release)"):
        own.client.generate("Hello", deployment="shift", timeout=0.5)
    counted = 'lorafold_requests_total{deployment="shift",outcome="deadline_exceeded"}'
    until(lambda: metric(own, counted) == 1)


def test_a_caller_who_hangs_up_is_no_deadline(own: RunningServer, until: Callable[..., None]) -> None:
    own.client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
    call = own.client.stubs.generation.StreamGenerate(
        generation_pb2.StreamGenerateRequest(spec=generation_pb2.GenerationSpec(text="a", deployment="shift")),
        timeout=60,
    )
    until(lambda: own.client.stubs.weights.GetFoldState(weights_pb2.GetFoldStateRequest()).queued)
    call.cancel()
    until(lambda: metric(own, 'lorafold_requests_total{deployment="shift",outcome="cancelled"}') == 1)


def test_a_hold_ends_with_its_adapter_and_says_so(own: RunningServer) -> None:
    weights = own.client.stubs.weights
    weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
    own.client.stubs.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name="rot13"))
    state = weights.GetFoldState(weights_pb2.GetFoldStateRequest()).fold_state
    assert (state.pinned, state.reason) == (False, "the hold ended: no deployment has its adapter any more")


def test_verify_base_finds_a_changed_weight() -> None:
    with serving(demo_config()) as broken:
        parts = broken.app.parts
        weight: Any = parts.base.model.get_parameter("model.layers.0.mlp.up_proj.weight")
        parts.engine.call(lambda: weight.data.view(-1)[7:8].add_(0.5)).result(10)
        found = broken.client.stubs.weights.VerifyBase(weights_pb2.VerifyBaseRequest())
        assert not found.restored
        assert found.mismatched == ["model.layers.0.mlp.up_proj.weight"]


def test_deleting_the_held_deployment_lets_the_others_run() -> None:
    with serving(demo_config()) as own:
        client = own.client
        client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="upper"))
        client.stubs.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name="upper"))
        assert client.generate("Hello", deployment="rot13", timeout=30).text == "Uryyb"
        state = client.stubs.weights.GetFoldState(weights_pb2.GetFoldStateRequest()).fold_state
        assert not state.pinned


def test_stopping_lets_requests_behind_a_hold_finish() -> None:
    with serving(demo_config()) as own, ThreadPoolExecutor(1) as pool:
        own.client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="upper"))
        stream = own.client.stream("Hello", deployment="rot13")
        waiting = pool.submit(lambda: "".join(stream))
        rows = lambda: len(own.app.parts.engine._scheduler.rows)  # noqa: E731
        while not own.app.parts.engine.call(rows).result(10):
            pass
        own.stop(grace=30)
        assert waiting.result(30) == "Uryyb"
