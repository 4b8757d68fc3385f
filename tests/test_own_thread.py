"""Who keeps compute threads. What is counted are the threads that the system knows of."""

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.low_rank import write_low_rank
from bench.models import llama, placed
from bench.serving import write_base
from lorafold.own_thread import in_own_thread
from tests.processes import Serve, lorafold

TEAM = 40
"""Threads of a team: far more than all others, so that teams can be counted."""
WITH_LARGE_TEAMS = f"import torch; torch.set_num_threads({TEAM}); from lorafold.cli import main; main()"


class Large(Serve):
    """A server whose teams are large, on a model that is large enough to need them."""

    def __init__(self, folder: Path) -> None:
        base = placed(llama(1), torch.device("cpu"), torch.float32)
        write_base(base, folder / "base")
        self.adapter = write_low_rank(base, folder / "adapter", 1, 4)
        file = folder / "lorafold.toml"
        addresses = 'address = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"'
        file.write_text(f'[base]\nmodel = "{folder / "base"}"\n[server]\n{addresses}\n')
        super().__init__(file, ("-c", WITH_LARGE_TEAMS))

    def teams(self) -> int:
        """Of torch's own pool, which is never used and always there, and of OpenMP for each thread that computed."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir())) // (TEAM - 1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Large]:
    running = Large(tmp_path)
    yield running
    assert running.stop()[0] == 0


def test_only_the_engines_thread_keeps_a_team(server: Large) -> None:
    assert server.teams() == 1
    where = ("--address", server.address)
    made = lorafold("deployments", "create", "it", "--adapter", str(server.adapter), "--policy", "auto", *where)
    assert made.returncode == 0, made.stderr
    assert lorafold("generate", "-d", "it", "w1 w2 w3", "--max-tokens", "4", *where).returncode == 0
    assert server.teams() == 2


def test_the_thread_ends_with_its_function() -> None:
    thread = asyncio.run(in_own_thread(threading.current_thread))
    thread.join(30)
    assert not thread.is_alive()


def test_it_hands_over_arguments_context_results_and_errors() -> None:
    number = contextvars.ContextVar("number", default=1)

    def work(start: int, *, end: int) -> list[int]:
        return [start, number.get(), end]

    async def called() -> list[int]:
        number.set(5)
        return await in_own_thread(work, 4, end=6)

    assert asyncio.run(called()) == [4, 5, 6]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_own_thread(lambda: 1 // 0))
