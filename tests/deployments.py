"""Deployments as a client changes them, and servers that come back."""

import json
import shutil
from pathlib import Path
from typing import Any

from lorafold.client import Client, translated
from lorafold.config import Config
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.stamp import STAMP_FILE
from tests.conftest import DEMO, demo_config_in


def create(client: Client, name: str, adapter: Path | str, policy: str = "unmerged") -> pb.Deployment:
    wanted = pb.Deployment(name=name, adapter_path=str(adapter), policy=f"POLICY_{policy.upper()}")
    with translated():
        response = client.stubs.deployments.CreateDeployment(pb.CreateDeploymentRequest(deployment=wanted))
    made: pb.Deployment = response.deployment
    return made


def update(client: Client, name: str, etag: str = "", **fields: Any) -> pb.Deployment:
    wanted = pb.Deployment(name=name, etag=etag, **fields)
    with translated():
        response = client.stubs.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=wanted))
    made: pb.Deployment = response.deployment
    return made


def rollback(client: Client, name: str, etag: str = "") -> pb.Deployment:
    with translated():
        response = client.stubs.deployments.RollbackDeployment(pb.RollbackDeploymentRequest(name=name, etag=etag))
    made: pb.Deployment = response.deployment
    return made


def delete(client: Client, name: str, etag: str = "", timeout: float | None = None) -> None:
    with translated():
        client.stubs.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name=name, etag=etag), timeout=timeout)


def listed(client: Client) -> dict[str, pb.Deployment]:
    """Every deployment, as it is told."""
    found = client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest()).deployments
    return {item.name: item for item in found}


def entry(name: str, adapter: Path | str, policy: str = "unmerged") -> dict[str, object]:
    """A `[[deployments]]` table."""
    return {"name": name, "adapter": str(adapter), "policy": policy}


def server_of(folder: Path, *entries: dict[str, object], **sections: object) -> Config:
    """The demo's base with these deployments; its state file lies in `folder`, so that it can come back."""
    return demo_config_in(folder, deployments=list(entries), **sections)


def copy_of(adapter: Path, folder: Path, revision: str = "another") -> Path:
    """A copy in `folder` with another digest for each revision, and the same behaviour."""
    shutil.rmtree(folder, ignore_errors=True)
    copy = Path(shutil.copytree(adapter, folder))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": revision}))
    (copy / STAMP_FILE).unlink()  # It is for the adapter that was copied.
    return copy


ROT13, UPPER, SHIFT = DEMO / "rot13", DEMO / "upper", DEMO / "shift"
