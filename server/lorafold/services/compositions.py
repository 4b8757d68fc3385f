"""`lorafold.v1.Composition` and back."""

from lorafold.errors import InvalidField
from lorafold.recipes import Recipe, RecipePart, Source
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.compose import METHODS, Composition, check_weights
from lorafold_adapters.errors import CompositionInvalid

PREFIX = "COMPOSITION_METHOD_"


def source_of(wanted: pb.Deployment) -> Source:
    """What a deployment asks for. Raises InvalidField."""
    if not wanted.HasField("composition"):
        return path_of(wanted.adapter_path, "deployment.adapter_path")
    if wanted.adapter_path:
        raise InvalidField("deployment.composition", "is set beside adapter_path: set one of the two")
    return recipe_of(wanted.composition)


def recipe_of(wanted: pb.Composition) -> Recipe:
    """Raises InvalidField with the option that is wrong."""
    options = {key: getattr(wanted, key) for key in ("density", "seed", "rank") if wanted.HasField(key)}
    field = "deployment.composition"
    parts = tuple(
        RecipePart(
            path=path_of(part.adapter_path, f"{field}.parts[{index}].adapter_path"),
            weight=part.weight if part.HasField("weight") else 1.0,
        )
        for index, part in enumerate(wanted.parts)
    )
    try:
        check_weights([part.weight for part in parts])
        return Recipe(spec=Composition(method=method_of(wanted.method), **options), parts=parts)
    except CompositionInvalid as error:
        raise InvalidField(f"{field}.{error.field}", error.fact) from error


def method_of(value: int) -> str:
    """Raises InvalidField."""
    names = {pb.CompositionMethod.Value(f"{PREFIX}{name.upper()}"): name for name in METHODS}
    if value not in names:
        choices = ", ".join(name.upper() for name in METHODS)
        raise InvalidField("deployment.composition.method", f"{value} is no method: use {choices}")
    return names[value]


def path_of(path: str, field: str) -> str:
    """Raises InvalidField."""
    if not path or "\0" in path:
        raise InvalidField(field, "is no path: give the adapter's folder as the server sees it")
    return path


def message_of(recipe: Recipe) -> pb.Composition:
    """As clients see it."""
    spec = recipe.spec
    return pb.Composition(
        method=f"{PREFIX}{spec.method.upper()}",
        parts=[pb.CompositionPart(adapter_path=part.path, weight=part.weight) for part in recipe.parts],
        density=spec.density,
        seed=spec.seed,
        rank=spec.rank,
    )
