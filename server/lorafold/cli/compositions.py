"""The options of `lorafold deployments create` and `update` that say what a deployment's adapter is made from."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lorafold.v1.deployment_pb2 import Composition, CompositionPart, Deployment, PreviousVersion

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd")
OPTIONS = (
    click.option("--adapter", help="The PEFT folder: one that is here, or else a path where the server runs."),
    click.option("--compose", type=click.Choice(METHODS), help="Several adapters as one, instead of --adapter."),
    click.option("--part", "parts", multiple=True, metavar="DIR[:WEIGHT]", help="One of them; may be repeated."),
    click.option("--density", type=float, help="Share of each part that is kept; TIES, DARE and pruning need it."),
    click.option("--seed", type=click.IntRange(min=0), help="Of DARE's random choice."),
    click.option("--rank", type=click.IntRange(min=1), help="Of svd's result, or of the form beside the weights."),
)


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the command gets those that were given as keywords."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def set_source(wanted: "Deployment", given: Mapping[str, Any]) -> bool:
    """Writes what the options say into `wanted`; False if they say nothing. Raises UsageError."""
    check_source(given)
    adapter, method, parts = given["adapter"], given["compose"], given["parts"]
    if adapter is not None:
        wanted.adapter_path = server_path(adapter)
    if method is not None:
        wanted.composition.CopyFrom(composition_of(method, parts, given))
    return adapter is not None or method is not None


def check_source(given: Mapping[str, Any]) -> None:
    """Raises UsageError for options that contradict each other, or say nothing."""
    if given["adapter"] == "":
        raise click.UsageError("--adapter is empty: name a PEFT folder")
    adapter, method, parts = given["adapter"], given["compose"], given["parts"]
    surplus = [key for key in ("density", "seed", "rank") if given[key] is not None] + (["part"] if parts else [])
    if method is None and surplus:
        raise click.UsageError(f"--{surplus[0]} belongs to a composition: give --compose")
    if adapter is not None and method is not None:
        raise click.UsageError("give --adapter or --compose, not both")
    if method is not None and not parts:
        raise click.UsageError("--compose needs at least one --part")


def composition_of(method: str, parts: tuple[str, ...], given: Mapping[str, Any]) -> "Composition":
    """The message of --compose and what belongs to it. Raises UsageError."""
    from lorafold.v1 import deployment_pb2 as pb

    return pb.Composition(
        method=f"COMPOSITION_METHOD_{method.upper()}",
        parts=[part_of(part) for part in parts],
        density=given["density"],
        seed=given["seed"],
        rank=given["rank"],
    )


def part_of(text: str) -> "CompositionPart":
    """The message of one DIR[:WEIGHT]."""
    from lorafold.v1.deployment_pb2 import CompositionPart

    folder, weight = split_part(text)
    return CompositionPart(adapter_path=server_path(folder), weight=weight)


def split_part(text: str) -> tuple[str, float | None]:
    """Folder and weight of one DIR[:WEIGHT]; a colon with no number after it belongs to the folder, if there is one."""
    folder, colon, number = text.rpartition(":")
    try:
        return (folder, float(number)) if colon else (text, None)
    except ValueError:
        if Path(folder).is_dir() and not Path(text).exists():
            raise click.UsageError(f"--part {text}: '{number}' is no weight: write DIR or DIR:NUMBER") from None
        return text, None


def server_path(adapter: str) -> str:
    """A folder that exists here becomes absolute; any other path is the server's to resolve."""
    return str(Path(adapter).absolute()) if Path(adapter).is_dir() else adapter


def in_words(item: "Deployment | PreviousVersion") -> str:
    """What a deployment's adapter is made from, for people."""
    if not item.HasField("composition"):
        return item.adapter_path
    from lorafold.v1.deployment_pb2 import CompositionMethod

    method = CompositionMethod.Name(item.composition.method).removeprefix("COMPOSITION_METHOD_").lower()
    return f"{method} of " + ", ".join(f"{part.adapter_path}:{part.weight:g}" for part in item.composition.parts)
