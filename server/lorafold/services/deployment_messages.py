"""`lorafold.v1.Deployment`, and what asks for one, to our own data and back."""

from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.timestamp_pb2 import Timestamp

from lorafold.changes import Change
from lorafold.deployment_config import DeploymentConfig
from lorafold.deployments import Deployment, check_name
from lorafold.errors import InvalidField
from lorafold.progress import Progress, Stage
from lorafold.recipes import Source
from lorafold.services import compositions
from lorafold.services.compositions import source_of
from lorafold.services.fields import refuse_unknown_fields, required
from lorafold.staging import Staged
from lorafold.state import Version
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.policy import PolicyKind
from lorafold_adapters.stamp import Match

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
STAGES = {
    Stage.READ: pb.UPDATE_STAGE_READ,
    Stage.BOUND: pb.UPDATE_STAGE_BOUND,
    Stage.MEASURED: pb.UPDATE_STAGE_MEASURED,
    Stage.STAGED: pb.UPDATE_STAGE_STAGED,
    Stage.SAVED: pb.UPDATE_STAGE_SAVED,
    Stage.SWITCHED: pb.UPDATE_STAGE_SWITCHED,
    Stage.DRAINING: pb.UPDATE_STAGE_DRAINING,
}
SETTINGS = ("priority", "max_concurrency", "pinned")
MASK = ("adapter_path", "composition", "policy", *SETTINGS)


def wanted_of(message: pb.Deployment) -> DeploymentConfig:
    """The settings of a deployment that is to be made. Raises InvalidField."""
    policy, source = policy_of(message.policy) or PolicyKind.AUTO, source_of(message)
    check_name(message.name)
    wanted = DeploymentConfig(name=message.name, adapter="", policy=policy).with_source(source)
    return settings_of(message, SETTINGS).applied(wanted)


def change_of(request: pb.UpdateDeploymentRequest | pb.StreamUpdateDeploymentRequest) -> Change:
    """What an update asks for. Raises InvalidField."""
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
    if missing := [name for name in SETTINGS if name in mask and not wanted.HasField(name)]:
        raise InvalidField(f"deployment.{missing[0]}", "is in the update mask but not set: set it")
    change = replace(settings_of(wanted, mask or SETTINGS), source=source, policy=policy)
    if change.empty:
        raise InvalidField("deployment", f"changes nothing: set one of {', '.join(MASK)}")
    return change


def settings_of(message: pb.Deployment, names: Sequence[str]) -> Change:
    """Those of `SETTINGS` that are named and set."""
    change = Change()
    if "priority" in names and message.HasField("priority"):
        change = replace(change, priority=message.priority)
    if "max_concurrency" in names and message.HasField("max_concurrency"):
        change = replace(change, max_concurrency=message.max_concurrency)
    if "pinned" in names and message.HasField("pinned"):
        change = replace(change, pinned=message.pinned)
    return change


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
    record, source = deployment.record, deployment.wanted.source
    created, updated = Timestamp(), Timestamp()
    created.FromDatetime(record.created)
    updated.FromDatetime(record.updated)
    message = pb.Deployment(
        name=deployment.name,
        adapter_path=path_of(source),
        composition=composition_of(source),
        policy=POLICIES[deployment.wanted.policy],
        priority=deployment.wanted.priority,
        max_concurrency=deployment.wanted.max_concurrency,
        pinned=deployment.wanted.pinned,
        adapter_digest=deployment.digest,
        etag=record.etag,
        create_time=created,
        update_time=updated,
        not_served=deployment.refusal,
        previous=None if record.previous is None else previous_of(record.previous),
    )
    if deployment.staged is not None:
        message.MergeFrom(served_of(deployment.staged))
    return message


def served_of(staged: Staged) -> pb.Deployment:
    """What clients see of an adapter that is served."""
    return pb.Deployment(
        adapter_kind=staged.facts.kind,
        bound_modules=staged.facts.bound,
        adapter_modules=staged.facts.targeted,
        base_match=MATCHES[staged.origin.match],
        fidelity=fidelity_of(staged.folding.fidelity),
        fold_refusal=staged.folding.refusal,
        route_refusal=staged.facts.route_refusal,
        unmerged_error=staged.facts.route_error,
    )


def previous_of(version: Version) -> pb.PreviousVersion:
    """What a rollback would bring back, for clients."""
    source = version.wanted.source
    return pb.PreviousVersion(
        adapter_path=path_of(source),
        composition=composition_of(source),
        policy=POLICIES[version.wanted.policy],
        adapter_digest=version.digest,
    )


def path_of(source: Source) -> str:
    """The adapter's folder; empty for a composition."""
    return source if isinstance(source, str) else ""


def composition_of(source: Source) -> pb.Composition | None:
    """The composition, if it is one."""
    return None if isinstance(source, str) else compositions.message_of(source)


def fidelity_of(found: Fidelity | None) -> pb.Fidelity | None:
    """The report on a fold, for clients."""
    if found is None:
        return None
    return pb.Fidelity(
        delta_over_weight=found.delta_over_weight,
        delta_error=found.delta_error,
        unchanged_share=found.unchanged_share,
    )


def progress_of(step: Progress) -> pb.UpdateProgress:
    """One step of an update, for clients."""
    return pb.UpdateProgress(
        stage=STAGES[step.stage],
        parameters_done=step.done,
        parameters_total=step.total,
        in_flight=step.in_flight,
    )
