"""Folding by hand through a real socket: what a hold does to others, how it ends, and whether the base is intact."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import weights_pb2
from tests.conftest import RunningServer, demo_config, serving


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
        state = weights.GetFoldState(weights_pb2.GetFoldStateRequest()).fold_state
        assert (state.pinned, state.reason) == (True, "folded by hand and held")
        released = weights.UnmergeAdapter(weights_pb2.UnmergeAdapterRequest())
        assert not released.fold_state.pinned
        assert waiting.result(30).text == "Ifmmp"
    assert client.generate("Hello", deployment="rot13").mode == "unmerged"
    verified = weights.VerifyBase(weights_pb2.VerifyBaseRequest())
    assert verified.restored
    assert verified.tensors_checked == 39


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
