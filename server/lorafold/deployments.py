"""The names that clients call. Lives on the event loop; the engine only ever sees content digests.

A change is saved, then in force: only when it is on the disk does the name point at another adapter, which is on the
device by then. Between resolving a name and submitting the request there is no `await`, so a request is always in the
engine's inbox before the release of the adapter it needs.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import structlog

from lorafold.config import BASE
from lorafold.deployment_config import NAME_PATTERN, DeploymentConfig
from lorafold.errors import DeploymentBusy, DeploymentNotFound, DeploymentUnservable, InvalidField
from lorafold.metrics import Metrics
from lorafold.metrics.adapters import Deployed
from lorafold.progress import Progress, Stage, Tell, nobody
from lorafold.staging import Staged, Staging
from lorafold.state import Record, State, Version
from lorafold.state_file import StateFile
from lorafold_adapters.policy import PolicyKind

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A name and what it points at."""

    record: Record
    staged: Staged | None = None
    """None: it is kept, but not served."""
    refusal: str = ""
    """Why it is not served."""

    @property
    def name(self) -> str:
        """What clients call."""
        return self.record.name

    @property
    def wanted(self) -> DeploymentConfig:
        """Its settings."""
        return self.record.current.wanted

    @property
    def digest(self) -> str:
        """Content digest of the adapter."""
        return self.record.current.digest

    @property
    def served(self) -> Staged:
        """What requests run on. Raises DeploymentUnservable."""
        if self.staged is None:
            raise DeploymentUnservable(
                f"'{self.name}' is not served: {self.refusal}; updating it, rolling it back or deleting it works"
            )
        return self.staged


@dataclass(frozen=True, slots=True)
class Target:
    """What a request runs on."""

    adapter: str | None
    policy: PolicyKind
    priority: int = 0
    max_concurrency: int | None = None


class Deployments:
    """All deployments of one server."""

    def __init__(self, staging: Staging, file: StateFile, metrics: Metrics) -> None:
        """`file`: where they are remembered."""
        self.staging = staging
        self._metrics = metrics
        self._file = file
        self._by_name: dict[str, Deployment] = {}
        self._deleted: dict[str, DeploymentConfig] = {}
        """Of the file, as it had them when clients deleted them."""
        self._busy: dict[str, asyncio.Future[None]] = {}
        self._saving = asyncio.Lock()

    @property
    def state(self) -> State:
        """What is to be remembered."""
        return state_of(self._by_name, self._deleted)

    def resolve(self, name: str) -> Target:
        """What a request to `name` runs on, now. Raises DeploymentNotFound or DeploymentUnservable."""
        if name in ("", BASE):
            return Target(None, PolicyKind.UNMERGED)
        deployment = self.get(name)
        wanted = deployment.wanted
        path = deployment.served.path(wanted.policy)
        return Target(deployment.digest, path, priority=wanted.priority, max_concurrency=wanted.max_concurrency)

    def has(self, name: str) -> bool:
        """True if there is a deployment of that name, beside the base's."""
        return name in self._by_name

    def get(self, name: str) -> Deployment:
        """Raises DeploymentNotFound."""
        if name == BASE:
            raise DeploymentNotFound("'base' is built in: it can be called, but not looked up, changed or deleted")
        if not self.has(name):
            raise DeploymentNotFound(f"no deployment is named '{name}': list them, or create it first")
        return self._by_name[name]

    def served(self, name: str) -> Staged | None:
        """What requests to it run on, if it is there and served."""
        found = self._by_name.get(name)
        return None if found is None else found.staged

    def all(self) -> list[Deployment]:
        """All of them, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def pointing_at(self, digest: str) -> list[str]:
        """Names of the deployments of one adapter."""
        return [found.name for found in self.all() if found.staged is not None and found.digest == digest]

    def forgotten(self, name: str) -> DeploymentConfig | None:
        """The file's entry of a deployment that a client deleted."""
        return self._deleted.get(name)

    async def commit(
        self,
        changes: Mapping[str, Deployment | None],
        deleted: Mapping[str, DeploymentConfig | None],
        tell: Tell = nobody,
    ) -> None:
        """Saves all changes, then puts them in force, and releases what is not pointed at any more. None deletes.

        `deleted`: the same for what is remembered of the file's entries that clients deleted. Raises StateNotSaved:
        then nothing has changed, and what was staged for the changes is released.
        """
        async with self._saving:
            after, forgotten = merged(self._by_name, changes), merged(self._deleted, deleted)
            before = {name: self._by_name.get(name) for name in changes}
            try:
                await self._file.write(state_of(after, forgotten))
            except BaseException:
                self._release(changes, before)
                raise
            tell(Progress(stage=Stage.SAVED))
            self._by_name, self._deleted = after, forgotten
            tell(Progress(stage=Stage.SWITCHED))
            self._release(before, changes)
            self._count(changes)

    @contextmanager
    def changing(self, *names: str) -> Iterator[None]:
        """Inside, nobody else changes them. Raises DeploymentBusy."""
        for name in names:
            if name in self._busy:
                raise DeploymentBusy(f"another call is changing '{name}' now: wait for it and try again")
        done = asyncio.get_running_loop().create_future()
        self._busy.update(dict.fromkeys(names, done))
        try:
            yield
        finally:
            for name in names:
                del self._busy[name]
            done.set_result(None)

    async def settled(self, names: list[str]) -> bool:
        """Waits for the calls that change `names` now; False if there was none, and then it did not wait."""
        calls = {self._busy[name] for name in names if name in self._busy}
        if calls:
            await asyncio.wait(calls)
        return bool(calls)

    def version(self, wanted: DeploymentConfig, staged: Staged) -> Version:
        """What is remembered of settings that are served now."""
        return Version(wanted=wanted, digest=staged.facts.digest, base=self.staging.reader.base)

    async def close(self) -> None:
        """Lets another server have the state file, once what is being saved is saved."""
        async with self._saving:
            self._file.close()

    def _count(self, changes: Mapping[str, Deployment | None]) -> None:
        """Tells the metrics what is in force now."""
        for name, deployment in changes.items():
            if deployment is None:
                self._metrics.forget(name)
            else:
                self._metrics.deployments.deployed(name, told(deployment))

    def _release(self, these: Mapping[str, Deployment | None], others: Mapping[str, Deployment | None]) -> None:
        """What is staged for these and not for the others."""
        for name, deployment in these.items():
            other = others[name]
            if deployment and deployment.staged and not (other and other.staged is deployment.staged):
                self.staging.release(deployment.staged)


def merged(old: Mapping[str, T], changes: Mapping[str, T | None]) -> dict[str, T]:
    """What is there after the changes, of which None removes."""
    return {name: value for name, value in {**old, **changes}.items() if value is not None}


def state_of(deployments: Mapping[str, Deployment], deleted: Mapping[str, DeploymentConfig]) -> State:
    """What is to be remembered of them."""
    records = tuple(deployments[name].record for name in sorted(deployments))
    return State(deployments=records, deleted=tuple(deleted[name] for name in sorted(deleted)))


def told(deployment: Deployment) -> Deployed:
    """What metrics say of it."""
    fidelity = deployment.staged.folding.fidelity if deployment.staged is not None else None
    return Deployed(
        adapter=deployment.digest,
        policy=deployment.wanted.policy.value,
        delta_error=None if fidelity is None else fidelity.delta_error,
    )


def check_name(name: str) -> None:
    """Raises InvalidField unless `name` may be a deployment's."""
    if name == BASE or not re.fullmatch(NAME_PATTERN, name):
        raise InvalidField(
            "deployment.name",
            f"'{name}' is no name for a deployment: letters, digits, '.', '_' and '-', at most 63, and not 'base'",
        )
