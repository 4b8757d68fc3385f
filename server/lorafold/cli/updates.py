"""Shows how far the update of a deployment is."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafold.client import Client
    from lorafold.v1.deployment_pb2 import Deployment, UpdateProgress


def followed(client: "Client", wanted: "Deployment") -> "Deployment":
    """Updates, says on stderr what is done, and waits until the adapter of before is gone."""
    from rich.console import Console

    from lorafold.v1 import deployment_pb2 as pb

    console = Console(stderr=True, highlight=False)
    made = pb.Deployment()
    with console.status("updating") as status:
        for message in client.stubs.deployments.StreamUpdateDeployment(
            pb.StreamUpdateDeploymentRequest(deployment=wanted)
        ):
            if not message.HasField("progress"):
                made = message.deployment
            elif message.progress.stage == pb.UPDATE_STAGE_MEASURED:
                status.update(in_words(message.progress))  # Many of them, each of no interest once the next is there.
            else:
                console.print(in_words(message.progress))
    return made


def in_words(step: "UpdateProgress") -> str:
    """One step, for people."""
    from lorafold.v1 import deployment_pb2 as pb

    if step.stage == pb.UPDATE_STAGE_MEASURED:
        return f"measured {step.parameters_done} of {step.parameters_total} parameters"
    if step.stage == pb.UPDATE_STAGE_DRAINING:
        return f"{step.in_flight} requests in flight on the adapter of before"
    return pb.UpdateStage.Name(step.stage).removeprefix("UPDATE_STAGE_").lower()
