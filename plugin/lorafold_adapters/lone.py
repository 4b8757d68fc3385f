"""What a site does where one adapter has every token and is a low-rank product there: the commonest batch.

On a CPU a small product takes no longer than the calls around it, so this is a single one. What the sites of a family
have in common is computed by the first of them, as in `sharing`.

Shapes in the names: N tokens of a batch, I in-features, R rank, O out-features.
"""

from torch import Tensor

from lorafold_adapters.cpu_products import add_expanded, is_large, is_small
from lorafold_adapters.parts import Part, SpanShrink
from lorafold_adapters.paths import LowRankPath
from lorafold_adapters.sharing import Products, version_of
from lorafold_adapters.two_path import Family

EVERY = Part(start=0, stop=1, whole=True)


class LoneProducts:
    """Of all tokens with the A's of a family."""

    __slots__ = ("_shrink", "_users", "inputs", "left", "pieces", "version")

    def __init__(self, shrink: SpanShrink) -> None:
        self._shrink = shrink
        self._users = len(shrink.ranks)
        self.inputs: Tensor | None = None
        """What the products are of."""
        self.version = -1
        """Of the inputs."""
        self.pieces: Products = ()
        """[N, R] for each site."""
        self.left = 0
        """Sites that have not had theirs yet."""

    def renew(self, inputs: Tensor) -> None:
        """Computes them of `inputs` [..., I]."""
        self.pieces = self._shrink(inputs.reshape(-1, inputs.shape[-1]), 1)
        self.inputs, self.version, self.left = inputs, version_of(inputs), self._users

    def forget(self) -> None:
        """Lets go of the last inputs."""
        self.inputs, self.pieces = None, ()


class LoneWork:
    """See `steps.Work`."""

    __slots__ = ("_b_RO", "_gain_O", "_is_large", "_piece", "_shift_O", "shared", "small")

    def __init__(self, shared: LoneProducts, piece: int, path: LowRankPath) -> None:
        self.shared = shared
        self.small = is_small(path.a_IR, path.scaled_b_RO)
        self._piece = piece
        self._b_RO, self._gain_O, self._shift_O = path.scaled_b_RO, path.gain_O, path.shift_O
        self._is_large = is_large(path.scaled_b_RO)

    def __call__(self, inputs: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """Writes the adapted outputs over the base's."""
        shared = self.shared
        if inputs is not shared.inputs or version_of(inputs) != shared.version:
            shared.renew(inputs)
        if self._is_large:
            add_expanded(outputs_NO, shared.pieces[self._piece], self._b_RO)
        else:
            outputs_NO.addmm_(shared.pieces[self._piece], self._b_RO)
        if self._gain_O is not None:
            outputs_NO.mul_(self._gain_O)
        if self._shift_O is not None:
            outputs_NO.add_(self._shift_O)
        shared.left -= 1
        if shared.left == 0:
            shared.forget()


def lone_works(family: Family, name: str) -> dict[int, LoneWork]:
    """By place in the family, for those sites at which the adapter is a low-rank product."""
    paths = family.low_rank(name)
    if not paths:
        return {}
    a_IR = family.products[name]
    shared = LoneProducts(SpanShrink(EVERY, a_IR, tuple(path.rank for path in paths.values()), is_large(a_IR)))
    return {place: LoneWork(shared, piece, path) for piece, (place, path) in enumerate(paths.items())}
