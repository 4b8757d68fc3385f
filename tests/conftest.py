import asyncio
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafold.app import App, start_app
from lorafold.cli.demo import shipped_set
from lorafold.client import Client
from lorafold.config import Config, LogConfig, parse_config
from lorafold.demo.reference import Reference
from lorafold.logs import set_up_logging
from tests.models import save_adapter, tiny_llama, tiny_qwen

torch.set_num_threads(2)
set_up_logging(LogConfig(), sys.stderr)
DEMO = shipped_set()
SCRATCH = tempfile.TemporaryDirectory()
"""For the state files of servers; removed when the tests are over."""
POLICIES = {"upper": "merged", "rot13": "unmerged", "shift": "unmerged", "swapcase": "auto", "vowels": "merged"}


class RunningServer:
    """A real server in this process, on a loop of its own."""

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self.loop = loop
        self.address = app.address
        self.client = Client(app.address)

    def stop(self, grace: float = 0.0) -> None:
        asyncio.run_coroutine_threadsafe(self.app.stop(grace), self.loop).result(timeout=60)
        self.client.close()


def wait_until_idle(server: RunningServer) -> None:
    """Returns when no row has a place any more; each look is a step of the engine's own."""
    engine = server.app.parts.engine
    until = time.monotonic() + 30
    while engine.call(lambda: bool(engine._scheduler.rows)).result(30):
        assert time.monotonic() < until, "rows were not freed"


def metric(server: RunningServer, line: str) -> float:
    """The value in the line of `/metrics` that begins so; 0 if there is none."""
    with urllib.request.urlopen(f"http://{server.app.metrics_address}/metrics") as page:
        for found in page.read().decode().splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
    return 0.0


@contextmanager
def serving(config: Config) -> Iterator[RunningServer]:
    """A server for `config`, stopped at the end."""
    started: Future[RunningServer] = Future()
    over = threading.Event()

    async def live() -> None:
        try:
            app = await start_app(config)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(RunningServer(app, asyncio.get_running_loop()))
        await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    try:
        server = started.result(timeout=120)
        try:
            yield server
        finally:
            server.stop()
    finally:
        over.set()
        thread.join()


def demo_config(**sections: object) -> Config:
    """The demo set on free ports, with every policy in use; its state file in a folder of its own."""
    return demo_config_in(Path(tempfile.mkdtemp(dir=SCRATCH.name)), **sections)


def demo_config_in(folder: Path, **sections: object) -> Config:
    """The same with its state file in `folder`, so that it can come back."""
    content: dict[str, object] = {
        "base": {"model": str(DEMO / "base"), "device": "cpu"},
        "server": {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"},
        "engine": {"max_batch": 8, "max_context": 512},
        "policy": {"max_wait_seconds": 0.05},
        "deployments": [
            {"name": name, "adapter": str(DEMO / name), "policy": policy} for name, policy in POLICIES.items()
        ],
    }
    return parse_config({**content, **sections}, folder / "test.toml")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is written into the user's own cache, by child processes neither."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr("lorafold.config.user_cache_path", lambda name: folder / name)
        yield folder


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with serving(demo_config()) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Client:
    return server.client


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(DEMO / "base")


@pytest.fixture(scope="session")
def adapter_on_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a PEFT checkpoint on tiny_llama() from LoraConfig arguments."""

    def make(seed: int = 1, **config: Any) -> Path:
        return save_adapter(tiny_llama(), tmp_path_factory.mktemp("adapter"), seed, **config)

    return make


@pytest.fixture(scope="session")
def adapter_on_qwen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a PEFT checkpoint on tiny_qwen() from LoraConfig arguments."""

    def make(seed: int = 1, **config: Any) -> Path:
        return save_adapter(tiny_qwen(), tmp_path_factory.mktemp("adapter"), seed, **config)

    return make


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Asks again and again until something is so; each question is a round trip to what it asks."""

    def wait(holds: Callable[[], bool], seconds: float = 60.0) -> None:
        last = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < last, "it never came to be"

    return wait
