"""The grouped products in plain torch, adapter by adapter: right anywhere, fast nowhere.

Shapes in the names: N tokens, I in-features, O out-features, R ranks of a family, P parts of a sum.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorafold_adapters.kernels.tables import Tables


class Kernels(Protocol):
    """Two products; between them lies a buffer of the caller's, fp32, which need not be cleared."""

    def parts(self, inputs: int) -> int:
        """How many partial sums `shrink` makes of so many in-features."""
        ...

    def shrink(self, inputs_NI: Tensor, slot_N: Tensor, tables: Tables, shrunk_PNR: Tensor) -> None:
        """Multiplies every token by the A's of its slot's adapter, in fp32; slot -1 has none."""
        ...

    def expand(self, shrunk_PNR: Tensor, slot_N: Tensor, tables: Tables, outputs: Sequence[tuple[int, Tensor]]) -> None:
        """Adds B's products to the outputs [N, O] of sites, given by number, in place; then gain and shift.

        Outputs of tokens without adapter are not written to.
        """
        ...


class Reference:
    """`Kernels` without a kernel."""

    def parts(self, inputs: int) -> int:
        """See `Kernels`."""
        return 1

    def shrink(self, inputs_NI: Tensor, slot_N: Tensor, tables: Tables, shrunk_PNR: Tensor) -> None:
        """See `Kernels`."""
        for slot in present(slot_N):
            a_RI = tables.a_RI[slot]
            if a_RI is not None:
                rows = (slot_N == slot).nonzero().flatten()
                shrunk_PNR[0, rows, : len(a_RI)] = inputs_NI[rows].float() @ a_RI.float().T

    def expand(self, shrunk_PNR: Tensor, slot_N: Tensor, tables: Tables, outputs: Sequence[tuple[int, Tensor]]) -> None:
        """See `Kernels`."""
        for slot in present(slot_N):
            rows = (slot_N == slot).nonzero().flatten()
            for place, outputs_NO in outputs:
                own = tables.sites[slot].get(place)
                if own is None:
                    continue
                shrunk_TR = shrunk_PNR[:, rows, own.column : own.column + len(own.b_RO)].sum(0)
                adapted_TO = outputs_NO[rows].float() + shrunk_TR @ own.b_RO.float()
                if own.gain_O is not None:
                    adapted_TO *= own.gain_O
                if own.shift_O is not None:
                    adapted_TO += own.shift_O
                outputs_NO[rows] = adapted_TO.to(outputs_NO.dtype)


def present(slot_N: Tensor) -> list[int]:
    """The slots that some token names."""
    return [int(slot) for slot in torch.unique(slot_N) if slot >= 0]
