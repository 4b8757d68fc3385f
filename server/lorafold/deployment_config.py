"""`[[deployments]]` of `lorafold.toml`, which is also how deployments are remembered, as frozen objects."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafold.recipes import Recipe, RecipePart, Source
from lorafold_adapters.compose import Composition, check_weights
from lorafold_adapters.errors import CompositionInvalid
from lorafold_adapters.policy import PolicyKind

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class Section(BaseModel):
    """A table of the file: nothing in it can be changed, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class PartConfig(Section):
    """`parts` of `compose`: one adapter of a composition."""

    adapter: str
    """A PEFT adapter folder, relative to the file."""
    weight: float = 1.0
    """A negative one takes away what the adapter has learnt."""


class ComposeConfig(Section):
    """`compose`: several adapters as one."""

    method: str
    """linear, ties, dare_linear, dare_ties, magnitude_prune or svd."""
    parts: list[PartConfig]
    density: float | None = None
    """Share of each part that is kept; all methods but linear and svd need it."""
    seed: int | None = None
    """Of the random choice of dare_*."""
    rank: int | None = None
    """svd needs it: rank of the result. Others, but not linear: rank of the form beside the weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_weights([part.weight for part in self.parts])
            _ = self.spec
        except CompositionInvalid as error:
            raise ValueError(f"'{error.field}' {error.fact}") from error
        return self

    @property
    def spec(self) -> Composition:
        """How the parts are composed."""
        return Composition(method=self.method, density=self.density, seed=self.seed, rank=self.rank)


class DeploymentConfig(Section):
    """`[[deployments]]`: a name that clients call."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    adapter: str | None = None
    """A PEFT adapter folder, relative to the file. Either this or `compose`."""
    compose: ComposeConfig | None = None
    policy: Annotated[PolicyKind, Field(strict=False)] = PolicyKind.AUTO
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Requests of deployments with a higher one start first."""
    max_concurrency: Annotated[int, Field(gt=0, lt=2**32)] | None = None
    """Completions that run at once; as many as there is room for unless given."""
    pinned: bool = False
    """Keep the adapter on the device, however long nobody asks for it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.adapter is None) == (self.compose is None):
            raise ValueError("needs 'adapter' or 'compose', and not both")
        return self

    @property
    def source(self) -> Source:
        """What its adapter is made from."""
        if self.compose is None:
            return str(self.adapter)
        parts = tuple(RecipePart(path=part.adapter, weight=part.weight) for part in self.compose.parts)
        return Recipe(spec=self.compose.spec, parts=parts)

    def with_source(self, source: Source) -> Self:
        """The same with another adapter."""
        compose = compose_of(source) if isinstance(source, Recipe) else None
        return self.model_copy(update={"adapter": None if compose else source, "compose": compose})


def compose_of(recipe: Recipe) -> ComposeConfig:
    """The recipe as the file would have it."""
    spec = recipe.spec
    parts = [PartConfig(adapter=part.path, weight=part.weight) for part in recipe.parts]
    return ComposeConfig(method=spec.method, parts=parts, density=spec.density, seed=spec.seed, rank=spec.rank)
