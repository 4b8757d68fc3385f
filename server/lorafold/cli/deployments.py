"""`lorafold deployments`: the names that clients call, on a running server."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lorafold.cli.common import address_option, connected, json_option
from lorafold.cli.compositions import in_words, set_source, source_options

if TYPE_CHECKING:
    from lorafold.v1.deployment_pb2 import Deployment

POLICIES = click.Choice(["merged", "unmerged", "auto"])


def given(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuses "", which a script's empty variable would give, and which would ask for nothing."""
    if value == "":
        raise click.BadParameter("is empty: leave the option out, or give it a value", param=option)
    return value


etag_option = click.option("--etag", callback=given, help="Only if the deployment still has this etag.")


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Who comes first, how many at once, and who stays on the device."""
    priority = click.option("--priority", type=int, help="Requests of deployments with a higher one start first.")
    limit = click.option(
        "--max-concurrency", type=click.IntRange(min=0), help="Completions that run at once; 0: no limit of its own."
    )
    pinned = click.option("--pinned/--not-pinned", default=None, help="Keep the adapter on the device.")
    return priority(limit(pinned(command)))


@click.group()
def deployments() -> None:
    """List, create, update, roll back and delete deployments."""


@deployments.command("list")
@json_option
@address_option
def list_all(as_json: bool, address: str) -> None:
    """List every deployment."""
    from lorafold.v1 import deployment_pb2 as pb

    found: list[Deployment] = []
    token = ""
    with connected(address) as client:
        while True:
            page = client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest(page_token=token))
            found.extend(page.deployments)
            token = page.next_page_token
            if not token:
                break
    if as_json:
        click.echo(json.dumps([as_dict(item) for item in found]))
        return
    click.echo(f"{'NAME':<20} {'POLICY':<9} {'DIGEST':<13} {'KIND':<16} ADAPTER")
    for item in found:
        row = as_dict(item) | ({"kind": "NOT SERVED"} if item.not_served else {})
        click.echo(
            f"{row['name']:<20} {row['policy']:<9} {item.adapter_digest[:12]:<13} {row['kind']:<16} {row['adapter']}"
        )


@deployments.command()
@click.argument("name")
@json_option
@address_option
def get(name: str, as_json: bool, address: str) -> None:
    """Show one deployment."""
    from lorafold.v1 import deployment_pb2 as pb

    with connected(address) as client:
        show(client.stubs.deployments.GetDeployment(pb.GetDeploymentRequest(name=name)).deployment, as_json)


@deployments.command()
@click.argument("name")
@source_options
@click.option("--policy", type=POLICIES, default="auto", show_default=True)
@setting_options
@json_option
@address_option
def create(
    name: str,
    policy: str,
    priority: int | None,
    max_concurrency: int | None,
    pinned: bool | None,
    as_json: bool,
    address: str,
    **source: Any,
) -> None:
    """Make NAME callable."""
    from lorafold.v1 import deployment_pb2 as pb

    wanted = pb.Deployment(
        name=name, policy=policy_value(policy), priority=priority, max_concurrency=max_concurrency, pinned=pinned
    )
    if not set_source(wanted, source):
        raise click.UsageError("nothing to serve: give --adapter or --compose")
    with connected(address) as client:
        request = pb.CreateDeploymentRequest(deployment=wanted)
        show(client.stubs.deployments.CreateDeployment(request).deployment, as_json)


@deployments.command()
@click.argument("name")
@source_options
@click.option("--policy", type=POLICIES, help="Change the policy.")
@setting_options
@etag_option
@click.option("--wait", is_flag=True, help="Show how far it is, and wait until the adapter of before is gone.")
@json_option
@address_option
def update(
    name: str,
    policy: str | None,
    priority: int | None,
    max_concurrency: int | None,
    pinned: bool | None,
    etag: str | None,
    wait: bool,
    as_json: bool,
    address: str,
    **source: Any,
) -> None:
    """Point NAME at another adapter, or change its settings; requests in flight finish on what they started with."""
    from lorafold.cli.updates import followed
    from lorafold.v1 import deployment_pb2 as pb

    wanted = pb.Deployment(
        name=name, etag=etag or "", priority=priority, max_concurrency=max_concurrency, pinned=pinned
    )
    settings = (policy, priority, max_concurrency, pinned)
    if not set_source(wanted, source) and all(setting is None for setting in settings):
        raise click.UsageError(
            "nothing to change: give --adapter, --compose, --policy, --priority, --max-concurrency or --pinned"
        )
    if policy is not None:
        wanted.policy = policy_value(policy)
    with connected(address) as client:
        if wait:
            show(followed(client, wanted), as_json)
            return
        request = pb.UpdateDeploymentRequest(deployment=wanted)
        show(client.stubs.deployments.UpdateDeployment(request).deployment, as_json)


@deployments.command()
@click.argument("name")
@etag_option
@json_option
@address_option
def rollback(name: str, etag: str | None, as_json: bool, address: str) -> None:
    """Give NAME back the adapter and all settings that it had before its last update, also one of settings only."""
    from lorafold.v1 import deployment_pb2 as pb

    with connected(address) as client:
        request = pb.RollbackDeploymentRequest(name=name, etag=etag or "")
        show(client.stubs.deployments.RollbackDeployment(request).deployment, as_json)


@deployments.command()
@click.argument("name")
@etag_option
@address_option
def delete(name: str, etag: str | None, address: str) -> None:
    """Remove NAME; requests in flight finish first."""
    from lorafold.v1 import deployment_pb2 as pb

    with connected(address) as client:
        client.stubs.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name=name, etag=etag or ""))
    click.echo(f"deleted {name}")


def policy_value(policy: str) -> Any:
    """The API's value for a word of the command line."""
    from lorafold.v1.deployment_pb2 import Policy

    return Policy.Value(f"POLICY_{policy.upper()}")


def as_dict(item: "Deployment") -> dict[str, object]:
    """A deployment, for people and for JSON."""
    from lorafold.v1.deployment_pb2 import BaseMatch, Policy

    return {
        "name": item.name,
        "policy": Policy.Name(item.policy).removeprefix("POLICY_").lower(),
        "priority": item.priority,
        "max_concurrency": item.max_concurrency or None,
        "pinned": item.pinned,
        "adapter": in_words(item),
        "adapter_digest": item.adapter_digest,
        "kind": item.adapter_kind,
        "bound": f"{item.bound_modules} of {item.adapter_modules} modules",
        "base_match": BaseMatch.Name(item.base_match).removeprefix("BASE_MATCH_").lower().replace("_", " "),
        "unmerged_error": item.unmerged_error if item.HasField("unmerged_error") else None,
        **folding_dict(item),
        "not_served": item.not_served or None,
        "previous": in_words(item.previous) if item.HasField("previous") else None,
        "etag": item.etag,
        "updated": item.update_time.ToJsonString(),
    }


def folding_dict(item: "Deployment") -> dict[str, object]:
    """What a fold keeps of the adapter, and the modes it is refused."""
    found: dict[str, object] = {}
    if item.HasField("fidelity"):
        found["delta_over_weight"] = round(item.fidelity.delta_over_weight, 6)
        found["delta_error"] = round(item.fidelity.delta_error, 6)
        found["unchanged_share"] = round(item.fidelity.unchanged_share, 6)
    if item.fold_refusal:
        found["not_folded"] = item.fold_refusal
    if item.route_refusal:
        found["not_unmerged"] = item.route_refusal
    return found


def show(item: "Deployment", as_json: bool) -> None:
    """Prints one deployment."""
    row = as_dict(item)
    if as_json:
        click.echo(json.dumps(row))
        return
    for key, value in row.items():
        if value is not None:
            click.echo(f"{key:<15} {value}")
