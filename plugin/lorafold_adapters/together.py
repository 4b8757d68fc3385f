"""Chooses how adapters of few tokens each run together: on stacks, or by kernels where the device has them."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lorafold_adapters.grouped import Grouped, OnKernels, OnStacks
from lorafold_adapters.kernels import Kernels, Reference
from lorafold_adapters.layout import Layout
from lorafold_adapters.paths import AdapterPath, LowRankPath
from lorafold_adapters.slot_groups import SlotGroups
from lorafold_adapters.spans import Routing
from lorafold_adapters.stacks import MAX_TOKENS, Stacks, stackable
from lorafold_adapters.two_path import Family, Site


class Together:
    """What mixed batches of one model need beyond the adapters themselves."""

    def __init__(
        self,
        sites: Mapping[nn.Module, Site],
        kernels: Kernels | None,
        *,
        stack_bytes: int,
        slots: int,
        device: torch.device,
    ) -> None:
        """`sites`: of the model, as they come and go; `kernels`: None where stacks do better, with `slots` adapters."""
        self._slots = slots
        self.stacks = Stacks(stack_bytes)
        self.ranks: dict[str, int | None] = {}
        """By adapter its largest rank; None for one that is not low-rank products alone."""
        self._sites = sites
        self._kernels = kernels
        self._device = device
        self._groups: SlotGroups | None = None

    def add(self, name: str, paths: Mapping[nn.Module, AdapterPath]) -> None:
        """An adapter was loaded."""
        ranks = [path.rank for path in paths.values() if isinstance(path, LowRankPath)]
        self.ranks[name] = max(ranks) if ranks and len(ranks) == len(paths) else None
        if self._groups is not None:
            self._groups.add(name, paths)

    def drop(self, name: str) -> None:
        """An adapter was dropped."""
        self.ranks.pop(name, None)
        if name in self.stacks.slots:
            self.stacks.clear()
        if self._groups is not None:
            self._groups.drop(name)

    def clear(self) -> None:
        """The families of sites are others than before."""
        self.stacks.clear()
        self._groups = None

    def of(self, routing: Routing) -> tuple[Grouped | None, bool]:
        """What runs as one product, if that pays; and whether what was given before is no longer valid."""
        tokens = {name: len(units) for name, units in routing.body.units_of().items()}
        if len(tokens) < 2:
            return None, False
        if self._kernels is None:
            names = stackable(self._all_ranks(tokens), tokens)
            return self._on_stacks(names, routing) if names else (None, False)
        few = [name for name, count in tokens.items() if count <= MAX_TOKENS and self.ranks[name] is not None]
        return self._on_kernels(few, routing) if len(few) > 1 else (None, False)

    def new_groups(self, max_rank: int | None, first: Sequence[str] = ()) -> SlotGroups:
        """Slots for all adapters, `first` before others; for ranks up to the largest one now, unless said."""
        rank = max_rank or 1 << (max(filter(None, self.ranks.values()), default=1) - 1).bit_length()
        families = dict.fromkeys(site.family for site in self._sites.values())
        groups = SlotGroups(families, self._kernels or Reference(), max_rank=rank, slots=self._slots)
        for name in dict.fromkeys((*first, *self.ranks)):
            groups.add(name, {module: site.paths[name] for module, site in self._sites.items() if name in site.paths})
        return groups

    def _all_ranks(self, names: Mapping[str, int]) -> dict[str, int]:
        """The largest rank of each adapter that has one."""
        ranks: dict[str, int] = {}
        for site in self._sites.values():
            for name in names:
                path = site.paths.get(name)
                if isinstance(path, LowRankPath):
                    ranks[name] = max(path.rank, ranks.get(name, 0))
        return ranks

    def _on_stacks(self, names: Sequence[str], routing: Routing) -> tuple[Grouped | None, bool]:
        moved = set(names) != set(self.stacks.slots)
        if moved and not self.stacks.arrange(names, self._families(names)):
            return None, moved
        slots, head = self.stacks.slots, routing.head.units_of()
        at_head = not head.keys().isdisjoint(slots)
        grouped = OnStacks(
            stacks=self.stacks,
            body=Layout(slots, routing.body.units_of(), self._device),
            head=Layout(slots, head, self._device) if at_head else None,
        )
        return grouped, moved

    def _on_kernels(self, names: Sequence[str], routing: Routing) -> tuple[Grouped | None, bool]:
        moved = self._groups is None or not self._groups.covers(names)
        if self._groups is None or moved:
            self._groups = self.new_groups(None, names)
        slots = {name: slot for name, slot in self._groups.slots.items() if name in names}
        body_N, head_N = (spans.numbered(slots, self._device) for spans in (routing.body, routing.head))
        return OnKernels(groups=self._groups, names=frozenset(slots), body_N=body_N, head_N=head_N), moved

    def _families(self, names: Sequence[str]) -> list[Family]:
        return list(
            dict.fromkeys(site.family for site in self._sites.values() if not site.paths.keys().isdisjoint(names))
        )
