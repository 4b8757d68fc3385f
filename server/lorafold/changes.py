"""What clients do to deployments: create, update, roll back, delete. Each stages, then commits, or changes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from lorafold.deployment_config import DeploymentConfig
from lorafold.deployments import Deployment, Deployments
from lorafold.errors import DeploymentExists, EtagMismatch, NothingToRollBack
from lorafold.progress import Progress, Stage, Tell, nobody
from lorafold.reading import Reading
from lorafold.recipes import Source
from lorafold.state import Record
from lorafold_adapters.policy import PolicyKind

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What an update changes; what is None stays."""

    source: Source | None = None
    policy: PolicyKind | None = None
    priority: int | None = None
    max_concurrency: int | None = None
    """0: as many as there is room for."""
    pinned: bool | None = None

    @property
    def empty(self) -> bool:
        """True if it changes nothing."""
        return self == Change()

    def applied(self, wanted: DeploymentConfig) -> DeploymentConfig:
        """The settings after it."""
        if self.source is not None:
            wanted = wanted.with_source(self.source)
        new: dict[str, object] = {"policy": self.policy, "priority": self.priority, "pinned": self.pinned}
        new = {key: value for key, value in new.items() if value is not None}
        if self.max_concurrency is not None:
            new["max_concurrency"] = self.max_concurrency or None
        return wanted.model_copy(update=new)


class Changes:
    """Changes the deployments of one server. Runs on the event loop."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments
        self._staging = deployments.staging
        self._reader = deployments.staging.reader

    async def create(self, wanted: DeploymentConfig) -> Deployment:
        """Raises DeploymentExists, DeploymentBusy, StateNotSaved or a subclass of AdapterError."""
        name = wanted.name
        with self._deployments.changing(name):
            if self._deployments.has(name):
                raise DeploymentExists(f"there is a deployment '{name}' already: update it, or choose another name")
            staged = await self._staging.put(await self._reader.read(wanted.source), wanted)
            record = Record.new(self._deployments.version(wanted, staged), self._deployments.forgotten(name))
            made = Deployment(record=record, staged=staged)
            await self._deployments.commit({name: made}, {name: None})
        log.info("deployment created", name=name, adapter=made.digest, policy=wanted.policy.value)
        return made

    async def update(
        self, name: str, change: Change, etag: str, tell: Tell = nobody, *, drain: bool = False
    ) -> Deployment:
        """Changes the settings; `drain`: and waits until the adapter of before is needed no more.

        Raises DeploymentNotFound, EtagMismatch, DeploymentBusy, StateNotSaved, AdapterChanged or an AdapterError.
        """
        with self._changed(name, etag) as old:
            if change.source is not None:
                reading = await self._reader.read(change.source, tell)
            elif old.staged is not None:
                reading = await self._staging.again(old.staged)
            else:
                reading = await self._reader.read_again(old.record.current, tell)
            new = await self._point(old, change.applied(old.wanted), reading, tell)
        if drain:
            await self._drained(old, tell)
        return new

    async def rollback(self, name: str, etag: str) -> Deployment:
        """Back to the settings and the adapter before the last update; again, and it is as it was.

        Raises DeploymentNotFound, EtagMismatch, DeploymentBusy, NothingToRollBack, AdapterChanged, StateNotSaved or an
        AdapterError.
        """
        with self._changed(name, etag) as old:
            version = old.record.previous
            if version is None:
                raise NothingToRollBack(f"'{name}' was never updated: there is nothing to go back to; update it")
            return await self._point(old, version.wanted, await self._reader.read_again(version))

    async def delete(self, name: str, etag: str) -> None:
        """Returns once the adapter's memory is free, or at once if another deployment points at it.

        Raises DeploymentNotFound, EtagMismatch, DeploymentBusy or StateNotSaved.
        """
        with self._changed(name, etag) as old:
            await self._deployments.commit({name: None}, {name: old.record.declared})
        log.info("deployment deleted", name=name, adapter=old.digest)
        await self._drained(old)

    @contextmanager
    def _changed(self, name: str, etag: str) -> Iterator[Deployment]:
        with self._deployments.changing(name):
            old = self._deployments.get(name)
            if etag and etag != old.record.etag:
                raise EtagMismatch(f"'{name}' was changed since you read it: get it again and decide anew")
            yield old

    async def _point(
        self, old: Deployment, wanted: DeploymentConfig, reading: Reading, tell: Tell = nobody
    ) -> Deployment:
        staged = await self._staging.put(reading, wanted, tell, instead_of=[old.staged] if old.staged else [])
        new = Deployment(record=old.record.pointing_at(self._deployments.version(wanted, staged)), staged=staged)
        await self._deployments.commit({old.name: new}, {}, tell)
        log.info("deployment updated", name=old.name, adapter=new.digest, before=old.digest, policy=wanted.policy.value)
        return new

    async def _drained(self, old: Deployment, tell: Tell = nobody) -> None:
        if old.staged is not None:
            async for count in self._staging.departing(old.digest):
                tell(Progress(stage=Stage.DRAINING, in_flight=count))
