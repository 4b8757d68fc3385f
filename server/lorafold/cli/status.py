"""`lorafold status`: what a running server has in its weights and why, who waits, and what it has measured."""

from typing import TYPE_CHECKING

import click
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson

from lorafold.cli.common import address_option, connected, json_option

if TYPE_CHECKING:
    from lorafold.v1.weights_pb2 import GetFoldStateResponse, Residency


@click.command()
@json_option
@address_option
def status(as_json: bool, address: str) -> None:
    """Show what is folded and why, who waits, and what folding and unmerged steps cost."""
    from lorafold.v1 import deployment_pb2, weights_pb2

    with connected(address) as client:
        found = client.stubs.weights.GetFoldState(weights_pb2.GetFoldStateRequest())
        page = client.stubs.deployments.ListDeployments(deployment_pb2.ListDeploymentsRequest(page_size=1000))
    if as_json:
        click.echo(MessageToJson(found, indent=None, preserving_proto_field_name=True))
        return
    names: dict[str, list[str]] = {"": ["base"]}
    for item in page.deployments:
        names.setdefault(item.adapter_digest, []).append(item.name)
    for line in lines(found, {digest: ", ".join(some) for digest, some in names.items()}):
        click.echo(line)


def lines(found: "GetFoldStateResponse", names: dict[str, str]) -> list[str]:
    """For people. `names`: what each adapter is called."""
    state = found.fold_state
    said = [
        f"weights     {name_of(state.adapter_digest, names)}{', held by hand' if state.pinned else ''}",
        f"generation  {state.generation}",
        f"because     {named(state.reason, names)}",
    ]
    if found.under_way:
        said.append(f"ordered     {named(found.under_way, names)}")
    if found.HasField("decision"):
        wants = name_of(found.decision.adapter_digest, names)
        said.append(f"policy      {found.decision.cause}: {wants}; {named(found.decision.reason, names)}")
    for rows in found.queued:
        who = f"{name_of(rows.adapter_digest, names)} ({rows.policy})"
        place = "" if rows.on_device else ", for a place on the device"
        said.append(f"queue       {who}: {rows.running} running, {rows.waiting} waiting{place}")
    costs = found.costs
    if costs.fold.ToMicroseconds():
        said.append(f"fold        {ms(costs.fold)}, restore {ms(costs.restore)}, swap {ms(costs.swap)}")
    said += [
        f"steps       up to {step.rows} rows: plain {ms(step.plain)}, two-path {ms(step.two_path)}"
        for step in costs.steps
    ]
    said.append(f"adapters    {where(found.residency)}")
    for change in found.transitions:
        when = change.time.ToDatetime().isoformat(sep=" ", timespec="milliseconds")
        why = named(change.reason, names)
        said.append(f"{when}  {name_of(change.adapter_digest, names)} in {ms(change.took)}: {why}")
    return said


def name_of(digest: str, names: dict[str, str]) -> str:
    """What people call an adapter."""
    return names.get(digest, unnamed(digest))


def where(residency: "Residency") -> str:
    """Which memories adapters are in."""
    device = f"{residency.on_device} of {residency.known} on the device (slots: {residency.device_slots}, "
    device += f"{megabytes(residency.device_bytes, residency.device_budget_bytes)})"
    host = f"{residency.on_host} in memory ({megabytes(residency.host_bytes, residency.host_budget_bytes)})"
    return f"{device}; {host}; brought for requests {residency.fetches} times"


def megabytes(taken: int, most: int) -> str:
    """What is taken of a budget."""
    return f"{taken / 1e6:,.1f} of {most / 1e6:,.1f} MB" if most else f"{taken / 1e6:,.1f} MB"


def named(reason: str, names: dict[str, str]) -> str:
    """A reason with adapters called as people do."""
    for digest, name in names.items():
        if digest:
            reason = reason.replace(unnamed(digest), name)
    return reason


def unnamed(digest: str) -> str:
    """What the server calls an adapter in its reasons."""
    return f"adapter {digest[:12]}"


def ms(time: Duration) -> str:
    """Milliseconds, or that nobody knows yet."""
    found = time.ToMicroseconds() / 1000
    return f"{found:.{0 if found >= 100 else 1 if found >= 10 else 2}f} ms" if found else "not measured"
