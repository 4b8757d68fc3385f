"""Every row of the table in docs/deployments.md: what is declared, what was declared, what clients made of it."""

import pytest

from lorafold.deployment_config import DeploymentConfig
from lorafold.reconcile import reconcile
from lorafold.state import Record, State, Version

NAME = "it"


def made(adapter: str) -> DeploymentConfig:
    return DeploymentConfig(name=NAME, adapter=adapter)


def remembered(declared: str | None, current: str | None) -> State:
    """`declared`: the adapter in the file as it was last seen; `current`: what is served, None if it was deleted."""
    last_seen = None if declared is None else made(declared)
    if current is None:
        return State(deleted=() if last_seen is None else (last_seen,))
    version = Version(wanted=made(current), digest="d", base="b")
    return State(deployments=(Record.new(version, last_seen),))


# In the file now, in the file when last seen, what clients made of it; and the adapter that is served then.
ROWS = {
    "made first by the file": ("a", None, None, "file"),
    "nothing changed": ("a", "a", "a", "file"),
    "changed by a client": ("a", "a", "x", "client"),
    "changed in the file": ("b", "a", "a", "file"),
    "changed in both": ("b", "a", "x", "file"),
    "the same change in both": ("x", "a", "x", "file"),
    "removed from the file": (None, "a", "a", "gone"),
    "removed from the file, changed by a client": (None, "a", "x", "gone"),
    "deleted by a client": ("a", "a", None, "gone"),
    "deleted by a client, changed in the file": ("b", "a", None, "file"),
    "deleted by both": (None, "a", None, "gone"),
    "made by a client": (None, None, "x", "client"),
    "made by a client, and now in the file": ("b", None, "x", "file"),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table(row: str) -> None:
    now, seen, current, winner = ROWS[row]
    entries = [] if now is None else [made(now)]
    plan = reconcile(remembered(seen, current), entries)
    assert [entry.adapter for entry, _ in plan.followed] == ([now] if winner == "file" else [])
    assert [record.current.wanted.adapter for record in plan.kept] == ([current] if winner == "client" else [])
    assert bool(plan.removed) == (winner == "gone" and current is not None)
    assert plan.deleted == (tuple(entries) if winner == "gone" else ())


@pytest.mark.parametrize("row", ROWS)
def test_names_do_not_disturb_each_other(row: str) -> None:
    now, seen, current, _ = ROWS[row]
    entries = [] if now is None else [made(now)]
    other = DeploymentConfig(name="other", adapter="o")
    state = remembered(seen, current)
    both = state.model_copy(
        update={"deployments": (*state.deployments, Record.new(Version(wanted=other, digest="o", base="b"), other))}
    )
    alone, beside = reconcile(state, entries), reconcile(both, [*entries, other])
    assert [entry for entry, _ in beside.followed] == [*(entry for entry, _ in alone.followed), other]
    assert (beside.kept, beside.removed, beside.deleted) == (alone.kept, alone.removed, alone.deleted)


def test_an_entry_that_is_followed_already_is_not_new() -> None:
    assert reconcile(remembered("a", "a"), [made("a")]).new == ()
    assert len(reconcile(remembered("a", "a"), [made("b")]).new) == 1  # Negative control.
    assert len(reconcile(remembered(None, "a"), [made("a")]).new) == 1


def test_a_thousand_entries_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [DeploymentConfig(name=f"d{number}", adapter="a") for number in range(1000)]
    records = [Record.new(Version(wanted=entry, digest="d", base="b"), entry) for entry in entries[:500]]
    state = State(deployments=tuple(records), deleted=tuple(entries[500:]))
    compared = [0]
    real = DeploymentConfig.__eq__

    def counted(one: DeploymentConfig, other: object) -> bool:
        compared[0] += 1
        return real(one, other)

    monkeypatch.setattr(DeploymentConfig, "__eq__", counted)
    plan = reconcile(state, entries)
    assert (len(plan.followed), len(plan.deleted), plan.new) == (500, 500, ())
    assert 1000 <= compared[0] < 6000
