"""What a server remembers of its deployments, as plain data: the content of its state file.

A deployment's settings are a `DeploymentConfig`, an entry of `lorafold.toml`: a setting that is added there is
remembered with no change here, and has its default in older files. `VERSION` must grow then, so that older servers
refuse newer files.
"""

import uuid
from datetime import UTC, datetime
from typing import Annotated, Self

from pydantic import AwareDatetime, Field

from lorafold.deployment_config import DeploymentConfig, Section

VERSION = 1


class Version(Section):
    """What a deployment was acknowledged to serve."""

    wanted: DeploymentConfig
    digest: str
    """Content digest of the adapter."""
    base: str
    """Fingerprint of the base that it was deployed on."""

    def serves_as(self, other: "Version") -> bool:
        """True if clients could not tell the two apart."""
        return self.wanted == other.wanted and self.digest == other.digest


class Record(Section):
    """One deployment."""

    current: Version
    etag: str
    created: AwareDatetime
    updated: AwareDatetime
    previous: Version | None = None
    """Before the last update, for a rollback."""
    declared: DeploymentConfig | None = None
    """Its entry in `lorafold.toml` as it was last seen; None if there is none."""

    @property
    def name(self) -> str:
        """What clients call."""
        return self.current.wanted.name

    @classmethod
    def new(cls, version: Version, declared: DeploymentConfig | None) -> Self:
        """Of a deployment that is made now."""
        now = datetime.now(UTC)
        return cls(current=version, etag=new_etag(), created=now, updated=now, declared=declared)

    def pointing_at(self, version: Version) -> Self:
        """The record after an update to `version`; what was there before it is the previous one."""
        previous = self.previous if version.serves_as(self.current) else self.current
        changes = {"current": version, "previous": previous, "etag": new_etag(), "updated": datetime.now(UTC)}
        return self.model_copy(update=changes)

    def following(self, version: Version) -> Self:
        """The record once the file's entry was served as `version`."""
        same = version.serves_as(self.current)
        record = self.model_copy(update={"current": version}) if same else self.pointing_at(version)
        return record.model_copy(update={"declared": version.wanted})


class State(Section):
    """All deployments of one server."""

    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    deployments: tuple[Record, ...] = ()
    deleted: tuple[DeploymentConfig, ...] = ()
    """Entries of `lorafold.toml` whose deployments were deleted by clients, as the file had them then."""


def new_etag() -> str:
    """Another one every time."""
    return uuid.uuid4().hex
