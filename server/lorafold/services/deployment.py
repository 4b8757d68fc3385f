"""`lorafold.v1.DeploymentService`: names and what they point at."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from lorafold.deployments import Deployment, Deployments
from lorafold.errors import InvalidField
from lorafold.recipes import Source
from lorafold.services import compositions
from lorafold.services.compositions import source_of
from lorafold.services.fields import refuse_unknown_fields, required
from lorafold.services.status import translated
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import deployment_pb2_grpc
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.stamp import Match

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE, MAX_PAGE = 50, 1000
POLICIES = {
    PolicyKind.MERGED: pb.POLICY_MERGED,
    PolicyKind.UNMERGED: pb.POLICY_UNMERGED,
    PolicyKind.AUTO: pb.POLICY_AUTO,
}
KINDS: dict[int, PolicyKind] = {value: kind for kind, value in POLICIES.items()}
MATCHES = {
    Match.SAME: pb.BASE_MATCH_SAME,
    Match.OTHER_DTYPE: pb.BASE_MATCH_OTHER_DTYPE,
    Match.UNSTAMPED: pb.BASE_MATCH_UNSTAMPED,
}
MASK = ("adapter_path", "composition", "policy")


class DeploymentService(deployment_pb2_grpc.DeploymentServiceServicer):
    """Translates. Changes go on to their end even if the caller hangs up."""

    def __init__(self, deployments: Deployments) -> None:
        self._deployments = deployments

    async def CreateDeployment(
        self, request: pb.CreateDeploymentRequest, context: Context
    ) -> pb.CreateDeploymentResponse:
        """Callable once this returns."""
        async with translated(context):
            refuse_unknown_fields(request)
            required(request, "deployment")
            wanted = request.deployment
            policy = policy_of(wanted.policy) or PolicyKind.AUTO
            source = source_of(wanted)
            made = await asyncio.shield(self._deployments.create(wanted.name, source, policy))
            return pb.CreateDeploymentResponse(deployment=message_of(made))

    async def GetDeployment(self, request: pb.GetDeploymentRequest, context: Context) -> pb.GetDeploymentResponse:
        """One by its name."""
        async with translated(context):
            refuse_unknown_fields(request)
            return pb.GetDeploymentResponse(deployment=message_of(self._deployments.get(request.name)))

    async def ListDeployments(self, request: pb.ListDeploymentsRequest, context: Context) -> pb.ListDeploymentsResponse:
        """A page of them in the order of their names; a page token is the last name of the page before."""
        async with translated(context):
            refuse_unknown_fields(request)
            size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
            rest = [item for item in self._deployments.all() if item.name > request.page_token]
            more = rest[size - 1].name if len(rest) > size else ""
            return pb.ListDeploymentsResponse(
                deployments=[message_of(item) for item in rest[:size]], next_page_token=more
            )

    async def UpdateDeployment(
        self, request: pb.UpdateDeploymentRequest, context: Context
    ) -> pb.UpdateDeploymentResponse:
        """The hot swap."""
        async with translated(context):
            refuse_unknown_fields(request)
            required(request, "deployment")
            wanted, mask = request.deployment, list(request.update_mask.paths)
            for path in mask:
                if path not in MASK:
                    raise InvalidField("update_mask", f"'{path}' cannot be updated: {', '.join(MASK)} can")
            policy = policy_of(wanted.policy) if not mask or "policy" in mask else None
            source = new_source(wanted, mask)
            if "policy" in mask and policy is None:
                raise InvalidField("deployment.policy", "is in the update mask but not set: set it")
            if source is None and policy is None:
                raise InvalidField("deployment", "changes nothing: set adapter_path, composition or policy")
            update = self._deployments.update(wanted.name, source, policy, wanted.etag)
            return pb.UpdateDeploymentResponse(deployment=message_of(await asyncio.shield(update)))

    async def DeleteDeployment(
        self, request: pb.DeleteDeploymentRequest, context: Context
    ) -> pb.DeleteDeploymentResponse:
        """Requests in flight finish."""
        async with translated(context):
            refuse_unknown_fields(request)
            await asyncio.shield(self._deployments.delete(request.name, request.etag))
            return pb.DeleteDeploymentResponse()


def policy_of(value: int) -> PolicyKind | None:
    """None if unset. Raises InvalidField."""
    if value == pb.POLICY_UNSPECIFIED:
        return None
    if value not in KINDS:
        raise InvalidField("deployment.policy", f"{value} is no policy: use MERGED, UNMERGED or AUTO")
    return KINDS[value]


def new_source(wanted: pb.Deployment, mask: Sequence[str]) -> Source | None:
    """Where an update points, None if it leaves that as it is. Raises InvalidField."""
    named = {"adapter_path", "composition"} & set(mask)
    if not mask:
        return source_of(wanted) if wanted.adapter_path or wanted.HasField("composition") else None
    if len(named) == 2:
        raise InvalidField("update_mask", "names adapter_path and composition: a deployment has one of the two")
    if "composition" in named and not wanted.HasField("composition"):
        raise InvalidField("deployment.composition", "is in the update mask but not set: set it")
    part = pb.Deployment()
    if "composition" in named:
        part.composition.CopyFrom(wanted.composition)
    else:
        part.adapter_path = wanted.adapter_path
    return source_of(part) if named else None


def message_of(deployment: Deployment) -> pb.Deployment:
    """As clients see it."""
    created, updated = Timestamp(), Timestamp()
    created.FromDatetime(deployment.created)
    updated.FromDatetime(deployment.updated)
    source = deployment.source
    return pb.Deployment(
        name=deployment.name,
        adapter_path=source if isinstance(source, str) else "",
        composition=None if isinstance(source, str) else compositions.message_of(source),
        policy=POLICIES[deployment.policy],
        adapter_digest=deployment.digest,
        adapter_kind=deployment.bound.kind,
        bound_modules=deployment.bound.bound,
        adapter_modules=deployment.bound.targeted,
        base_match=MATCHES[deployment.match],
        fidelity=fidelity_of(deployment.folding.fidelity),
        fold_refusal=deployment.folding.refusal,
        route_refusal=deployment.bound.route_refusal,
        unmerged_error=deployment.bound.route_error,
        etag=deployment.etag,
        create_time=created,
        update_time=updated,
    )


def fidelity_of(found: Fidelity | None) -> pb.Fidelity | None:
    """The report on a fold, for clients."""
    if found is None:
        return None
    return pb.Fidelity(
        delta_over_weight=found.delta_over_weight,
        delta_error=found.delta_error,
        unchanged_share=found.unchanged_share,
    )
