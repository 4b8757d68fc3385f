"""What is acknowledged is on the disk: real server processes, killed, out of room, two at once, told to read again."""

import json
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorafold.client import Client, ServerError
from tests.deployments import ROT13, SHIFT, UPPER, create, delete, listed, update
from tests.processes import Serve, config_file, lorafold

pytestmark = pytest.mark.timeout(300)  # Servers start in seconds, but not on a busy machine.
SWAPS, ROUNDS = 50, 4
SAYS = {"upper": "ABC", "rot13": "nop", "shift": "bcd"}


@contextmanager
def server_at(file: Path) -> Iterator[tuple[Serve, Client]]:
    """A server process and a client of it; killed at the end if it still runs."""
    with Serve(file) as serve, Client(serve.address) as client:
        yield serve, client


class Swapper:
    """Sends updates one after another until the server is gone."""

    def __init__(self, client: Client, chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self.acknowledged = listed(client)["it"]
        self.under_way = self.end = ""
        self.count = 0

    def run(self, swaps: int, kill: threading.Timer) -> None:
        """After `swaps` updates, starts the timer that kills the server, and goes on."""
        while True:
            others = [folder for folder in (SHIFT, UPPER, ROT13) if str(folder) != self.acknowledged.adapter_path]
            target = self._chance.choice(others)
            self.under_way = str(target)
            try:
                self.acknowledged = update(self._client, "it", adapter_path=str(target))
            except ServerError as error:
                self.end = error.code
                return
            self.under_way = ""
            self.count += 1
            if self.count == swaps:
                kill.start()


def test_whenever_it_is_killed_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    chance = random.Random(5)
    file = config_file(tmp_path, f'[[deployments]]\nname = "it"\nadapter = "{ROT13}"\npolicy = "unmerged"\n')
    swapper: Swapper | None = None
    swaps = 0
    for number in range(ROUNDS + 1):
        with server_at(file) as (serve, client):
            if swapper is not None:
                check_survivor(client, swapper)
            if number == ROUNDS:
                break
            swapper = Swapper(client, chance)
            timer = threading.Timer(chance.uniform(0, 0.1), serve.process.kill)
            swapper.run(-(-SWAPS // ROUNDS), timer)
            timer.join()
            assert swapper.end == "UNAVAILABLE"
            swaps += swapper.count
    assert swaps >= SWAPS
    assert list(tmp_path.glob(".*.state.json.[0-9a-f]*")) == []


def check_survivor(client: Client, swapper: Swapper) -> None:
    """What came back is what was acknowledged last, or what was asked for next."""
    found = listed(client)["it"]
    assert client.generate("abc", deployment="it").text == SAYS[Path(found.adapter_path).name]
    if found.etag != swapper.acknowledged.etag:
        assert found.adapter_path == swapper.under_way
        assert found.previous.adapter_digest == swapper.acknowledged.adapter_digest
    else:
        assert found == swapper.acknowledged


def test_a_full_disk_refuses_the_change_and_nothing_else(tmp_path: Path) -> None:
    file = config_file(tmp_path)
    with server_at(file) as (serve, client):
        create(client, "it", ROT13)
        before = listed(client)
        remembered = (tmp_path / "lorafold.state.json").read_bytes()
        _, hard = resource.prlimit(serve.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(serve.process.pid, resource.RLIMIT_FSIZE, (100, hard))  # No file may become larger.
        for attempt in (
            lambda: update(client, "it", adapter_path=str(SHIFT)),
            lambda: create(client, "new", SHIFT),
            lambda: delete(client, "it"),
        ):
            with pytest.raises(ServerError, match="free room there") as caught:
                attempt()
            assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "STATE_DISK_FULL")
        assert listed(client) == before
        assert client.generate("abc", deployment="it").text == "nop"
        assert (tmp_path / "lorafold.state.json").read_bytes() == remembered
        resource.prlimit(serve.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        after = update(client, "it", adapter_path=str(SHIFT))  # Negative control.
    with server_at(file) as (_, client):
        assert listed(client)["it"] == after
        assert "new" not in listed(client)


def test_a_second_server_and_a_damaged_file_are_one_sentence_each(tmp_path: Path) -> None:
    file = config_file(tmp_path)
    with server_at(file):
        second = lorafold("serve", str(file))
    assert second.returncode != 0
    assert "another server uses the state file" in second.stderr
    state = tmp_path / "lorafold.state.json"
    state.write_text(state.read_text()[:-9])
    damaged = lorafold("serve", str(file))
    assert damaged.returncode != 0
    assert f"the state file '{state}' is damaged" in damaged.stderr
    assert "Traceback" not in second.stderr + damaged.stderr


def test_the_command_line_changes_addresses_and_not_the_state_file(tmp_path: Path) -> None:
    file = config_file(tmp_path)
    with server_at(file) as (serve, client):
        create(client, "it", ROT13)
        where = ("--address", serve.address)
        assert lorafold("deployments", "update", "it", "--adapter", str(UPPER), *where).returncode == 0
        back = lorafold("deployments", "rollback", "it", "--json", *where)
        assert json.loads(back.stdout)["previous"] == str(UPPER)
        none = lorafold("deployments", "rollback", "upper", *where)
        assert "there is nothing to go back to" in none.stderr
    assert [path.name for path in tmp_path.glob("*.json")] == ["lorafold.state.json"]
