"""Grouped low-rank products against fp32 arithmetic, token by token: `reference.py` anywhere, the Triton kernels too.

On a GPU the Triton kernels are compiled; without one Triton's interpreter runs them, and they are compiled for an H100.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafold_adapters.kernels.reference import Kernels, Reference
from lorafold_adapters.kernels.tables import SiteFactors, Tables
from tests.interpreter import compile_for_h100, interpreted
from tests.models import DEVICES

triton_products = pytest.importorskip("lorafold_adapters.kernels.triton_products")

DEVICE = DEVICES[-1]
KERNELS: dict[str, Kernels] = {"reference": Reference(), "triton": triton_products.TritonProducts()}
SLOTS = 12
# Largest difference over the largest value. Both sum in fp32 in another order, and round once to the outputs' dtype.
CLOSE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
POPULARITY: dict[str, list[int]] = {
    "identical": [3] * 21,
    "distinct": list(range(SLOTS)),
    "uniform": [turn % 8 for turn in range(24)],
    "skewed": [0] * 17 + [1, 2, 0, 3, 1],
    "none": [-1] * 5,
    "mixed with the base": [2, -1, 2, 5, -1, -1, 7, 2, 5],
    "one": [4],
}
RANKS = [1, 16, 8, 64, 3, 256, 16, 2, 100, 17, 32, 4]


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    with nullcontext() if DEVICE == "cuda" else interpreted(triton_products):
        yield KERNELS[request.param]


@dataclass
class Case:
    """Adapters on three sites of a family, and tokens."""

    inputs_NI: Tensor
    slot_N: Tensor
    tables: Tables
    outputs: list[Tensor]

    @property
    def columns(self) -> int:
        return max(len(a_RI) for a_RI in self.tables.a_RI if a_RI is not None)

    def run(self, kernels: Kernels) -> list[Tensor]:
        tokens, inputs = self.inputs_NI.shape
        shrunk_PNR = torch.full((kernels.parts(inputs), tokens, self.columns), torch.nan, device=DEVICE)
        kernels.shrink(self.inputs_NI, self.slot_N, self.tables, shrunk_PNR)
        outputs = [tensor.clone() for tensor in self.outputs]
        kernels.expand(shrunk_PNR, self.slot_N, self.tables, list(enumerate(outputs)))
        return outputs

    def expected(self) -> list[Tensor]:
        """Token by token, in fp32, from the factors as they are."""
        results = [tensor.float().clone() for tensor in self.outputs]
        for token, slot in enumerate(self.slot_N.tolist()):
            for place, own in self.tables.sites[slot].items() if slot >= 0 else ():
                a_RI = self.tables.a_RI[slot]
                assert a_RI is not None
                own_RI = a_RI[own.column : own.column + len(own.b_RO)].float()
                adapted_O = results[place][token] + (own_RI @ self.inputs_NI[token].float()) @ own.b_RO.float()
                if own.gain_O is not None:
                    adapted_O = adapted_O * own.gain_O.float()
                if own.shift_O is not None:
                    adapted_O = adapted_O + own.shift_O.float()
                results[place][token] = adapted_O
        return [result.to(tensor.dtype) for result, tensor in zip(results, self.outputs, strict=True)]


def case(slots: list[int], dtype: torch.dtype, inputs: int = 96, widths: tuple[int, ...] = (64, 48, 130)) -> Case:
    """Every third adapter has no part in the second site; some have gains, some shifts."""
    random = torch.Generator().manual_seed(len(slots))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE, dtype)

    tables = Tables(SLOTS, widths, max(RANKS), torch.device(DEVICE))
    for slot in range(SLOTS):
        sites, column = {}, 0
        for place, width in enumerate(widths):
            if place == 1 and slot % 3 == 0:
                continue
            rank = RANKS[(slot + place) % len(RANKS)]
            gain_O = 1 + 0.1 * draw(width) if slot % 2 else None
            shift_O = draw(width) if slot % 4 == 1 else None
            sites[place] = SiteFactors(
                column=column, b_RO=draw(rank, width) / rank**0.5, gain_O=gain_O, shift_O=shift_O
            )
            column += rank
        tables.put(slot, draw(column, inputs) / inputs**0.5, sites)
    slot_N = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    outputs = [draw(len(slots), width) for width in widths]
    return Case(draw(len(slots), inputs), slot_N, tables, outputs)


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= CLOSE[one.dtype] * other.abs().max()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_every_token_gets_its_own_adapter(popularity: str, dtype: torch.dtype, kernels: Kernels) -> None:
    slots = POPULARITY[popularity]
    made = case(slots, dtype)
    got, expected = made.run(kernels), made.expected()
    assert_close(got, expected)
    if set(slots) != {-1}:  # Negative control: another adapter would have been noticed.
        made.slot_N[made.slot_N >= 0] = (made.slot_N[made.slot_N >= 0] + 1) % SLOTS
        assert (made.expected()[0] - expected[0]).abs().max() > 0.01 * expected[0].abs().max()


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_tokens_without_adapter_keep_the_bases_outputs_bit_for_bit(dtype: torch.dtype, kernels: Kernels) -> None:
    made = case(POPULARITY["mixed with the base"], dtype)
    for got, base in zip(made.run(kernels), made.outputs, strict=True):
        assert torch.equal(got[made.slot_N < 0], base[made.slot_N < 0])
        assert not torch.equal(got[made.slot_N >= 0], base[made.slot_N >= 0])


@pytest.mark.parametrize(("inputs", "widths"), [(1, (1,)), (1531, (7, 3)), (2048, (129, 128, 127, 1, 5))])
def test_odd_sizes(inputs: int, widths: tuple[int, ...], kernels: Kernels) -> None:
    made = case([0, 1, -1, 2, 5, 5], torch.float32, inputs, widths)
    assert_close(made.run(kernels), made.expected())


def test_a_dropped_adapter_is_the_base_and_a_new_one_takes_its_slot(kernels: Kernels) -> None:
    made = case([1, 2, 1], torch.float32)
    addresses = (made.tables.a_FS.data_ptr(), made.tables.b_JFS.data_ptr())
    made.tables.clear(1)
    cleared = made.run(kernels)
    assert torch.equal(cleared[0][[0, 2]], made.outputs[0][[0, 2]])
    other: Any = made.tables.a_RI[2]
    made.tables.put(1, other, made.tables.sites[2])
    assert_close(made.run(kernels), made.expected())
    assert addresses == (made.tables.a_FS.data_ptr(), made.tables.b_JFS.data_ptr())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("inputs", "widths"), [(4096, (4096, 1024, 1024)), (14336, (4096,)), (96, (64, 48, 130))])
def test_both_kernels_compile_for_an_h100(inputs: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    made = case([0, 1, -1, 2], dtype, inputs, widths)
    names = compile_for_h100(lambda: made.run(KERNELS["triton"]), triton_products)
    assert names == ["_shrink", "_expand"]


def test_a_tokens_result_does_not_depend_on_its_neighbours(kernels: Kernels) -> None:
    together = case([5, 2, 5, 7], torch.float32)
    alone = Case(
        together.inputs_NI[2:3], together.slot_N[2:3], together.tables, [tensor[2:3] for tensor in together.outputs]
    )
    for one, other in zip(alone.run(kernels), together.run(kernels), strict=True):
        assert torch.allclose(one[0], other[2], rtol=0, atol=CLOSE[torch.float32])
