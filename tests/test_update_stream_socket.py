"""How far an update is, and how an adapter leaves the device, through a real socket. Requests are kept in flight by
an adapter that is held folded.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafold.client import Client, ServerError, translated
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import weights_pb2
from tests.conftest import RunningServer, demo_config, serving
from tests.deployments import ROT13, SHIFT, UPPER, copy_of, create, delete, entry, listed
from tests.processes import lorafold

Event = pb.StreamUpdateDeploymentResponse


@pytest.fixture(scope="module")
def own() -> Iterator[RunningServer]:
    with serving(demo_config(deployments=[entry("holder", UPPER, "merged")])) as running:
        yield running


@pytest.fixture
def in_flight(own: RunningServer, tmp_path: Path) -> Iterator[tuple[RunningServer, str, list[Any]]]:
    """A deployment 'it' of an adapter of its own, and two streams on it that do not end before the hold does."""
    client = own.client
    made = create(client, "it", copy_of(ROT13, tmp_path / "adapter"))
    streams = [client.stream("abc", deployment="it", max_tokens=300, ignore_eos=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="holder"))
    yield own, made.adapter_digest, streams
    let_go(client)
    for stream in streams:
        stream.cancel()
    if "it" in listed(client):
        delete(client, "it")


def let_go(client: Client) -> None:
    client.stubs.weights.UnmergeAdapter(weights_pb2.UnmergeAdapterRequest())


def loaded(server: RunningServer) -> set[str]:
    parts = server.app.parts
    return parts.engine.call(lambda: set(parts.manager.adapters)).result(30)


def updating(client: Client, name: str, adapter: Path, policy: int = pb.POLICY_UNSPECIFIED) -> Iterator[Event]:
    wanted = pb.Deployment(name=name, adapter_path=str(adapter))
    wanted.policy = policy  # type: ignore[assignment]
    with translated():
        yield from client.stubs.deployments.StreamUpdateDeployment(pb.StreamUpdateDeploymentRequest(deployment=wanted))


def stage(event: Event) -> str:
    return pb.UpdateStage.Name(event.progress.stage).removeprefix("UPDATE_STAGE_")


def test_every_stage_is_told_and_the_deployment_last(own: RunningServer, tmp_path: Path) -> None:
    create(own.client, "staged", ROT13)
    *steps, last = updating(own.client, "staged", copy_of(SHIFT, tmp_path / "adapter"), pb.POLICY_MERGED)
    stages = [stage(event) for event in steps]
    measured = [event.progress for event in steps if stage(event) == "MEASURED"]
    assert list(dict.fromkeys(stages)) == ["READ", "BOUND", "MEASURED", "STAGED", "SAVED", "SWITCHED"]
    assert [step.parameters_done for step in measured] == list(range(1, len(measured) + 1))
    assert {step.parameters_total for step in measured} == {len(measured)}
    assert last.deployment == listed(own.client)["staged"]
    delete(own.client, "staged")


def test_requests_on_the_adapter_of_before_are_counted_until_it_is_gone(
    in_flight: tuple[RunningServer, str, list[Any]],
) -> None:
    server, digest, streams = in_flight
    events = updating(server.client, "it", SHIFT)
    first = next(event for event in events if stage(event) == "DRAINING")
    assert first.progress.in_flight == 2
    assert server.client.stubs.deployments.GetDeployment(
        pb.GetDeploymentRequest(name="it")
    ).deployment.adapter_path == str(SHIFT)
    streams[0].cancel()
    assert next(events).progress.in_flight == 1
    assert digest in loaded(server)
    let_go(server.client)
    *rest, last = events
    assert all(event.progress.in_flight == 0 for event in rest)
    assert last.deployment.adapter_path == str(SHIFT)
    assert digest not in loaded(server)


def test_an_adapter_that_another_deployment_has_is_not_waited_for(
    in_flight: tuple[RunningServer, str, list[Any]], tmp_path: Path
) -> None:
    server, digest, _ = in_flight
    create(server.client, "beside", tmp_path / "adapter")
    *steps, last = updating(server.client, "it", SHIFT)
    assert "DRAINING" not in [stage(event) for event in steps]
    assert last.HasField("deployment")
    assert digest in loaded(server)
    let_go(server.client)
    delete(server.client, "beside")


def test_a_deletion_returns_when_the_memory_is_free(in_flight: tuple[RunningServer, str, list[Any]]) -> None:
    server, digest, streams = in_flight
    with pytest.raises(ServerError) as caught:
        delete(server.client, "it", timeout=0.5)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert "it" not in listed(server.client)
    assert digest in loaded(server)
    create(server.client, "it", ROT13)  # The name is free at once.
    let_go(server.client)
    for stream in streams:
        assert len(stream.answer.token_ids) + len(list(stream)) > 1
    server.client.generate("a")
    assert digest not in loaded(server)


def test_a_deletion_without_requests_leaves_nothing(own: RunningServer, tmp_path: Path) -> None:
    before = loaded(own)
    made = create(own.client, "idle", copy_of(SHIFT, tmp_path / "adapter"))
    assert made.adapter_digest in loaded(own)  # Negative control.
    delete(own.client, "idle")
    assert loaded(own) == before


def test_an_update_that_is_refused_is_refused_as_the_other_one_is(own: RunningServer, tmp_path: Path) -> None:
    with pytest.raises(ServerError) as caught:
        list(updating(own.client, "nobody", SHIFT))
    assert caught.value.reason == "DEPLOYMENT_NOT_FOUND"
    with pytest.raises(ServerError) as caught:
        list(updating(own.client, "holder", tmp_path))
    assert caught.value.reason == "ADAPTER_NOT_FOUND"


def test_an_update_goes_on_when_nobody_listens_any_more(own: RunningServer) -> None:
    create(own.client, "left", ROT13)
    wanted = pb.Deployment(name="left", adapter_path=str(SHIFT))
    call = own.client.stubs.deployments.StreamUpdateDeployment(pb.StreamUpdateDeploymentRequest(deployment=wanted))
    assert stage(next(call)) == "READ"
    call.cancel()
    deployments = own.app.parts.deployments
    asyncio.run_coroutine_threadsafe(deployments.settled(["left"]), own.loop).result(30)
    assert listed(own.client)["left"].adapter_path == str(SHIFT)
    delete(own.client, "left")


def test_the_command_line_shows_it(own: RunningServer) -> None:
    create(own.client, "shown", ROT13)
    done = lorafold("deployments", "update", "shown", "--adapter", str(SHIFT), "--wait", "--address", own.address)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["read", "bound", "staged", "saved", "switched"]
    assert str(SHIFT) in done.stdout
    delete(own.client, "shown")
