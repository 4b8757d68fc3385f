"""A server with more deployments than device slots and little host memory: answers, pins, folders that change."""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafold.client import ServerError
from lorafold.declared import reload
from lorafold.demo.reference import Reference
from lorafold.v1 import weights_pb2
from tests.conftest import DEMO, serving
from tests.deployments import copy_of, create, delete, entry, listed, server_of, update

NAMES = ["upper", "rot13", "shift", "swapcase", "vowels"]
SMALL = {"device_slots": 2, "host_memory_gib": 0.001}
"""A demo adapter takes 0.3 MB of host memory."""


@pytest.mark.parametrize("policy", ["unmerged", "auto", "merged"])
def test_five_deployments_on_two_slots_answer_as_if_alone(tmp_path: Path, reference: Reference, policy: str) -> None:
    config = server_of(tmp_path, *(entry(name, DEMO / name, policy) for name in NAMES), residency=SMALL)
    with serving(config) as server, ThreadPoolExecutor(10) as pool:
        asked = [
            (name, pool.submit(server.client.generate, "Many names", deployment=name, max_tokens=16))
            for name in NAMES * 6
        ]
        for name, answer in asked:
            assert tuple(answer.result(60).token_ids) == reference.answer("Many names", str(DEMO / name), 16)
        manager = server.app.parts.manager
        assert len(server.app.parts.engine.call(lambda: manager.adapters).result(10)) == 2
        assert server.client.stubs.weights.VerifyBase(weights_pb2.VerifyBaseRequest()).restored


def test_a_folder_that_changed_since_it_was_deployed_is_not_served_for_the_old_one(tmp_path: Path) -> None:
    adapter = copy_of(DEMO / "rot13", tmp_path / "adapter", "first")
    entries = [entry(name, DEMO / name) for name in ("upper", "shift", "vowels", "swapcase")]
    with serving(server_of(tmp_path, entry("it", adapter), *entries, residency=SMALL)) as server:
        client = server.client
        assert client.generate("abc", deployment="it").text == "nop"
        copy_of(DEMO / "upper", adapter, "second")
        for name in ("upper", "shift", "vowels", "swapcase") * 2:
            client.generate("abc", deployment=name)
        with pytest.raises(ServerError, match="now makes") as caught:
            client.generate("abc", deployment="it")
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADAPTER_CHANGED")
        shutil.rmtree(adapter)
        with pytest.raises(ServerError, match="no adapter folder") as caught:
            client.generate("abc", deployment="it")
        assert caught.value.code == "NOT_FOUND"
        update(client, "it", adapter_path=str(DEMO / "shift"))
        assert client.generate("abc", deployment="it").text == "bcd"


def test_pinning_is_kept_and_refused_when_no_slot_would_be_left(tmp_path: Path) -> None:
    config = server_of(tmp_path, {**entry("pinned", DEMO / "upper"), "pinned": True}, residency=SMALL)
    with serving(config) as server:
        client, manager = server.client, server.app.parts.manager
        assert listed(client)["pinned"].pinned
        digest = listed(client)["pinned"].adapter_digest
        for name in ("rot13", "shift", "vowels"):
            create(client, name, DEMO / name)
            client.generate("abc", deployment=name)
        on_device = server.app.parts.engine.call(lambda: manager.adapters).result(10)
        assert digest in on_device
        before = listed(client)
        with pytest.raises(ServerError, match="pin fewer, or raise it") as caught:
            update(client, "rot13", pinned=True)
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "DEVICE_FULL")
        assert listed(client) == before
        assert not update(client, "pinned", pinned=False).pinned
        assert update(client, "rot13", pinned=True).pinned
        assert client.generate("abc", deployment="rot13").text == "nop"
        delete(client, "rot13")


def test_a_pin_goes_over_to_the_new_adapter_and_to_another_deployment(tmp_path: Path) -> None:
    """Two slots, of which one may be pinned: a hot swap of the pinned one, then a file that pins another one."""
    declared = [{**entry("one", DEMO / "upper"), "pinned": True}, entry("other", DEMO / "rot13")]
    with serving(server_of(tmp_path, *declared, residency=SMALL)) as server:
        client = server.client
        assert update(client, "one", adapter_path=str(DEMO / "shift")).pinned
        assert client.generate("abc", deployment="one").text == "bcd"
        moved = [entry("one", DEMO / "upper"), {**entry("other", DEMO / "rot13"), "pinned": True}]
        entries = server_of(tmp_path, *moved, residency=SMALL).deployments
        asyncio.run_coroutine_threadsafe(reload(server.app.parts.deployments, entries), server.loop).result(60)
        assert {name: item.pinned for name, item in listed(client).items()} == {"one": False, "other": True}
        assert [client.generate("abc", deployment=name).text for name in ("one", "other")] == ["ABC", "nop"]
        with pytest.raises(ServerError, match="pin fewer"):  # Negative control.
            update(client, "one", pinned=True)
