"""What a deployment's adapter is made from: one PEFT folder, or a composition of several. Plain data."""

from dataclasses import dataclass

from lorafold_adapters.compose import Composition


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipePart:
    """One adapter of a composition."""

    path: str
    """Its PEFT folder."""
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A composition of adapters, as a deployment declares it."""

    spec: Composition
    parts: tuple[RecipePart, ...]


Source = str | Recipe
"""A PEFT folder, or a composition."""


def folders_of(source: Source) -> list[str]:
    """Every folder that is read."""
    return [part.path for part in source.parts] if isinstance(source, Recipe) else [source]
