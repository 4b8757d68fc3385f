"""Gives adapters slots in the tables that kernels read, for a fixed set of modules.

The modules, the number of slots and the largest rank are fixed, so that nothing ever moves: that is what lets a
captured CUDA graph go on while adapters come and go. Adapters that need more are not covered.

Shapes in the names: N tokens, I in-features, R ranks of a group, P parts of a sum.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorafold_adapters.kernels import Kernels
from lorafold_adapters.kernels.tables import SiteFactors, Tables
from lorafold_adapters.paths import AdapterPath, LowRankPath
from lorafold_adapters.two_path import Family

MOST = 8
"""Modules of one group; larger families are several."""
SLOTS = 256
"""Adapters that may have a slot at once, unless said otherwise."""


class Group:
    """Modules that get the same inputs, and every slot's adapter on them."""

    def __init__(self, modules: Mapping[nn.Module, LowRankPath], *, slots: int, max_rank: int) -> None:
        """`modules`: with any adapter's path, for its shapes."""
        self.modules = tuple(modules)
        self.inputs = next(iter(modules.values())).a_IR.shape[0]
        """In-features."""
        self.columns = max_rank * len(self.modules)
        """Ranks that a token may have in all modules together."""
        shapes = [path.scaled_b_RO for path in modules.values()]
        self.tables = Tables(slots, [b_RO.shape[1] for b_RO in shapes], max_rank, shapes[0].device)

    def put(self, slot: int, paths: Mapping[nn.Module, LowRankPath]) -> None:
        """Puts an adapter into a slot. Its A's are copied unless they lie side by side, in the modules' order."""
        sites: dict[int, SiteFactors] = {}
        column = 0
        for place, module in enumerate(self.modules):
            path = paths.get(module)
            if path is not None:
                sites[place] = SiteFactors(
                    column=column, b_RO=path.scaled_b_RO, gain_O=path.gain_O, shift_O=path.shift_O
                )
                column += path.rank
        self.tables.put(slot, joined([paths[module].a_IR.T for module in self.modules if module in paths]), sites)

    def shrunk(self, kernels: Kernels, inputs_NI: Tensor, slot_N: Tensor, buffer: Tensor | None = None) -> Tensor:
        """The products of every token with its adapter's A's, [P, N, R]; in `buffer` if that is given."""
        inputs_NI = inputs_NI.contiguous()
        tokens, inputs = inputs_NI.shape
        shape = (kernels.parts(inputs), tokens, self.columns)
        if buffer is None:
            shrunk_PNR = inputs_NI.new_empty(shape, dtype=torch.float32)
        else:
            shrunk_PNR = buffer[: shape[0] * tokens * self.columns].view(shape)
        kernels.shrink(inputs_NI, slot_N, self.tables, shrunk_PNR)
        return shrunk_PNR


class SlotGroups:
    """All groups, and which adapter is in which slot."""

    def __init__(self, families: Iterable[Family], kernels: Kernels, *, max_rank: int, slots: int) -> None:
        """Covers the modules on which some adapter is a low-rank product now."""
        self.kernels = kernels
        self.max_rank = max_rank
        self.slots: dict[str, int] = {}
        """By adapter."""
        self._free = list(reversed(range(slots)))
        self.groups: list[Group] = []
        self.families: dict[Family, Group] = {}
        """Families whose modules are one group."""
        for family in families:
            self._cover(family, slots)
        self._group_of = {module: group for group in self.groups for module in group.modules}

    def _cover(self, family: Family, slots: int) -> None:
        paths = {place: path for name in family.products for place, path in family.low_rank(name).items()}
        modules = [(family.sites[place].module, paths[place]) for place in sorted(paths)]
        for start in range(0, len(modules), MOST):
            some = dict(modules[start : start + MOST])
            self.groups.append(Group(some, slots=slots, max_rank=self.max_rank))
        if 0 < len(modules) <= MOST:
            self.families[family] = self.groups[-1]

    def add(self, name: str, paths: Mapping[nn.Module, AdapterPath]) -> None:
        """Gives an adapter a slot, if these groups can do what it does."""
        low_rank = {module: path for module, path in paths.items() if isinstance(path, LowRankPath)}
        fits = all(module in self._group_of and path.rank <= self.max_rank for module, path in low_rank.items())
        if len(low_rank) != len(paths) or not fits or not self._free:
            return
        slot = self.slots[name] = self._free.pop()
        for group in dict.fromkeys(self._group_of[module] for module in low_rank):
            group.put(slot, low_rank)

    def drop(self, name: str) -> None:
        """Frees an adapter's slot; rows that name it get the base's outputs."""
        slot = self.slots.pop(name, None)
        if slot is not None:
            for group in self.groups:
                group.tables.clear(slot)
            self._free.append(slot)

    def covers(self, adapters: Iterable[str | None]) -> bool:
        """True if every adapter has a slot."""
        return all(name is None or name in self.slots for name in adapters)

    def slots_of(self, adapters: Iterable[str | None]) -> list[int]:
        """The slot of each; -1 for the base."""
        return [-1 if name is None else self.slots[name] for name in adapters]


def joined(parts_RI: Sequence[Tensor]) -> Tensor:
    """The matrices below each other, contiguous; without a copy where they are neighbours in memory already."""
    first, rows = parts_RI[0], sum(len(part) for part in parts_RI)
    stop = first.data_ptr()
    for part in parts_RI:
        if not part.is_contiguous() or part.data_ptr() != stop or storage_of(part) != storage_of(first):
            return torch.cat(list(parts_RI)).contiguous()
        stop += part.nbytes
    return first.as_strided((rows, first.shape[1]), first.stride())


def storage_of(tensor: Tensor) -> int:
    """Where the memory begins that the tensor is a view of."""
    return tensor.untyped_storage().data_ptr()
