"""Where the factors of each adapter lie in memory, as tables on the device that kernels read.

Adapters stay where they are: loading or dropping one writes a few numbers into tables whose own addresses never
change, so a CUDA graph that was captured before stays valid. The tables hold on to the tensors whose addresses they
have.

Shapes in the names: S slots, J sites of a family, F fields, R rank, I in-features, O out-features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ADDRESS, RANK, COLUMN, GAIN, SHIFT = range(5)
"""Fields of a table. COLUMN: the first of the site's columns among the family's products."""
FIELDS = 5
ALIGNMENT = 16
"""Bytes that every address is a multiple of, which lets a kernel read so many at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFactors:
    """What one adapter does at one site, after its A."""

    column: int
    b_RO: Tensor
    gain_O: Tensor | None = None
    shift_O: Tensor | None = None


class Tables:
    """The factors of every slot's adapter at the sites of one family."""

    def __init__(self, slots: int, widths: Sequence[int], max_rank: int, device: torch.device) -> None:
        self.max_rank = max_rank
        """Of an adapter at one site."""
        self.widths = tuple(widths)
        """Out-features of each site."""
        self.width_J = torch.tensor(self.widths, dtype=torch.int64, device=device)
        self.a_FS = torch.zeros(FIELDS, slots, dtype=torch.int64, device=device)
        """Of the A's of all sites, one below the other [R, I]."""
        self.b_JFS = torch.zeros(len(self.widths), FIELDS, slots, dtype=torch.int64, device=device)
        """Of each site's B [R, O], gain and shift."""
        self.a_RI: list[Tensor | None] = [None] * slots
        self.sites: list[dict[int, SiteFactors]] = [{} for _ in range(slots)]
        """By slot, then by site."""

    def put(self, slot: int, a_RI: Tensor, sites: Mapping[int, SiteFactors]) -> None:
        """Puts an adapter into a slot; `sites` are those that it changes, by number."""
        assert all(len(own.b_RO) <= self.max_rank for own in sites.values())
        a_RI = aligned(a_RI)
        sites = {
            place: SiteFactors(
                column=own.column,
                b_RO=aligned(own.b_RO),
                gain_O=None if own.gain_O is None else aligned(own.gain_O),
                shift_O=None if own.shift_O is None else aligned(own.shift_O),
            )
            for place, own in sites.items()
        }
        rows = [fields_of(sites[place]) if place in sites else [0] * FIELDS for place in range(len(self.widths))]
        self.a_FS[:, slot] = torch.tensor([a_RI.data_ptr(), len(a_RI), 0, 0, 0]).to(self.a_FS)
        self.b_JFS[:, :, slot] = torch.tensor(rows).to(self.b_JFS)
        self.a_RI[slot], self.sites[slot] = a_RI, dict(sites)

    def clear(self, slot: int) -> None:
        """Forgets the adapter of a slot: rows that still name it get the base's outputs."""
        self.a_FS[:, slot] = 0
        self.b_JFS[:, :, slot] = 0
        self.a_RI[slot], self.sites[slot] = None, {}


def fields_of(own: SiteFactors) -> list[int]:
    """The table's column for one site."""
    gain, shift = (0 if tensor is None else tensor.data_ptr() for tensor in (own.gain_O, own.shift_O))
    return [own.b_RO.data_ptr(), len(own.b_RO), own.column, gain, shift]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and begins where it may."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
