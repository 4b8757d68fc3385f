"""`lorafold advise`: whether to fold an adapter, from its traffic, what was measured, and what a fold keeps."""

import click
from google.protobuf.json_format import MessageToJson

from lorafold.cli.common import address_option, connected, json_option


@click.command()
@click.argument("deployment")
@json_option
@address_option
def advise(deployment: str, as_json: bool, address: str) -> None:
    """Say how DEPLOYMENT should be served, and why: merged, unmerged or auto."""
    from lorafold.v1 import deployment_pb2 as pb

    with connected(address) as client:
        found = client.stubs.deployments.AdviseDeployment(pb.AdviseDeploymentRequest(name=deployment))
    if as_json:
        click.echo(MessageToJson(found, indent=None, preserving_proto_field_name=True))
        return
    for line in found.lines:
        click.echo(line)
