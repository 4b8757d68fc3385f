"""The state file: read back as it was written, refused whole where it cannot be, and never of two servers."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from lorafold.deployment_config import DeploymentConfig
from lorafold.errors import ConfigError, EngineStopped, StateNotSaved
from lorafold.state import VERSION, Record, State, Version
from lorafold.state_file import StateFile
from lorafold_adapters.policy import PolicyKind

PARTS = [{"adapter": "ä\n", "weight": -1 / 3}, {"adapter": "'"}]
COMPOSED = {"compose": {"method": "dare_ties", "density": 0.1, "seed": 7, "parts": PARTS}, "policy": "merged"}


def version(name: str, digest: str = "d", **fields: object) -> Version:
    wanted = DeploymentConfig.model_validate({"name": name, "adapter": "x", **fields})
    return Version(wanted=wanted, digest=digest, base="b")


def composed(name: str) -> DeploymentConfig:
    return DeploymentConfig.model_validate({"name": name, **COMPOSED})


def some_state() -> State:
    plain = Record.new(version("plain"), None)
    mixed = Record.new(Version(wanted=composed("mix"), digest="d", base="b"), None)
    records = (plain.pointing_at(version("plain", "e", policy="unmerged")), mixed.following(mixed.current))
    return State(deployments=records, deleted=(composed("gone"),))


def opened(file: Path) -> State:
    """What a server that starts would read."""
    state_file = StateFile(file)
    try:
        return state_file.read()
    finally:
        state_file.close()


def written(file: Path, state: State) -> None:
    state_file = StateFile(file)
    try:
        asyncio.run(state_file.write(state))
    finally:
        state_file.close()


def test_a_file_that_is_not_there_is_an_empty_state(tmp_path: Path) -> None:
    assert opened(tmp_path / "s.json") == State()
    assert not (tmp_path / "s.json").exists()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    state = some_state()
    written(tmp_path / "s.json", state)
    assert opened(tmp_path / "s.json") == state
    assert state != State()  # Negative control.


def test_a_field_that_is_not_written_has_its_default(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    written(file, some_state())
    content = json.loads(file.read_text())
    del content["deployments"][0]["current"]["wanted"]["policy"]
    file.write_text(json.dumps(content))
    assert opened(file).deployments[0].current.wanted.policy is PolicyKind.AUTO


def damaged(content: str) -> dict[str, str]:
    """One file for each way to be wrong."""
    state = json.loads(content)
    twice = {**state, "deployments": state["deployments"] * 2}
    extra = {**state, "more": 1}
    missing = json.loads(content)
    del missing["deployments"][0]["etag"]
    return {
        "empty": "",
        "truncated": content[: len(content) // 2],
        "no object": "[]",
        "no JSON": "\0",
        "nested": "[" * 100_000,
        "twice": json.dumps(twice),
        "unknown key": json.dumps(extra),
        "missing key": json.dumps(missing),
        "newer": json.dumps({**state, "version": VERSION + 1, "more": 1}),
        "no version": json.dumps({**state, "version": "1"}),
    }


WORDS = {"newer": "was written by a newer lorafold", "twice": "'plain' is there twice"}


@pytest.mark.parametrize("kind", sorted(damaged(some_state().model_dump_json())))
def test_a_damaged_file_is_refused_with_a_sentence_and_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    content = damaged(some_state().model_dump_json())[kind].encode()
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        opened(file)
    sentence = str(caught.value)
    assert WORDS.get(kind, "is damaged") in sentence
    assert str(file) in sentence
    assert "\n" not in sentence
    assert file.read_bytes() == content


def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = StateFile(tmp_path / "s.json")
    with pytest.raises(ConfigError, match="another server uses the state file"):
        StateFile(tmp_path / "s.json")
    StateFile(tmp_path / "other.json").close()  # Negative control.
    first.close()
    StateFile(tmp_path / "s.json").close()


def test_a_link_is_the_file_it_points_at(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "s.json").symlink_to(tmp_path / "there" / "real.json")
    written(tmp_path / "s.json", some_state())
    assert (tmp_path / "s.json").is_symlink()
    assert opened(tmp_path / "there" / "real.json") == opened(tmp_path / "s.json") != State()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there: make it"):
        StateFile(tmp_path / "nowhere" / "s.json")


def test_what_a_killed_server_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / f".s.json.{'0a' * 16}"
    others = [tmp_path / f".s.json.{'0g' * 16}", tmp_path / f".t.json.{'0a' * 16}", tmp_path / ".s.json.backup"]
    for file in (left, *others):
        file.write_text("{")
    assert opened(tmp_path / "s.json") == State()
    assert not left.exists()
    assert all(file.exists() for file in others)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "s.json"
    file.parent.mkdir()
    state_file = StateFile(file)
    asyncio.run(state_file.write(some_state()))
    before = file.read_bytes()
    os.rename(file.parent, tmp_path / "moved")
    with pytest.raises(StateNotSaved, match="nothing was changed"):
        asyncio.run(state_file.write(State()))
    os.rename(tmp_path / "moved", file.parent)
    assert file.read_bytes() == before
    asyncio.run(state_file.write(State()))  # Negative control.
    assert file.read_bytes() != before
    state_file.close()


def test_nothing_is_written_once_it_is_closed(tmp_path: Path) -> None:
    state_file = StateFile(tmp_path / "s.json")
    state_file.close()
    with pytest.raises(EngineStopped):
        asyncio.run(state_file.write(State()))
    assert not (tmp_path / "s.json").exists()


def test_without_a_file_nothing_is_remembered() -> None:
    state_file = StateFile(None)
    asyncio.run(state_file.write(some_state()))
    assert state_file.read() == State()


def test_an_update_remembers_what_was_before_and_one_that_changes_nothing_does_not() -> None:
    record = Record.new(version("a", "1"), None)
    second = record.pointing_at(version("a", "2"))
    assert second.previous == record.current
    assert second.etag != record.etag
    assert second.created == record.created
    again = second.pointing_at(version("a", "2"))
    assert again.previous == record.current
    assert again.etag != second.etag
