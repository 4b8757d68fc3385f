"""Two ways to run many adapters of few tokens each as one product: stacks on a CPU, kernels on a GPU.

Shapes in the names: N tokens, R ranks of a family, P parts of a sum, O out-features.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lorafold_adapters.layout import Layout
from lorafold_adapters.parts import Expand, StackExpand, StackShrink
from lorafold_adapters.sharing import Products, Shrink
from lorafold_adapters.slot_groups import Group, SlotGroups
from lorafold_adapters.stacks import Stacks
from lorafold_adapters.two_path import Family

Parts = tuple[Shrink, dict[int, Expand]]
"""What a family computes once, and by place what its sites do with that."""


class Grouped(Protocol):
    """Adapters that run as one product, for one composition of the batch."""

    @property
    def names(self) -> frozenset[str]:
        """The adapters."""
        ...

    def parts(self, family: Family, *, is_head: bool) -> Parts | None:
        """What the family does; None where no token of theirs gets there."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class OnStacks:
    """`Grouped` by batched products of torch."""

    stacks: Stacks
    body: Layout
    head: Layout | None
    """None where none of their tokens gets there."""

    @property
    def names(self) -> frozenset[str]:
        """See `Grouped`."""
        return frozenset(self.stacks.slots)

    def parts(self, family: Family, *, is_head: bool) -> Parts | None:
        """See `Grouped`."""
        layout = self.head if is_head else self.body
        if layout is None:
            return None
        stack = self.stacks.of(family)
        expands: dict[int, Expand] = {
            place: StackExpand(layout, piece, factors) for piece, (place, factors) in enumerate(stack.factors.items())
        }
        return StackShrink(layout, stack.a_GIR[: layout.slots], tuple(stack.ranks.values())), expands


@dataclass(frozen=True, slots=True)
class KernelShrink:
    """Products of every token with the A's of its adapter."""

    groups: SlotGroups
    group: Group
    slot_N: Tensor

    def __call__(self, inputs_NI: Tensor, tokens_per_unit: int) -> Products:
        """See `Shrink`; one piece [P, N, R], fp32."""
        return (self.group.shrunk(self.groups.kernels, inputs_NI, self.slot_N),)


@dataclass(frozen=True, slots=True)
class KernelExpand:
    """Adds every token's products with the B of its adapter."""

    shrink: KernelShrink
    place: int

    @property
    def nbytes(self) -> int:
        """See `Expand`; of one adapter, at most."""
        tables = self.shrink.group.tables
        return 4 * tables.max_rank * tables.widths[self.place]

    def __call__(self, products: Products, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """See `Expand`."""
        shrink = self.shrink
        shrink.groups.kernels.expand(products[0], shrink.slot_N, shrink.group.tables, [(self.place, outputs_NO)])


@dataclass(frozen=True, kw_only=True, slots=True)
class OnKernels:
    """`Grouped` by kernels that read each token's adapter where it lies."""

    groups: SlotGroups
    names: frozenset[str]
    body_N: Tensor
    head_N: Tensor
    """Slots, int32; -1 for tokens of other adapters and of the base."""

    def parts(self, family: Family, *, is_head: bool) -> Parts | None:
        """See `Grouped`."""
        group = self.groups.families.get(family)
        if group is None:
            return None
        shrink = KernelShrink(self.groups, group, self.head_N if is_head else self.body_N)
        places = {module: place for place, module in enumerate(group.modules)}
        expands: dict[int, Expand] = {
            index: KernelExpand(shrink, places[site.module])
            for index, site in enumerate(family.sites)
            if site.module in places
        }
        return shrink, expands
