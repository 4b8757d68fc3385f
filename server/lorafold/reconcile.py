"""Compares three things: what lorafold.toml declares, what it declared when last seen, and what clients made of it.

Pure: no adapters, no disk. docs/deployments.md has the same as a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafold.deployment_config import DeploymentConfig
from lorafold.state import Record, State


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What becomes of every deployment."""

    followed: tuple[tuple[DeploymentConfig, Record | None], ...]
    """Served as the file says, in its order; with what is remembered of the deployment."""
    kept: tuple[Record, ...]
    """Served as clients made them."""
    removed: tuple[Record, ...]
    """Deleted, as their entry is not in the file any more."""
    deleted: tuple[DeploymentConfig, ...]
    """Entries that stay deleted."""

    @property
    def new(self) -> tuple[tuple[DeploymentConfig, Record | None], ...]:
        """Those of `followed` that are not what the file says yet."""
        return tuple((entry, record) for entry, record in self.followed if not follows(record, entry))


def reconcile(state: State, entries: Sequence[DeploymentConfig]) -> Plan:
    """What becomes of the deployments of `state` under the file's `entries`."""
    records = {record.name: record for record in state.deployments}
    declared = {entry.name: entry for entry in entries}
    deleted = {entry.name: entry for entry in state.deleted if declared.get(entry.name) == entry}
    kept = {record.name: record for record in state.deployments if is_kept(record, declared)}
    followed = [entry for entry in entries if entry.name not in kept and entry.name not in deleted]
    names = {entry.name for entry in followed}
    return Plan(
        followed=tuple((entry, records.get(entry.name)) for entry in followed),
        kept=tuple(kept.values()),
        removed=tuple(record for record in state.deployments if record.name not in names | kept.keys()),
        deleted=tuple(deleted.values()),
    )


def is_kept(record: Record, declared: Mapping[str, DeploymentConfig]) -> bool:
    """True if clients decide what the deployment is. `declared`: the file's entries, by name."""
    entry = declared.get(record.name)
    return entry == record.declared and (entry is None or record.current.wanted != entry)


def follows(record: Record | None, entry: DeploymentConfig) -> bool:
    """True if the deployment is what `entry` says, and was declared so before."""
    return record is not None and record.declared == entry == record.current.wanted
