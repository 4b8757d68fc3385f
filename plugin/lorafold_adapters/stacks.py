"""Copies of the A's and B's of the adapters that are in the batch, stacked so that one product does for all of them.

On a CPU eight adapters of one row each cost eight times two calls for each module, or two batched ones on a stack.
A stack is of one composition of the batch at a time: adapters that stay keep their slots, so that a request that joins
or leaves costs one adapter's copy. The bytes are limited by whoever makes it.

Shapes in the names: G slots, I in-features, R rank, O out-features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold_adapters.paths import LowRankPath
from lorafold_adapters.two_path import Family

CALL_IN_RANKS = 64
"""Two more calls for a module cost as much as reading this many more ranks of an adapter (measured, 2 CPU cores)."""
MAX_TOKENS = 16
"""Adapters with more tokens than this in one step are as fast alone (measured)."""


@dataclass(slots=True)
class Factors:
    """The stacked factors of one site."""

    columns: slice
    """Where its products are among the family's."""
    b_GRO: Tensor
    gain_GO: Tensor | None = None
    shift_GO: Tensor | None = None

    def write(self, slot: int, path: LowRankPath | None) -> None:
        """Puts an adapter into a slot; zeros where it does not change this site."""
        filled = 0 if path is None else path.rank
        if path is not None:
            self.b_GRO[slot, :filled] = path.scaled_b_RO
        self.b_GRO[slot, filled:] = 0
        self.gain_GO = self._written(self.gain_GO, slot, None if path is None else path.gain_O, 1.0)
        self.shift_GO = self._written(self.shift_GO, slot, None if path is None else path.shift_O, 0.0)

    def _written(self, stack_GO: Tensor | None, slot: int, values_O: Tensor | None, neutral: float) -> Tensor | None:
        if stack_GO is None and values_O is not None:
            stack_GO = torch.full_like(self.b_GRO[:, 0], neutral)
        if stack_GO is not None:
            stack_GO[slot] = neutral if values_O is None else values_O
        return stack_GO


class FamilyStack:
    """The stacked factors of all sites of a family."""

    def __init__(self, family: Family, capacity: int, ranks: Mapping[int, int]) -> None:
        self.ranks = dict(ranks)
        """By place in the family: the largest rank that fits."""
        self._family = family
        like = next(iter(family.products.values()))
        self.a_GIR = like.new_empty(capacity, like.shape[0], sum(ranks.values()))
        self.factors: dict[int, Factors] = {}
        stop = 0
        for place, rank in ranks.items():
            start, stop = stop, stop + rank
            outputs = next(path for name in family.products if (path := family.low_rank(name).get(place)))
            columns = slice(start, stop)
            b_GRO = like.new_empty(capacity, rank, outputs.scaled_b_RO.shape[1])
            self.factors[place] = Factors(columns=columns, b_GRO=b_GRO)

    def write(self, slot: int, name: str) -> None:
        """Puts an adapter into a slot."""
        paths = self._family.low_rank(name)
        for place, factors in self.factors.items():
            path, columns = paths.get(place), factors.columns
            filled = columns.start
            if path is not None:
                filled += path.rank
                self.a_GIR[slot, :, columns.start : filled] = path.a_IR
            self.a_GIR[slot, :, filled : columns.stop] = 0
            factors.write(slot, path)


class Stacks:
    """The stacks of all families, and who is in which slot."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Bytes that they may take."""
        self.slots: list[str] = []
        """The adapters, by slot."""
        self._capacity = 0
        self._stacks: dict[Family, FamilyStack] = {}

    @property
    def nbytes(self) -> int:
        """Memory that they take for the adapters that are in them."""
        rows = [stack.a_GIR for stack in self._stacks.values()]
        rows += [factors.b_GRO for stack in self._stacks.values() for factors in stack.factors.values()]
        return sum(tensor[: len(self.slots)].nbytes for tensor in rows)

    def clear(self) -> None:
        """Frees everything."""
        self.slots, self._capacity, self._stacks = [], 0, {}

    def arrange(self, names: Sequence[str], families: Sequence[Family]) -> bool:
        """Makes the slots hold exactly `names`, with as few copies as that takes; False if it is over the budget."""
        needed = {family: ranks_of(family, names) for family in families}
        if sum(bytes_of(family, ranks) for family, ranks in needed.items()) * len(names) > self.budget:
            self.clear()
            return False
        try:
            self._arrange(names, needed)
        except BaseException:
            self.clear()
            raise
        return True

    def _arrange(self, names: Sequence[str], needed: Mapping[Family, Mapping[int, int]]) -> None:
        if len(names) > self._capacity:
            self.clear()
            self._capacity = 1 << (len(names) - 1).bit_length()
        fresh = self._assign(names)
        self._stacks = {family: stack for family, stack in self._stacks.items() if needed.get(family)}
        for family, ranks in needed.items():
            if not ranks:
                continue
            stack, slots = self._stacks.get(family), fresh
            if stack is None or not fits(stack.ranks, ranks):
                stack, slots = FamilyStack(family, self._capacity, ranks), list(range(len(names)))
                self._stacks[family] = stack
            for slot in slots:
                stack.write(slot, self.slots[slot])

    def of(self, family: Family) -> FamilyStack:
        """The stack of one family; there is one where an adapter of the slots changes one of its sites."""
        return self._stacks[family]

    def _assign(self, names: Sequence[str]) -> list[int]:
        """Gives every name a slot below their number; returns the slots that have another adapter than before."""
        kept = [name if name in names else None for name in self.slots[: len(names)]]
        kept += [None] * (len(names) - len(kept))
        coming = iter([name for name in names if name not in kept])
        fresh = [slot for slot, name in enumerate(kept) if name is None]
        self.slots = [next(coming) if name is None else name for name in kept]
        return fresh


def ranks_of(family: Family, names: Sequence[str]) -> dict[int, int]:
    """By place in the family, the largest rank that one of the adapters has there."""
    ranks: dict[int, int] = {}
    for name in names:
        for place, path in family.low_rank(name).items():
            ranks[place] = max(path.rank, ranks.get(place, 0))
    return dict(sorted(ranks.items()))


def bytes_of(family: Family, ranks: Mapping[int, int]) -> int:
    """Of one adapter in the family's stack."""
    total = 0
    for place, rank in ranks.items():
        path = next(path for name in family.products if (path := family.low_rank(name).get(place)))
        total += rank * (path.a_IR.shape[0] + path.scaled_b_RO.shape[1]) * path.a_IR.itemsize
    return total


def fits(has: Mapping[int, int], needed: Mapping[int, int]) -> bool:
    """True unless a rank is too small, or the whole more than twice what is needed."""
    enough = all(has.get(place, 0) >= rank for place, rank in needed.items())
    return enough and sum(has.values()) <= 2 * sum(needed.values())


def stackable(ranks: Mapping[str, int], tokens: Mapping[str, int]) -> list[str]:
    """Which adapters to stack: those with few tokens, up to the rank where padding the others costs most less.

    `ranks`: by adapter its largest rank. `tokens`: by adapter its tokens in the batch. Fewer than two are none.
    """
    few = [name for name, count in tokens.items() if 0 < count <= MAX_TOKENS and name in ranks]
    best, least = [], sum(CALL_IN_RANKS + ranks[name] for name in few)
    for limit in sorted({ranks[name] for name in few}):
        inside = [name for name in few if ranks[name] <= limit]
        alone = sum(CALL_IN_RANKS + ranks[name] for name in few if ranks[name] > limit)
        cost = CALL_IN_RANKS + limit * len(inside) + alone
        if len(inside) > 1 and cost < least:
            best, least = inside, cost
    return best
