"""Deployments over a restart, through a real socket: what comes back, what the file decides, what cannot be served."""

import json
import os
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from lorafold.client import ServerError
from lorafold.config import Config, state_path
from lorafold.errors import ConfigError
from lorafold.model import load_weights
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.stamp import STAMP_FILE
from tests.conftest import DEMO, serving
from tests.deployments import (
    ROT13,
    SHIFT,
    UPPER,
    copy_of,
    create,
    delete,
    entry,
    listed,
    rollback,
    server_of,
    update,
)

PROMPT = "Restart me"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder of this test's own, with what UPPER does."""
    return copy_of(UPPER, tmp_path / "adapter")


def state_file(config: Config) -> Path:
    file = state_path(config)
    assert file is not None
    return file


def test_everything_clients_made_comes_back_as_it_was(tmp_path: Path) -> None:
    config = server_of(
        tmp_path, entry("declared", ROT13), entry("changed", ROT13), *(entry(name, ROT13) for name in ("gone", "again"))
    )
    with serving(config) as server:
        client = server.client
        create(client, "made", UPPER, "merged")
        parts = [pb.CompositionPart(adapter_path=str(UPPER)), pb.CompositionPart(adapter_path=str(SHIFT), weight=-0.5)]
        mixed = pb.Composition(method="COMPOSITION_METHOD_DARE_LINEAR", density=0.9, seed=5, parts=parts)
        update(client, "made", composition=mixed, policy=pb.POLICY_AUTO)
        update(client, "changed", adapter_path=str(SHIFT))
        for name in ("gone", "again"):
            delete(client, name)
        create(client, "again", UPPER)
        before = listed(client)
        answers = {name: client.generate(PROMPT, deployment=name).text for name in before}
    with serving(config) as server:
        assert listed(server.client) == before
        assert {name: server.client.generate(PROMPT, deployment=name).text for name in before} == answers
        with pytest.raises(ServerError) as caught:
            update(server.client, "made", etag="other", policy=pb.POLICY_MERGED)
        assert caught.value.reason == "ETAG_MISMATCH"
        update(server.client, "made", etag=before["made"].etag, policy=pb.POLICY_MERGED)
    assert set(before) == {"declared", "changed", "again", "made"}
    assert before["made"].previous.adapter_path == str(UPPER)


def test_without_a_state_file_a_restart_forgets(tmp_path: Path) -> None:
    config = server_of(
        tmp_path,
        entry("declared", ROT13),
        server={"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "state_file": ""},
    )
    with serving(config) as server:
        create(server.client, "made", UPPER)
    with serving(config) as server:
        assert set(listed(server.client)) == {"declared"}
    assert list(tmp_path.iterdir()) == []


def test_the_file_decides_where_it_changed_and_clients_where_it_did_not(tmp_path: Path) -> None:
    names = ("same", "client", "file", "both", "removed", "deleted", "revived")
    with serving(server_of(tmp_path, *(entry(name, ROT13) for name in names))) as server:
        client = server.client
        for name in ("client", "both", "removed"):
            update(client, name, adapter_path=str(SHIFT))
        for name in ("deleted", "revived"):
            delete(client, name)
        create(client, "taken", SHIFT)
        create(client, "made", SHIFT)
        before = listed(client)
    changed = [entry(name, UPPER) for name in ("file", "both", "revived", "taken")]
    config = server_of(tmp_path, *(entry(name, ROT13) for name in ("same", "client", "deleted")), *changed)
    with capture_logs() as logs, serving(config) as server:
        after = listed(server.client)
        folders = {name: Path(item.adapter_path).name for name, item in after.items()}
        assert server.client.generate("abc", deployment="both").text == "ABC"
    upper = dict.fromkeys(("file", "both", "revived", "taken"), "upper")
    assert folders == {"same": "rot13", "client": "shift", "made": "shift", **upper}
    assert {name for name in before.keys() & after.keys() if before[name].etag == after[name].etag} == {
        "same",
        "client",
        "made",
    }
    assert after["both"].previous.adapter_path == str(SHIFT)
    said = {(line["event"], line["name"]) for line in logs if "name" in line}
    assert ("deployment of a client is now what the file says", "taken") in said
    assert ("deployment deleted, as the file has it no more", "removed") in said
    with serving(config) as server:
        assert listed(server.client) == after


def test_a_declared_folder_with_new_content_is_served_and_said(tmp_path: Path, adapter: Path) -> None:
    config = server_of(tmp_path, entry("declared", adapter))
    with serving(config) as server:
        before = listed(server.client)["declared"]
    copy_of(SHIFT, adapter)
    with capture_logs() as logs, serving(config) as server:
        after = listed(server.client)["declared"]
        assert server.client.generate("abc", deployment="declared").text == "bcd"
    assert (after.adapter_digest != before.adapter_digest, after.etag != before.etag) == (True, True)
    assert "deployment has the new content of its folder" in [line["event"] for line in logs]


def test_a_declared_adapter_that_is_missing_stops_the_start(tmp_path: Path, adapter: Path) -> None:
    config = server_of(tmp_path, entry("declared", adapter))
    with serving(config):
        pass
    before = state_file(config).read_bytes()
    shutil.rmtree(adapter)
    with pytest.raises(ConfigError, match="deployment 'declared': there is no adapter folder"), serving(config):
        pass
    assert state_file(config).read_bytes() == before
    with serving(server_of(tmp_path)) as server:  # The lock was given back.
        assert listed(server.client) == {}


# What becomes of the folder of a client's deployment, and words of the reason.
LOSSES = {
    "missing": "there is no adapter folder",
    "truncated": "is truncated or damaged",
    "of other content": "now makes",
    "of broken options": "adapter_config.json cannot be read",
}


def lose(adapter: Path, how: str) -> None:
    if how == "missing":
        shutil.rmtree(adapter)
    elif how == "truncated":
        os.truncate(adapter / "adapter_model.safetensors", 1000)
    elif how == "of other content":
        copy_of(SHIFT, adapter)
    else:
        (adapter / "adapter_config.json").write_text("{")


@pytest.mark.parametrize("how", LOSSES)
def test_a_clients_deployment_that_is_lost_is_kept_and_refused_with_the_reason(
    how: str, tmp_path: Path, adapter: Path
) -> None:
    config = server_of(tmp_path, entry("declared", ROT13))
    with serving(config) as server:
        create(server.client, "lost", SHIFT)
        before = update(server.client, "lost", adapter_path=str(adapter))
    lose(adapter, how)
    with serving(config) as server:
        client = server.client
        lost = listed(client)["lost"]
        assert LOSSES[how] in lost.not_served
        assert (lost.adapter_digest, lost.etag) == (before.adapter_digest, before.etag)
        for refused in (
            lambda: client.generate("abc", deployment="lost"),
            lambda: update(client, "lost", policy=pb.POLICY_MERGED),
        ):
            with pytest.raises(ServerError) as caught:
                refused()
            assert LOSSES[how] in str(caught.value)
        assert client.generate("abc", deployment="declared").text == "nop"  # Nobody else is disturbed.
    copy_of(UPPER, adapter)
    with serving(config) as server:  # The same content is back.
        assert server.client.generate("abc", deployment="lost").text == "ABC"
        assert listed(server.client)["lost"] == before


def test_a_lost_deployment_can_be_updated_rolled_back_deleted_and_mended(tmp_path: Path, adapter: Path) -> None:
    config = server_of(tmp_path)
    with serving(config) as server:
        for name in ("updated", "back", "deleted", "mended"):
            create(server.client, name, SHIFT)
            update(server.client, name, adapter_path=str(adapter))
    shutil.rmtree(adapter)
    with serving(config) as server:
        client = server.client
        assert all(item.not_served for item in listed(client).values())
        assert update(client, "updated", adapter_path=str(ROT13)).not_served == ""
        assert client.generate("abc", deployment="updated").text == "nop"
        rollback(client, "back")
        assert client.generate("abc", deployment="back").text == "bcd"
        delete(client, "deleted")
        copy_of(UPPER, adapter)
        update(client, "mended", policy=pb.POLICY_MERGED)
        assert client.generate("abc", deployment="mended").text == "ABC"
        with pytest.raises(ServerError, match="no deployment"):
            client.generate("abc", deployment="deleted")
        before = listed(client)
    with serving(config) as server:
        assert listed(server.client) == before


def test_another_base_is_served_only_where_a_stamp_says_so(tmp_path: Path) -> None:
    model = load_weights(str(DEMO / "base"), "auto")
    model.model.norm.weight.data[0] += 1
    shutil.copytree(DEMO / "base", tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    bare = Path(shutil.copytree(UPPER, tmp_path / "bare"))
    (bare / STAMP_FILE).unlink()
    with serving(server_of(tmp_path)) as server:
        create(server.client, "stamped", UPPER)
        create(server.client, "bare", bare)
    base = {"model": str(tmp_path / "base"), "device": "cpu"}
    with serving(server_of(tmp_path, base=base)) as server:
        reasons = {name: item.not_served for name, item in listed(server.client).items()}
        assert "it has no stamp that says it fits" in reasons["bare"]
        assert reasons["stamped"]
        update(server.client, "bare", adapter_path=str(bare))  # On one's own responsibility.
    with serving(server_of(tmp_path, base=base)) as server:
        assert not listed(server.client)["bare"].not_served
    with serving(server_of(tmp_path)) as server:  # Negative control: the first base again.
        assert not listed(server.client)["stamped"].not_served


def test_rolling_back_twice_is_where_one_started(tmp_path: Path, adapter: Path) -> None:
    config = server_of(tmp_path, entry("it", ROT13))
    with serving(config) as server:
        client = server.client
        with pytest.raises(ServerError) as caught:
            rollback(client, "it")
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "NOTHING_TO_ROLL_BACK")
        first = listed(client)["it"]
        second = update(client, "it", adapter_path=str(adapter), policy=pb.POLICY_MERGED)
        back = rollback(client, "it", second.etag)
        assert (back.adapter_path, back.policy, back.adapter_digest) == (str(ROT13), first.policy, first.adapter_digest)
        assert client.generate("abc", deployment="it").text == "nop"
        with pytest.raises(ServerError) as caught:
            rollback(client, "it", second.etag)
        assert caught.value.reason == "ETAG_MISMATCH"
    with serving(config) as server:
        client = server.client
        again = rollback(client, "it")
        assert (again.adapter_path, again.policy) == (str(adapter), pb.POLICY_MERGED)
        assert again.adapter_digest == second.adapter_digest
        assert client.generate("abc", deployment="it").text == "ABC"
        rollback(client, "it")
        copy_of(SHIFT, adapter)
        before = listed(client)
        with pytest.raises(ServerError, match="now makes") as caught:
            rollback(client, "it")
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADAPTER_CHANGED")
        assert listed(client) == before


def test_a_change_that_cannot_be_saved_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    config = server_of(folder, entry("it", ROT13))
    with serving(config) as server:
        client, engine, manager = server.client, server.app.parts.engine, server.app.parts.manager
        create(client, "other", UPPER)
        before, loaded = listed(client), set(manager.adapters)
        remembered = state_file(config).read_bytes()
        os.rename(folder, tmp_path / "away")
        for attempt in (
            lambda: create(client, "new", SHIFT),
            lambda: update(client, "it", adapter_path=str(SHIFT)),
            lambda: update(client, "it", policy=pb.POLICY_MERGED),
            lambda: delete(client, "it"),
        ):
            with pytest.raises(ServerError, match="nothing was changed") as caught:
                attempt()
            assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "STATE_NOT_SAVED")
        assert listed(client) == before
        assert client.generate("abc", deployment="it").text == "nop"
        assert engine.call(lambda: set(manager.adapters)).result(10) == loaded
        os.rename(tmp_path / "away", folder)
        assert state_file(config).read_bytes() == remembered
        update(client, "it", adapter_path=str(SHIFT))  # Negative control.
        assert client.generate("abc", deployment="it").text == "bcd"
    assert json.loads(state_file(config).read_text())["deployments"][0]["current"]["wanted"]["adapter"] == str(SHIFT)
