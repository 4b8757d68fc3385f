"""lorafold.toml read again while the server runs: all of its deployments or none, and nobody's change is lost."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorafold.client import ServerError
from lorafold.declared import reload
from lorafold.deployment_config import DeploymentConfig
from lorafold.errors import ConfigError
from lorafold.v1 import deployment_pb2 as pb
from tests.conftest import DEMO, RunningServer, serving
from tests.deployments import ROT13, SHIFT, UPPER, create, delete, entry, listed, server_of, update
from tests.processes import Serve
from tests.test_durability import server_at


def text_of(*deployments: tuple[str, Path], base: Path = DEMO / "base", more: str = "") -> str:
    """A lorafold.toml."""
    text = f'[base]\nmodel = "{base}"\n[server]\naddress = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"\n{more}'
    for name, adapter in deployments:
        text += f'[[deployments]]\nname = "{name}"\nadapter = "{adapter}"\npolicy = "unmerged"\n'
    return text


def hang_up(serve: Serve, words: str) -> dict[str, Any]:
    """Has the server read its file again; the first line with these words that it logs."""
    serve.process.send_signal(signal.SIGHUP)
    assert serve.process.stderr is not None
    lines = (json.loads(line) for line in serve.process.stderr if line.startswith("{"))
    return next(line for line in lines if words in line["event"])


# What is wrong with a file that also has a good change, and words of the reason.
BAD = {
    "syntax": (text_of(("it", SHIFT)) + "[", "is not valid TOML"),
    "unknown key": (text_of(("it", SHIFT), more='colour = "red"\n'), "no such key"),
    "no adapter": (text_of(("it", SHIFT), ("other", DEMO / "nowhere")), "deployment 'other': there is no adapter"),
    "no adapter, first": (text_of(("other", DEMO / "base"), ("it", SHIFT)), "deployment 'other'"),
    "another base": (text_of(("it", SHIFT), base=DEMO), "[base] is another one"),
}


@pytest.mark.timeout(300)
def test_a_hang_up_takes_a_good_file_over_and_leaves_a_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "lorafold.toml"
    file.write_text(text_of(("it", ROT13), ("removed", ROT13)))
    with server_at(file) as (serve, client):
        create(client, "made", UPPER)
        before = listed(client)
        for text, words in BAD.values():
            file.write_text(text)
            said = hang_up(serve, "configuration ")
            assert said["level"] == "error"
            assert words in said["reason"]
            assert listed(client) == before
        file.write_text(
            text_of(("it", SHIFT), ("new", UPPER), more='[log]\nlevel = "warning"\n[engine]\nmax_batch = 3\n')
        )
        said = hang_up(serve, "needs a restart")
        assert said["section"] == "engine"
        assert set(listed(client)) == {"it", "new", "made"}
        assert client.generate("abc", deployment="it").text == "bcd"
        assert client.generate("abc", deployment="new").text == "ABC"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with serving(server_of(tmp_path, entry("it", ROT13), entry("other", ROT13))) as running:
        yield running


def entries(**adapters: Path) -> list[DeploymentConfig]:
    return [DeploymentConfig.model_validate(entry(name, adapter)) for name, adapter in adapters.items()]


def reloading(server: RunningServer, **adapters: Path) -> "Future[Any]":
    work = reload(server.app.parts.deployments, entries(**adapters))
    return asyncio.run_coroutine_threadsafe(work, server.loop)


@contextmanager
def held(server: RunningServer, hold: Callable[[asyncio.Event, "Future[None]"], Any]) -> Iterator[None]:
    """While something on the server's loop is held."""
    inside: Future[None] = Future()
    leave = asyncio.Event()
    holding = asyncio.run_coroutine_threadsafe(hold(leave, inside), server.loop)
    inside.result(30)
    yield
    server.loop.call_soon_threadsafe(leave.set)
    holding.result(30)


def test_one_bad_adapter_leaves_everything_as_it_was(server: RunningServer, tmp_path: Path) -> None:
    manager, engine = server.app.parts.manager, server.app.parts.engine
    before, loaded = listed(server.client), engine.call(lambda: set(manager.adapters)).result(30)
    with pytest.raises(ConfigError, match="deployment 'bad'"):
        reloading(server, it=SHIFT, new=UPPER, bad=tmp_path).result(60)
    assert listed(server.client) == before
    assert server.client.generate("abc", deployment="it").text == "nop"
    assert engine.call(lambda: set(manager.adapters)).result(30) == loaded
    reloading(server, it=SHIFT, new=UPPER).result(60)  # Negative control.
    assert set(listed(server.client)) == {"it", "new"}


def test_what_clients_changed_stays_unless_the_file_changed_too(server: RunningServer) -> None:
    client = server.client
    update(client, "it", adapter_path=str(SHIFT))
    delete(client, "other")
    before = listed(client)
    reloading(server, it=ROT13, other=ROT13).result(60)
    assert listed(client) == before
    reloading(server, it=UPPER, other=UPPER).result(60)
    assert {name: item.adapter_path for name, item in listed(client).items()} == {"it": str(UPPER), "other": str(UPPER)}


def test_it_waits_for_a_call_that_changes_the_same_deployment(server: RunningServer) -> None:
    deployments = server.app.parts.deployments

    async def change(leave: asyncio.Event, inside: "Future[None]") -> None:
        with deployments.changing("it"):
            inside.set_result(None)
            await leave.wait()

    with held(server, change):
        waiting = reloading(server, it=SHIFT, other=ROT13)
        reloading(server, it=ROT13, other=UPPER).result(60)  # Negative control: another deployment.
        assert not waiting.done()
        assert server.client.generate("abc", deployment="it").text == "nop"
    waiting.result(60)
    assert server.client.generate("abc", deployment="it").text == "bcd"


def test_calls_that_change_what_it_changes_are_refused_and_others_are_not(server: RunningServer) -> None:
    deployments, client = server.app.parts.deployments, server.client

    async def stall(leave: asyncio.Event, inside: "Future[None]") -> None:
        async with deployments.staging.reader._reading[False]:
            inside.set_result(None)
            await leave.wait()

    with ThreadPoolExecutor(1) as pool, held(server, stall):
        running = reloading(server, it=SHIFT, other=ROT13)
        client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest())  # It has come to reading by now.
        for attempt in (lambda: delete(client, "it"), lambda: update(client, "it", policy=pb.POLICY_AUTO)):
            with pytest.raises(ServerError) as caught:
                attempt()
            assert (caught.value.code, caught.value.reason) == ("ABORTED", "DEPLOYMENT_BUSY")
        other = pool.submit(delete, client, "other")
        other.result(30)
    running.result(60)
    assert {name: item.adapter_path for name, item in listed(client).items()} == {"it": str(SHIFT)}


def test_a_hang_up_before_the_server_serves_is_followed_once_it_does(tmp_path: Path) -> None:
    """The file is a pipe: the server reads it for as long as nobody has written, and then again."""
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [sys.executable, "-m", "lorafold", "serve", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as serve:
        assert serve.stdout is not None
        assert serve.stderr is not None
        with pipe.open("w") as writer:  # Opens once the server does.
            serve.send_signal(signal.SIGHUP)
            writer.write(text_of(("it", ROT13)))
        assert serve.stdout.readline().startswith("loaded the libraries")  # It has read to the end.
        with pipe.open("w") as writer:
            writer.write(text_of(("it", SHIFT)))
        assert "taken over" in next(line for line in serve.stderr if "configuration " in line)
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0
