"""The names that clients call. Lives on the event loop; the engine only ever sees content digests.

Creating and updating read, check and bind the adapter first, in a worker thread, while everything else goes on; only
when the adapter is on the device does the name point at it. Between resolving a name and submitting the request there
is no `await`, so a request is always in the engine's inbox before the release of the adapter it needs.
"""

import asyncio
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog

from lorafold.config import BASE, NAME_PATTERN
from lorafold.engine.loop import Engine
from lorafold.errors import DeploymentBusy, DeploymentExists, DeploymentNotFound, EtagMismatch, InvalidField
from lorafold.own_thread import in_own_thread
from lorafold.recipes import Recipe, Source
from lorafold.stamps import StampCheck
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import read_checkpoint
from lorafold_adapters.errors import AdapterUnsupported, DeltaLost
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.provenance import Source as Ingredient
from lorafold_adapters.routes import unrouted
from lorafold_adapters.stamp import Match

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """What folding an adapter would come to."""

    fidelity: Fidelity | None = None
    """None if it was not measured, as nothing folds the adapter."""
    refusal: str | None = None
    """Why the adapter is not folded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A name and what it points at."""

    name: str
    source: Source
    policy: PolicyKind
    bound: BoundAdapter
    folding: Folding
    match: Match
    """What the adapter's stamp says about the base."""
    ingredients: tuple[Ingredient, ...]
    """The adapters it is made of."""
    etag: str
    created: datetime
    updated: datetime

    @property
    def digest(self) -> str:
        """Content digest of the adapter."""
        return self.bound.digest

    @property
    def path(self) -> PolicyKind:
        """The policy that its requests follow: an adapter that has only one mode is served in that."""
        if self.policy is PolicyKind.AUTO and self.folding.refusal is not None:
            return PolicyKind.UNMERGED
        if self.policy is PolicyKind.AUTO and self.bound.route_refusal is not None:
            return PolicyKind.MERGED
        return self.policy


@dataclass(frozen=True, slots=True)
class Target:
    """What a request runs on."""

    adapter: str | None
    policy: PolicyKind


class Deployments:
    """All deployments of one server."""

    def __init__(self, manager: AdapterManager, engine: Engine, stamps: StampCheck, folder: Path) -> None:
        self._manager = manager
        self._engine = engine
        self._stamps = stamps
        self._folder = folder.absolute()
        self._by_name: dict[str, Deployment] = {}
        self._busy: set[str] = set()
        self._binding = asyncio.Lock()

    def resolve(self, name: str) -> Target:
        """What a request to `name` runs on, now. Raises DeploymentNotFound."""
        if name in ("", BASE):
            return Target(None, PolicyKind.UNMERGED)
        deployment = self.get(name)
        return Target(deployment.digest, deployment.path)

    def get(self, name: str) -> Deployment:
        """Raises DeploymentNotFound."""
        if name == BASE:
            raise DeploymentNotFound("'base' is built in: it can be called, but not looked up, changed or deleted")
        if name not in self._by_name:
            raise DeploymentNotFound(f"no deployment is named '{name}': list them, or create it first")
        return self._by_name[name]

    def all(self) -> list[Deployment]:
        """All of them, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def pointing_at(self, digest: str) -> list[str]:
        """Names of the deployments of one adapter."""
        return [deployment.name for deployment in self.all() if deployment.digest == digest]

    async def create(self, name: str, source: Source, policy: PolicyKind) -> Deployment:
        """Raises InvalidField, DeploymentExists, DeploymentBusy or a subclass of AdapterError."""
        check_name(name)
        with self._changing(name):
            if name in self._by_name:
                raise DeploymentExists(f"there is a deployment '{name}' already: update it, or choose another name")
            bound, match, ingredients = await self._read(source)
            folding = await self._put_on_device(bound, policy)
            now = datetime.now(UTC)
            deployment = Deployment(
                name=name,
                source=source,
                policy=policy,
                bound=bound,
                folding=folding,
                match=match,
                ingredients=ingredients,
                etag=uuid.uuid4().hex,
                created=now,
                updated=now,
            )
            self._by_name[name] = deployment
        log.info("deployment created", name=name, adapter=deployment.digest, policy=policy.value)
        return deployment

    async def update(self, name: str, source: Source | None, policy: PolicyKind | None, etag: str) -> Deployment:
        """Changes what is not None. Raises DeploymentNotFound, EtagMismatch, DeploymentBusy or an AdapterError."""
        with self._changing(name):
            old = self.get(name)
            self._check_etag(old, etag)
            policy = policy or old.policy
            bound, match, ingredients = old.bound, old.match, old.ingredients
            if source is not None:
                bound, match, ingredients = await self._read(source)
            folding = await self._put_on_device(bound, policy)
            new = replace(
                old,
                source=old.source if source is None else source,
                policy=policy,
                bound=bound,
                folding=folding,
                match=match,
                ingredients=ingredients,
                etag=uuid.uuid4().hex,
                updated=datetime.now(UTC),
            )
            self._by_name[name] = new
            self._release(old)
        log.info("deployment updated", name=name, adapter=new.digest, before=old.digest, policy=policy.value)
        return new

    async def delete(self, name: str, etag: str) -> None:
        """Raises DeploymentNotFound, EtagMismatch or DeploymentBusy."""
        with self._changing(name):
            old = self.get(name)
            self._check_etag(old, etag)
            del self._by_name[name]
            self._release(old)
        log.info("deployment deleted", name=name, adapter=old.digest)

    async def _read(self, source: Source) -> tuple[BoundAdapter, Match, tuple[Ingredient, ...]]:
        """Reads, checks and binds an adapter, or each part of a composition, and compares stamps with the base."""
        if not isinstance(source, Recipe):
            bound, match = await self._read_folder(source)
            return bound, match, (Ingredient(name=Path(source).name, digest=bound.digest, kind=bound.kind),)
        parts = [await self._read_folder(part.path) for part in source.parts]
        ingredients = tuple(
            Ingredient(name=Path(part.path).name, digest=bound.digest, kind=bound.kind, weight=part.weight)
            for (bound, _), part in zip(parts, source.parts, strict=True)
        )
        weighted = [(bound, part.weight) for (bound, _), part in zip(parts, source.parts, strict=True)]
        bound = await in_own_thread(self._manager.compose, weighted, source.spec)
        return await self._with_routes(bound), least_sure(match for _, match in parts), ingredients

    async def _read_folder(self, path: str) -> tuple[BoundAdapter, Match]:
        async with self._binding:
            checkpoint = await in_own_thread(read_checkpoint, self._folder / path)
            bound = await in_own_thread(self._manager.bind, checkpoint)
            match = await in_own_thread(self._stamps.check, checkpoint)
        return bound, match

    async def _with_routes(self, bound: BoundAdapter) -> BoundAdapter:
        """Module by module between steps of the engine, which would stand still for all of them."""
        routes = {}
        for module in unrouted(bound):
            work = partial(self._manager.route, bound, module)
            routes[module] = await asyncio.wrap_future(self._engine.call(work))
        return self._manager.with_routes(bound, routes)

    async def _put_on_device(self, bound: BoundAdapter, policy: PolicyKind) -> Folding:
        """Measures what a fold keeps of the adapter if the policy folds it, and loads it.

        Raises AdapterUnsupported or DeltaLost if the policy demands a mode that the adapter does not have.
        """
        if policy is PolicyKind.UNMERGED and bound.route_refusal is not None:
            raise AdapterUnsupported(f"the adapter cannot run unmerged: {bound.route_refusal}; deploy it merged")
        folding = Folding(refusal=bound.fold_refusal)
        if policy is not PolicyKind.UNMERGED:
            folding = await self._measured(bound)
        if folding.refusal is not None and (policy is PolicyKind.MERGED or bound.route_refusal is not None):
            await asyncio.wrap_future(self._engine.call(lambda: self._manager.gate.check(bound)))
        elif folding.refusal is not None and policy is PolicyKind.AUTO:
            log.warning("adapter stays unmerged", adapter=bound.digest, reason=folding.refusal)
        await asyncio.wrap_future(self._engine.call(lambda: self._engine.weights.acquire(bound)))
        return folding

    async def _measured(self, bound: BoundAdapter) -> Folding:
        """What a fold would keep; measured parameter by parameter, with steps of the engine between them."""
        if bound.fold_refusal is not None:
            return Folding(refusal=bound.fold_refusal)
        parameters = self._manager.gate.measure(bound)
        while await asyncio.wrap_future(self._engine.call(lambda: next(parameters, None))) is not None:
            pass
        fidelity = await asyncio.wrap_future(self._engine.call(lambda: self._manager.gate.fidelity(bound)))
        try:
            await asyncio.wrap_future(self._engine.call(lambda: self._manager.gate.check(bound)))
        except DeltaLost as error:
            return Folding(fidelity=fidelity, refusal=str(error))
        return Folding(fidelity=fidelity)

    def _release(self, deployment: Deployment) -> None:
        self._engine.call(lambda: self._engine.weights.release(deployment.digest))

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        if name in self._busy:
            raise DeploymentBusy(f"another call is changing '{name}' now: wait for it and try again")
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)

    @staticmethod
    def _check_etag(deployment: Deployment, etag: str) -> None:
        if etag and etag != deployment.etag:
            raise EtagMismatch(f"'{deployment.name}' was changed since you read it: get it again and decide anew")


def least_sure(matches: Iterable[Match]) -> Match:
    """What the stamps of several adapters say together."""
    found = set(matches)
    return next(match for match in (Match.UNSTAMPED, Match.OTHER_DTYPE, Match.SAME) if match in found)


def check_name(name: str) -> None:
    """Raises InvalidField unless `name` may be a deployment's."""
    if name == BASE or not re.fullmatch(NAME_PATTERN, name):
        raise InvalidField(
            "deployment.name",
            f"'{name}' is no name for a deployment: letters, digits, '.', '_' and '-', at most 63, and not 'base'",
        )
