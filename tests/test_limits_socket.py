"""Priorities and concurrency limits of deployments, through a real socket: kept, changed, and obeyed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafold.client import Client, ServerError
from lorafold.v1 import deployment_pb2 as pb
from tests.conftest import RunningServer, serving
from tests.deployments import ROT13, UPPER, create, entry, listed, rollback, server_of, update


def most_at_once(server: RunningServer, name: str, requests: int) -> int:
    """The largest number of completions of a deployment that had a place in the batch together."""
    scheduler, most = server.app.parts.engine._scheduler, [0]
    real = scheduler.schedule

    def schedule(plan: object) -> object:
        most[0] = max(most[0], sum(row.request.deployment == name for row in scheduler.running))
        return real(plan)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(requests) as pool:
        patch.setattr(scheduler, "schedule", schedule)
        asked = [
            pool.submit(server.client.generate, f"{number} abc", deployment=name, max_tokens=30, ignore_eos=True)
            for number in range(requests)
        ]
        for answer in asked:
            assert len(answer.result(60).token_ids) == 30
    return most[0]


def test_a_limit_is_declared_obeyed_changed_and_kept(tmp_path: Path) -> None:
    config = server_of(tmp_path, {**entry("it", ROT13), "max_concurrency": 2, "priority": 3})
    with serving(config) as server:
        made = listed(server.client)["it"]
        assert (made.max_concurrency, made.priority) == (2, 3)
        assert most_at_once(server, "it", 6) == 2
        assert update(server.client, "it", max_concurrency=0).max_concurrency == 0
        assert most_at_once(server, "it", 6) > 2  # Negative control.
        assert update(server.client, "it", max_concurrency=1, priority=-5).priority == -5
    with serving(config) as server:
        made = listed(server.client)["it"]
        assert (made.max_concurrency, made.priority) == (1, -5)
        assert most_at_once(server, "it", 3) == 1
        back = rollback(server.client, "it")
        assert (back.max_concurrency, back.priority) == (0, 3)


def test_an_update_of_nothing_says_what_can_be_updated(tmp_path: Path) -> None:
    with serving(server_of(tmp_path, entry("it", ROT13))) as server:
        with pytest.raises(
            ServerError, match="set one of adapter_path, composition, policy, priority, max_concurrency"
        ):
            update(server.client, "it")
        with pytest.raises(ServerError, match=r"deployment\.priority: is in the update mask but not set") as caught:
            update_masked(server.client, pb.Deployment(name="it"), "priority")
        assert caught.value.code == "INVALID_ARGUMENT"
        create(server.client, "other", UPPER)
        assert listed(server.client)["other"].priority == 0


def update_masked(client: Client, wanted: pb.Deployment, *paths: str) -> None:
    from lorafold.client import translated

    request = pb.UpdateDeploymentRequest(deployment=wanted)
    request.update_mask.paths.extend(paths)
    with translated():
        client.stubs.deployments.UpdateDeployment(request)
