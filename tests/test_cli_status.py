"""`lorafold status` of a real server: what is folded and why, by the names that people gave, and where adapters are."""

from pathlib import Path

from click.testing import CliRunner

from lorafold.cli import cli
from lorafold.cli.status import lines
from lorafold.v1.weights_pb2 import GetFoldStateResponse
from tests.conftest import DEMO, metric, serving
from tests.deployments import entry, server_of

SMALL = {"device_slots": 2, "host_memory_gib": 0.001}
NAMES = ["upper", "rot13", "shift"]


def status(address: str) -> dict[str, str]:
    """The first line of each kind."""
    done = CliRunner().invoke(cli, ["status", "--address", address])
    assert done.exit_code == 0, done.output
    lines: dict[str, str] = {}
    for line in done.output.splitlines():
        lines.setdefault(line[:12].strip(), line[12:])
    return lines


def test_status_calls_adapters_by_their_names_and_says_where_they_are(tmp_path: Path) -> None:
    config = server_of(tmp_path, *(entry(name, DEMO / name, "merged") for name in NAMES), residency=SMALL)
    with serving(config) as server:
        before = status(server.app.address)
        assert before["weights"] == "base"
        assert before["adapters"].startswith("2 of 3 on the device (slots: 2, ")
        assert before["adapters"].endswith("brought for requests 0 times")
        for name in NAMES:
            server.client.generate("abc", deployment=name)
        after = status(server.app.address)
        assert after["weights"] == "shift"
        assert "shift" in after["because"]
        assert "adapter" not in after["because"]
        assert not after["adapters"].endswith("brought for requests 0 times")
        assert metric(server, 'lorafold_adapters{place="device"}') == 2
        assert metric(server, 'lorafold_adapters{place="all"}') == 3
        fetches = int(after["adapters"].split()[-2])
        counted = sum(
            metric(server, f'lorafold_adapter_fetch_seconds_count{{source="{of}"}}') for of in ("host", "disk")
        )
        assert counted == fetches > 0


def test_status_says_what_is_waited_for() -> None:
    found = GetFoldStateResponse(
        under_way="adapter 0123456789ab is to be folded by hand, and waits for 1 completion to end"
    )
    found.queued.add(adapter_digest="0123456789abcdef", policy="merged", waiting=1)
    found.queued.add(policy="unmerged", running=2, on_device=True)
    said = lines(found, {"0123456789abcdef": "sql", "": "base"})
    assert "ordered     sql is to be folded by hand, and waits for 1 completion to end" in said
    assert "queue       sql (merged): 0 running, 1 waiting, for a place on the device" in said
    assert "queue       base (unmerged): 2 running, 0 waiting" in said


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    done = CliRunner().invoke(cli, ["status", "--address", "127.0.0.1:1"])
    assert done.exit_code == 1
    assert "127.0.0.1:1" in done.output
