"""Notices which sites get the same tensor, and computes once what they share.

Shapes in the names: N tokens of a batch, I in-features, R rank.
"""

from collections.abc import Callable

from torch import Tensor

from lorafold_adapters.two_path import Family, Site, merged

Products = tuple[Tensor, ...]
"""Of some tokens with the A's of a family, in the pieces that its sites ask for by number."""
Shrink = Callable[[Tensor, int], Products]
"""From the inputs [N, I] of all tokens, and tokens per unit."""


def version_of(inputs: Tensor) -> int:
    """Grows when the tensor is written to; inference tensors do not say, and count as never written to."""
    return -1 if inputs.is_inference() else inputs._version


class Sightings:
    """Which sites got the same tensor one after the other in a forward pass."""

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._site: Site | None = None
        self._pairs: list[tuple[Site, Site]] = []
        self.open = True
        """False once a forward pass was seen, until there is a new composition of the batch."""

    def saw(self, inputs: Tensor, site: Site) -> None:
        """A site works on `inputs`; holding on to the tensor keeps its identity from being used again."""
        if site.is_head:  # Its rows may be others than the body's.
            return
        if inputs is self._inputs and self._site is not None and self._site.family is not site.family:
            self._pairs.append((self._site, site))
        self._inputs, self._site = inputs, site

    def learn(self) -> bool:
        """Makes families of what was seen; True if that is news."""
        self.open = self.open and self._site is None
        self._inputs = self._site = None
        pairs, self._pairs = self._pairs, []
        for one, other in pairs:
            if one.family is not other.family:
                merged([one.family, other.family])
        return bool(pairs)


class Shared:
    """The products that the sites of one family have in common, for one composition of the batch."""

    __slots__ = ("_inputs", "_left", "_products", "_shrinks", "_users", "_version", "keeps")

    def __init__(self, shrinks: tuple[Shrink, ...], family: Family) -> None:
        self._shrinks = shrinks
        self._users = len(family.sites)
        self.keeps = self._users > 1
        """True if anything is kept from one site to the next."""
        self._inputs: Tensor | None = None
        self._version = -1
        self._products: list[Products] = []
        self._left = 0

    def of(self, inputs: Tensor, tokens_per_unit: int) -> list[Products]:
        """The products; computed anew unless this very tensor was given, unchanged, by a sibling before."""
        if inputs is self._inputs and version_of(inputs) == self._version:
            products = self._products
            self._left -= 1
            if self._left == 0:
                self.forget()
            return products
        flat_NI = inputs.reshape(-1, inputs.shape[-1])
        products = [shrink(flat_NI, tokens_per_unit) for shrink in self._shrinks]
        if self.keeps:
            self._inputs, self._version, self._products = inputs, version_of(inputs), products
            self._left = self._users - 1
        return products

    def forget(self) -> None:
        """Lets go of the last inputs."""
        self._inputs, self._products = None, []
