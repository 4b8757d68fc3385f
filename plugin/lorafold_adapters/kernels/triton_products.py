"""The grouped products as two Triton kernels, for batches of few tokens: both read each adapter once.

A program takes sixteen neighbouring tokens and the adapter of one of them, and does nothing if an earlier one of the
sixteen has the same: so tokens of one adapter share what is read, tokens of many are worked on side by side, and the
grid depends on the number of tokens alone. Nothing is allocated and nothing waits for the device, so both kernels may
be captured in a CUDA graph. Partial sums over the in-features are added in a fixed order.

fp16 and bf16 are exact in TF32, so their products lose nothing in a tensor core; fp32 is multiplied as fp32.

Shapes in the names: N tokens, I in-features, O out-features, R ranks of a family, P parts of a sum, J sites.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafold_adapters.kernels.tables import ALIGNMENT, FIELDS, Tables

TOKENS = 16
"""In one program: the least that a tensor core takes."""
INPUTS = 128
"""In-features that a program reads at once."""
OUTPUTS = 128
"""Out-features of one program."""
MAX_RANKS = 64
"""Ranks that a program works on at once, at most."""
LEAST_SHARE = 512
"""In-features of one partial sum, at least."""
MAX_PARTS = 16
MAX_SITES = 4
"""Of one launch of `expand`."""


@triton.jit  # type: ignore[untyped-decorator]
def _first_of_its_slot(slot_ptr, token, tokens, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sixteen tokens, which of them have the slot of `token`, and whether `token` is the first of these."""
    rows = (token // TOKENS) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slot_ptr + rows, mask=rows < tokens, other=-1)
    slot = tl.load(slot_ptr + token)
    same = (slots == slot) & (rows < tokens)
    first = tl.min(tl.where(same, rows, tokens), axis=0)
    return rows, same, slot, (first == token) & (slot >= 0)


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(  # type: ignore[no-untyped-def]
    inputs_ptr,
    slot_ptr,
    table_ptr,
    shrunk_ptr,
    tokens,
    inputs,
    slots,
    inputs_stride,
    part_stride,
    shrunk_stride,
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    token = tl.program_id(0)
    first_rank = tl.program_id(1) * RANKS
    part = tl.program_id(2)
    rows, same, slot, mine = _first_of_its_slot(slot_ptr, token, tokens, TOKENS)
    if mine:
        rank = tl.load(table_ptr + slots + slot).to(tl.int32)
        if first_rank < rank:
            address = tl.load(table_ptr + slot)
            a_ptr = tl.multiple_of(address.to(tl.pointer_type(inputs_ptr.dtype.element_ty)), ALIGNMENT)
            ranks = first_rank + tl.arange(0, RANKS)
            total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
            for offset in range(0, SHARE, INPUTS):
                features = part * SHARE + offset + tl.arange(0, INPUTS)
                x = tl.load(
                    inputs_ptr + rows[:, None] * inputs_stride + features[None, :],
                    mask=same[:, None] & (features[None, :] < inputs),
                    other=0.0,
                )
                a = tl.load(
                    a_ptr + ranks[None, :] * inputs + features[:, None],
                    mask=(ranks[None, :] < rank) & (features[:, None] < inputs),
                    other=0.0,
                )
                total = tl.dot(x.to(tl.float32), a.to(tl.float32), total, input_precision=PRECISION)
            tl.store(
                shrunk_ptr + part * part_stride + rows[:, None] * shrunk_stride + ranks[None, :],
                total,
                mask=same[:, None] & (ranks[None, :] < rank),
            )


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    shrunk_ptr,
    slot_ptr,
    table_ptr,
    width_ptr,
    like_ptr,
    outputs_0,
    outputs_1,
    outputs_2,
    outputs_3,
    tokens,
    slots,
    part_stride,
    shrunk_stride,
    PLACES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIELDS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    token = tl.program_id(0)
    turn = tl.program_id(2)
    rows, same, slot, mine = _first_of_its_slot(slot_ptr, token, tokens, TOKENS)
    if mine:
        place = (PLACES >> (4 * turn)) & 15
        width = tl.multiple_of(tl.load(width_ptr + place).to(tl.int32), WIDTH_UNIT)
        fields_ptr = table_ptr + place * (FIELDS * slots) + slot
        rank = tl.load(fields_ptr + slots).to(tl.int32)
        columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        if (rank > 0) & (tl.program_id(1) * OUTPUTS < width):
            b_ptr = tl.multiple_of(tl.load(fields_ptr).to(tl.pointer_type(like_ptr.dtype.element_ty)), ALIGNMENT)
            first_column = tl.load(fields_ptr + 2 * slots).to(tl.int32)
            added = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
            for first_rank in range(0, rank, RANKS):
                ranks = first_rank + tl.arange(0, RANKS)
                there = same[:, None] & (ranks[None, :] < rank)
                from_ptr = shrunk_ptr + rows[:, None] * shrunk_stride + first_column + ranks[None, :]
                shrunk = tl.load(from_ptr, mask=there, other=0.0)
                for part in tl.static_range(1, PARTS):
                    shrunk += tl.load(from_ptr + part * part_stride, mask=there, other=0.0)
                b = tl.load(
                    b_ptr + ranks[:, None] * width + columns[None, :],
                    mask=(ranks[:, None] < rank) & (columns[None, :] < width),
                    other=0.0,
                )
                added = tl.dot(shrunk, b.to(tl.float32), added, input_precision=PRECISION)
            low = tl.where(turn == 0, outputs_0, outputs_1)
            high = tl.where(turn == 2, outputs_2, outputs_3)
            address = tl.where(turn < 2, low, high).to(tl.int64)
            outputs_ptr = tl.multiple_of(address.to(tl.pointer_type(like_ptr.dtype.element_ty)), ALIGNMENT)
            to_ptr = outputs_ptr + rows[:, None] * width + columns[None, :]
            written = same[:, None] & (columns[None, :] < width)
            adapted = tl.load(to_ptr, mask=written, other=0.0).to(tl.float32) + added
            gain = tl.load(fields_ptr + 3 * slots)
            if gain != 0:
                gain_ptr = tl.multiple_of(gain.to(tl.pointer_type(like_ptr.dtype.element_ty)), ALIGNMENT)
                adapted *= tl.load(gain_ptr + columns, mask=columns < width, other=1.0).to(tl.float32)[None, :]
            shift = tl.load(fields_ptr + 4 * slots)
            if shift != 0:
                shift_ptr = tl.multiple_of(shift.to(tl.pointer_type(like_ptr.dtype.element_ty)), ALIGNMENT)
                adapted += tl.load(shift_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
            tl.store(to_ptr, adapted.to(like_ptr.dtype.element_ty), mask=written)


class TritonProducts:
    """`Kernels` for a GPU; they run on the stream that is current."""

    def parts(self, inputs: int) -> int:
        """See `Kernels`."""
        return min(MAX_PARTS, -(-inputs // LEAST_SHARE))

    def shrink(self, inputs_NI: Tensor, slot_N: Tensor, tables: Tables, shrunk_PNR: Tensor) -> None:
        """See `Kernels`."""
        tokens, inputs = inputs_NI.shape
        parts, _, columns = shrunk_PNR.shape
        assert inputs_NI.stride(1) == 1
        assert shrunk_PNR.stride(2) == 1
        ranks = ranks_at_once(columns)
        _shrink[(tokens, triton.cdiv(columns, ranks), parts)](
            inputs_NI,
            slot_N,
            tables.a_FS,
            shrunk_PNR,
            tokens,
            inputs,
            tables.a_FS.shape[1],
            inputs_NI.stride(0),
            shrunk_PNR.stride(0),
            shrunk_PNR.stride(1),
            SHARE=INPUTS * triton.cdiv(triton.cdiv(inputs, parts), INPUTS),
            RANKS=ranks,
            INPUTS=INPUTS,
            **options(inputs_NI, stages=2),
        )

    def expand(self, shrunk_PNR: Tensor, slot_N: Tensor, tables: Tables, outputs: Sequence[tuple[int, Tensor]]) -> None:
        """See `Kernels`; outputs lie contiguous."""
        for start in range(0, len(outputs), MAX_SITES):
            self._expand(shrunk_PNR, slot_N, tables, outputs[start : start + MAX_SITES])

    def _expand(
        self, shrunk_PNR: Tensor, slot_N: Tensor, tables: Tables, outputs: Sequence[tuple[int, Tensor]]
    ) -> None:
        tensors = [outputs_NO for _, outputs_NO in outputs]
        assert all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
        widest = max(tensor.shape[1] for tensor in tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        _expand[(len(slot_N), triton.cdiv(widest, OUTPUTS), len(tensors))](
            shrunk_PNR,
            slot_N,
            tables.b_JFS,
            tables.width_J,
            tensors[0],
            *addresses,
            *addresses[:1] * (MAX_SITES - len(addresses)),
            len(slot_N),
            tables.a_FS.shape[1],
            shrunk_PNR.stride(0),
            shrunk_PNR.stride(1),
            PLACES=sum(place << (4 * turn) for turn, (place, _) in enumerate(outputs)),
            PARTS=shrunk_PNR.shape[0],
            WIDTH_UNIT=math.gcd(16, *tables.widths),
            RANKS=ranks_at_once(tables.max_rank),
            OUTPUTS=OUTPUTS,
            FIELDS=FIELDS,
            **options(tensors[0], stages=1),  # Most ranks need one turn, with nothing to prefetch.
        )


def ranks_at_once(columns: int) -> int:
    """A power of two that a tensor core takes, for so many ranks."""
    return int(min(MAX_RANKS, max(16, triton.next_power_of_2(columns))))


def options(like: Tensor, stages: int) -> dict[str, Any]:
    """What both kernels are compiled for. `stages`: turns of a loop whose loads are under way at once."""
    precision = "ieee" if like.dtype == torch.float32 else "tf32"
    return {"PRECISION": precision, "TOKENS": TOKENS, "ALIGNMENT": ALIGNMENT, "num_warps": 4, "num_stages": stages}
