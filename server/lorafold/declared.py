"""Makes deployments what the file and its clients say, at start and when the file is read again.

At start, what the file declares must be servable, or the server does not start; what clients made is kept even if it
cannot be served, with the reason. Later it is all of the file's changes or none.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import structlog

from lorafold.deployment_config import DeploymentConfig
from lorafold.deployments import Deployment, Deployments
from lorafold.errors import ConfigError, EngineStopped, StateNotSaved
from lorafold.reconcile import Plan, reconcile
from lorafold.staging import Staged, Staging
from lorafold.state import Record, State
from lorafold_adapters.errors import AdapterError, LorafoldError

log = structlog.get_logger(__name__)


async def bring_up(deployments: Deployments, state: State, entries: Sequence[DeploymentConfig]) -> None:
    """The deployments of a server that starts. Raises ConfigError that names the one that cannot be made."""
    plan = reconcile(state, entries)
    found: dict[str, Deployment] = {}
    for entry, record in plan.followed:
        found[entry.name] = await follow(deployments, entry, record)
    for record in plan.kept:
        found[record.name] = await keep(deployments.staging, record)
    try:
        await deployments.commit(found, {entry.name: entry for entry in plan.deleted})
    except StateNotSaved as error:
        raise ConfigError(str(error)) from error
    say_what_changed(plan, found)


async def reload(deployments: Deployments, entries: Sequence[DeploymentConfig]) -> Plan:
    """Puts the file's changes in force, all or none; returns what it has changed.

    Waits for the calls that change the same deployments, and those that come meanwhile are refused. Raises ConfigError,
    StateNotSaved or EngineStopped, and nothing has changed then.
    """
    plan = reconcile(deployments.state, entries)
    while await deployments.settled(names_of(plan, deployments.state)):
        plan = reconcile(deployments.state, entries)
    gone = forgotten(plan, deployments.state)
    with deployments.changing(*names_of(plan, deployments.state)):
        changes: dict[str, Deployment | None] = dict.fromkeys(record.name for record in plan.removed)
        before = [deployments.served(name) for name in names_of(plan, deployments.state)]
        with ExitStack() as staged:
            for entry, record in plan.new:
                made = await follow(deployments, entry, record, instead_of=[found for found in before if found])
                changes[entry.name] = made
                staged.callback(deployments.staging.release, made.served)
            staged.pop_all()
        await deployments.commit(changes, dict.fromkeys(gone))
    say_what_changed(plan, changes)
    return plan


def names_of(plan: Plan, state: State) -> list[str]:
    """Every name that the plan changes anything about."""
    named = {entry.name for entry, _ in plan.new} | {record.name for record in plan.removed}
    return sorted(named.union(forgotten(plan, state)))


def forgotten(plan: Plan, state: State) -> list[str]:
    """Names of entries that clients deleted, and that are declared otherwise now, or no more."""
    stay = {entry.name for entry in plan.deleted}
    return [entry.name for entry in state.deleted if entry.name not in stay]


async def follow(
    deployments: Deployments, entry: DeploymentConfig, record: Record | None, *, instead_of: Iterable[Staged] = ()
) -> Deployment:
    """A deployment as the file says, staged. `instead_of`: see `Staging.put`. Raises ConfigError."""
    staging = deployments.staging
    try:
        staged = await staging.put(await staging.reader.read(entry.source), entry, instead_of=instead_of)
    except AdapterError as error:
        raise ConfigError(f"deployment '{entry.name}': {error}") from error
    version = deployments.version(entry, staged)
    record = Record.new(version, entry) if record is None else record.following(version)
    return Deployment(record=record, staged=staged)


async def keep(staging: Staging, record: Record) -> Deployment:
    """A deployment as clients made it; not served if what it served is not there any more."""
    version = record.current
    try:
        staged = await staging.put(await staging.reader.read_again(version), version.wanted)
    except EngineStopped:
        raise
    except LorafoldError as error:
        log.warning("deployment is kept, but not served", name=record.name, reason=str(error))
        return Deployment(record=record, refusal=str(error))
    return Deployment(record=record, staged=staged)


def say_what_changed(plan: Plan, found: Mapping[str, Deployment | None]) -> None:
    """Logs what the file has made of deployments that were there before."""
    for record in plan.removed:
        log.info("deployment deleted, as the file has it no more", name=record.name, adapter=record.current.digest)
    for entry in plan.deleted:
        log.warning("deployment stays deleted, as a client wanted: create it, or change its entry", name=entry.name)
    for entry, before in plan.followed:
        now = found.get(entry.name)
        if before is None or now is None:
            continue
        facts = {"name": entry.name, "adapter": now.digest, "before": before.current.digest}
        if before.declared is None:
            log.warning("deployment of a client is now what the file says", **facts)
        elif before.current.wanted != entry:
            log.info("deployment is now what the file says", **facts)
        elif before.current.digest != now.digest:
            log.warning("deployment has the new content of its folder", **facts)
