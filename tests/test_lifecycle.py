"""How a server ends, and what it does for clients that do not read: real processes and sockets."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorafold.client import Client, ServerError, translated
from lorafold.v1 import generation_pb2 as pb
from lorafold.v1 import generation_pb2_grpc, weights_pb2
from tests.conftest import RunningServer, demo_config, serving, wait_until_idle
from tests.deployments import delete, update
from tests.processes import Serve, config_file

ENDLESS: Any = {"temperature": 100.0, "seed": 1, "max_tokens": 480, "stop": ["\0"]}


def said(serve: Serve, start: str) -> None:
    """Reads on until the server says so."""
    assert serve.process.stdout is not None
    while not serve.process.stdout.readline().startswith(start):
        pass


def test_a_server_that_stops_refuses_new_requests_and_finishes_old_ones(tmp_path: Path) -> None:
    with Serve(config_file(tmp_path)) as running, Client(running.address) as client:
        stream = iter(client.stream("abcdef", **ENDLESS))
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        said(running, "stopping")
        with pytest.raises(ServerError, match="the server is stopping: send the request to another one") as caught:
            client.generate("abc", deployment="upper")
        assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "DRAINING")
        assert caught.value.retry_after
        for change in (
            lambda: client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="upper")),
            lambda: client.stubs.weights.UnmergeAdapter(weights_pb2.UnmergeAdapterRequest()),
            lambda: update(client, "upper", priority=3),
            lambda: delete(client, "upper"),
        ):
            with translated(), pytest.raises((grpc.RpcError, ServerError)) as refused:
                change()
            assert "the server is stopping" in str(refused.value)
        assert len([*stream]) > 0
        assert running.wait()[0] == 0


def test_a_server_whose_output_nobody_reads_any_more_stops_as_any_other(tmp_path: Path) -> None:
    with Serve(config_file(tmp_path)) as running:
        assert running.process.stdout is not None
        assert running.process.stderr is not None
        running.process.stdout.close()
        running.process.send_signal(signal.SIGTERM)
        with running.process.stderr as log:
            said = log.read()
        assert running.process.wait(60) == 0
        assert "Traceback" not in said


def test_requests_that_outlast_the_grace_period_are_told_why_and_counted(tmp_path: Path) -> None:
    file = config_file(tmp_path)
    file.write_text(file.read_text().replace("[server]\n", "[server]\ngrace_seconds = 0.05\n"))
    with Serve(file) as running, Client(running.address) as client:
        streams = [iter(client.stream("abcdef" + "g" * number, **ENDLESS)) for number in range(3)]
        for stream in streams:
            next(stream)
        running.process.send_signal(signal.SIGTERM)
        for stream in streams:
            with pytest.raises(ServerError, match="stopped before the answer was complete") as caught:
                list(stream)
            assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "DRAINING")
            after = re.search(r"(\S+) s after it was told", str(caught.value))
            assert after
            assert 0.05 <= float(after[1]) < 30
        _, err = running.process.communicate(timeout=60)
        assert running.process.returncode == 0
        assert '"requests": 3' in next(line for line in err.splitlines() if "cut off" in line)


@pytest.fixture
def own() -> Iterator[RunningServer]:
    with serving(demo_config()) as running:
        yield running


def test_a_client_that_does_not_read_holds_up_only_itself(own: RunningServer, until: Callable[..., None]) -> None:
    engine = own.app.parts.engine
    unread = lambda: sum(row.generated for row in engine._scheduler._paused)  # noqa: E731
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
    with grpc.insecure_channel(own.address, options=options) as channel:
        spec = pb.GenerationSpec(text="abcdef", max_tokens=480, ignore_eos=True, logprobs=20)
        stream = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(pb.StreamGenerateRequest(spec=spec))
        until(lambda: engine.call(unread).result(30) > 0)
        paused = engine.call(unread).result(30)
        assert own.client.generate("abc", deployment="upper").text == "ABC"
        assert engine.call(unread).result(30) == paused < 480
        tokens = sum(len(message.delta.token_ids) for message in stream)
        assert tokens == 480
    wait_until_idle(own)
